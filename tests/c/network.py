"""The networks of the demo and of the benchmark, on a machine that has named network namespaces in /run/netns.

    network.py LOAD    benches/load.c, built
"""

import os
import sys

import hosts

demo = hosts.demo
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "benches"))
from topology import Load  # noqa: E402


def mounts():
    with open("/proc/self/mountinfo", encoding="ascii") as file:
        return file.read()


def network_built_twice_beside_named_namespaces_changes_no_mount(load_program):
    demo.run("mount", "-t", "tmpfs", "tmpfs", "/run")
    demo.run("ip", "netns", "add", "kept")
    before = mounts(), os.stat("/run/netns/kept").st_ino, sorted(os.listdir("/run/netns"))
    for _ in range(2):
        with Load(load_program) as load:
            found = load.run("short", 1, 0.1)
            assert found["n"] > 0 and found["failed"] == 0, found
    assert (mounts(), os.stat("/run/netns/kept").st_ino, sorted(os.listdir("/run/netns"))) == before, mounts()


if __name__ == "__main__":
    hosts.alone(__file__, network_built_twice_beside_named_namespaces_changes_no_mount)
