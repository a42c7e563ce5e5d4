#!/usr/bin/env python3
"""The instructions of the hot calls, counted by callgrind, and how many they may have.

    instructions.py CALLS    fails if a call has more than LIMIT; CALLS is benches/calls.c, built

It runs in a network namespace with loopback up.
"""

import re
import shutil
import subprocess
import sys

# The function, the argument of benches/calls.c that calls it, and the number of datagrams of one call.
CALLS = (
    ("tp_socket", "socket", 1),
    ("tp_connect_from", "connect", 1),
    ("tp_accept", "accept", 1),
    ("tp_orig_dst", "orig_dst", 1),
    ("tp_recvfrom", "recvfrom", 1),
    ("tp_msg_orig_dst", "msg_orig_dst", 1),
    ("tp_recv_datagrams", "datagrams", 32),
)
# Of one call, or of one datagram of a batch. The system calls in it take several thousand.
LIMIT = 300


def target(equivalent):
    """1.5 times the equivalent C code, 60 instructions for the checks that it does not make, and never more than the limit."""
    return min(LIMIT, 1.5 * equivalent + 60)


def instructions(command, name, count, within=lambda command: command):
    """The instructions of one call, of which the program makes this many; `within` gives the command that runs valgrind elsewhere."""
    tool = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", f"--toggle-collect={name}"]
    output = subprocess.run(within([*tool, *command, str(count)]), capture_output=True, text=True, check=True).stderr
    # The program calls tp_connect_from once more, to make the connection that it accepts.
    return int(re.search(r"Collected : (\d+)", output)[1]) / (count + (name == "tp_connect_from"))


def main(program):
    if not shutil.which("valgrind"):
        print("skipped: hot calls: there is no valgrind; needs `command -v valgrind`")
        return 0
    failed = 0
    for name, argument, datagrams in CALLS:
        # The first call of a process resolves the symbols of the C library: many calls, and half an instruction of each.
        found = instructions([program, argument], name, 500) / datagrams
        print(f"{name}: {found:.0f} instructions")
        failed += found > LIMIT
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
