"""The demo's hosts, for tests: things done on one of them, in a process of the test's own."""

import ctypes
import os
import socket
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "examples-c"))
import demo  # noqa: E402


def on(host, body):
    """The result of something done in a thread that is on a host."""
    result = []

    def run():
        enter(demo.namespaces[host])
        result.append(body())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return result[0]


def enter(fd):
    if ctypes.CDLL(None, use_errno=True).setns(fd, demo.CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def meet():
    """Returns when client and server reach each other: the first question for a neighbour's address may take a second."""

    def refused(family, server):
        deadline = time.monotonic() + demo.PATIENCE
        with socket.socket(family, socket.SOCK_DGRAM) as client:
            client.settimeout(0.1)
            client.connect((server, 9))
            while time.monotonic() < deadline:
                try:
                    client.send(b"")
                    client.recv(1)
                except ConnectionRefusedError:
                    return True
                except TimeoutError:
                    pass
        return False

    for family, (_, _, server) in zip((socket.AF_INET, socket.AF_INET6), demo.FETCHES):
        assert on("client", lambda family=family, server=server: refused(family, server)), f"no way to {server}"


def alone(file, test):
    """Runs a test in namespaces of its own, which end with it, with the arguments of this program; the hosts are there."""
    if sys.argv[1] != "--inside":
        user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        new = ["unshare", *user, "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
        os.execvp(new[0], [*new, sys.executable, file, "--inside", *map(os.path.abspath, sys.argv[1:])])
    demo.build_network()
    test(*sys.argv[2:])
