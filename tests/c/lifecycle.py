"""What becomes of rules, and of traffic, when the program that installed them forks, ends, becomes a daemon, closes its
descriptors, drops its privileges or moves to another network namespace.

    lifecycle.py DIRECTORY-OF-THE-EXAMPLES LIFECYCLE-PROGRAM [SCENARIO...]

Runs itself in namespaces of its own, as the demo does. Exits non-zero with a sentence if something is not as it should be.
"""

import concurrent.futures
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import hosts
from hosts import demo, limit, on

SERVERS = ((socket.AF_INET, ("203.0.113.2", 80)), (socket.AF_INET6, ("2001:db8:2::2", 80)))
PROXIED, PASSED, DROPPED = "proxied", "passed", "dropped"
# Time limit for the second half of a scenario, on a busy machine.
LONG = limit(240)

# Scenario, what traffic sees while the program is ready, and what after its second half: by nf_tables, and by iptables, whose
# chains no process owns: they stay until they are purged. Then they drop what finds no listener, and what they have marked
# for routing that is gone. None: the traffic says nothing about the scenario.
ROWS = [
    # The process ends.
    ("sigkill", PROXIED, PASSED, DROPPED),
    ("exit", PROXIED, PASSED, DROPPED),
    ("parent-exit-handler", PROXIED, PASSED, PASSED),
    ("worker-exit-handler", PROXIED, PROXIED, PROXIED),
    # The installer ends, and a child uses the rules.
    ("daemon", PROXIED, PASSED, PASSED),
    ("double-fork", PROXIED, PASSED, PASSED),
    ("prefork", PROXIED, PROXIED, PROXIED),
    ("prefork-forgets", PROXIED, PASSED, PROXIED),
    ("prefork-master-changes", PROXIED, PASSED, PASSED),
    ("siblings", PROXIED, PROXIED, PROXIED),
    ("parent-closes", PROXIED, PROXIED, PROXIED),
    ("killed-in-call", PASSED, PASSED, PASSED),
    ("exec", PROXIED, PASSED, PASSED),
    # A child, while the installer runs.
    ("shared", PROXIED, PROXIED, PROXIED),
    ("shared-across-pid-namespaces", PROXIED, PROXIED, PROXIED),
    ("shared-at-once", PROXIED, PROXIED, PROXIED),
    ("worker-forgets", PROXIED, PROXIED, PROXIED),
    ("worker-closes", PROXIED, PROXIED, PROXIED),
    ("threads", None, PASSED, None),
    # Privileges, root directory and network namespaces.
    ("capabilities", PROXIED, PROXIED, PROXIED),
    ("user", PROXIED, PROXIED, PROXIED),
    ("user-with-capabilities", PROXIED, PASSED, PASSED),
    ("chroot", PROXIED, PASSED, PROXIED),
    ("other-network", PROXIED, PASSED, PASSED),
    ("other-network-without-capability", PROXIED, PASSED, PROXIED),
    ("network-is-gone", PASSED, PASSED, PASSED),
    # The program closes descriptors.
    ("closefrom", PROXIED, PASSED, DROPPED),
    ("reused", PROXIED, PASSED, DROPPED),
    ("reused-blocking", PROXIED, PASSED, DROPPED),
    ("reused-netlink", PROXIED, PASSED, DROPPED),
    ("reused-anonymous", PROXIED, PASSED, DROPPED),
    # The program ignores SIGCHLD.
    ("sigchld-ignored", PROXIED, PROXIED, PROXIED),
]


def server():
    """Replies "passed", by TCP and UDP, over IPv4 and IPv6."""

    def serve_tcp(listener):
        while True:
            connection, _ = listener.accept()
            connection.sendall(b"passed")
            connection.close()

    def serve_udp(receiver):
        while True:
            _, client = receiver.recvfrom(100)
            receiver.sendto(b"passed", client)

    for family, address in SERVERS:
        listener, receiver = socket.socket(family), socket.socket(family, socket.SOCK_DGRAM)
        listener.bind(address)
        listener.listen(64)
        receiver.bind(address)
        threading.Thread(target=serve_tcp, args=(listener,), daemon=True).start()
        threading.Thread(target=serve_udp, args=(receiver,), daemon=True).start()


def ask(family, kind, address, patience):
    with socket.socket(family, kind) as client:
        client.settimeout(patience)
        try:
            client.connect(address)
            if kind == socket.SOCK_STREAM:
                return client.recv(100).decode()
            # A datagram may be lost on a busy machine.
            client.settimeout(limit(0.5))
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline:
                client.send(b"?")
                try:
                    return client.recv(100).decode()
                except TimeoutError:
                    pass
            return DROPPED
        except TimeoutError:
            return DROPPED


def look(case, expected):
    """Returns the common result of connections and datagrams of both families."""
    if expected is None:
        return
    # Long enough for a connection with one retransmission of the first packet.
    patience = limit(2) if expected == DROPPED else demo.PATIENCE
    asked = [(family, kind, address, patience) for family, address in SERVERS for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)]
    with concurrent.futures.ThreadPoolExecutor(len(asked)) as threads:
        seen = list(threads.map(lambda question: on("client", lambda: ask(*question)), asked))
    assert seen == [expected] * len(seen), f"{case}: the client saw {seen} by TCP and UDP, IPv4 and IPv6; not {expected}"


def left_behind(process):
    """Kills the orphans of the program. They are children of this process, the first of its PID namespace."""
    while True:
        try:
            os.waitpid(-process.pid, 0)
        except ChildProcessError:
            return


def try_to_install(program, backend):
    environment = {**os.environ, "PORT": "3130"}
    return on("proxy", lambda: subprocess.run([program, "exit", backend], stdin=subprocess.DEVNULL, env=environment,
                                              capture_output=True, text=True, check=False).stdout)


def run(program, scenario, backend, first, then):
    case = f"{scenario} with {backend}"
    process = on("proxy", lambda: subprocess.Popen([program, scenario, backend], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                                   start_new_session=True, text=True))
    overdue = threading.Timer(LONG, os.killpg, (process.pid, signal.SIGKILL))
    overdue.start()
    try:
        said = process.stdout.readline().strip()
        assert said == "ready", f"{case}: {said}"
        look(case, first)
        process.stdin.write("\n")
        process.stdin.flush()
        if scenario in ("sigkill", "exit"):
            process.wait(demo.PATIENCE)
        elif scenario == "threads":
            orphans = [process.stdout.readline().strip() for _ in range(10)]
            assert orphans == ["orphan"] * 10, f"{case}: {orphans}"
        else:
            said = process.stdout.readline().strip()
            assert said == "done", f"{case}: {said}"
        look(case, then)
        if scenario in ("prefork", "parent-closes"):
            # The kernel keeps the table as long as a process has the socket. An error message at a restart names the process.
            tried = try_to_install(program, backend)
            assert "errno 16" in tried and "forked from process" in tried, f"{case}: {tried}"
            opener = f"process {process.pid}, which installed them and has ended or closed its descriptors"
            assert opener in tried, f"{case}: {tried}"
    finally:
        overdue.cancel()
        process.stdin.close()
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
        left_behind(process)
    on("proxy", lambda: subprocess.run([tproxyctl, "purge"], check=True))
    rules = on("proxy", lambda: demo.run("ip", "rule") + demo.run("ip", "-6", "rule"))
    assert "proto 116" not in rules, f"{case}: after a purge there are still {rules}"
    look(f"{case}, after the end", PASSED)
    print(f"{case}: {first or '-'}, then {then}", flush=True)


def has_a_second_user():
    with open("/proc/self/uid_map", encoding="ascii") as file:
        return any(int(first) <= 1 < int(first) + int(count) for first, _, count in map(str.split, file))


def test(examples, program, *chosen):
    global tproxyctl
    tproxyctl = os.path.join(os.path.dirname(examples), "stage", "bin", "tproxyctl")
    hosts.meet()
    on("server", server)
    for scenario, first, then, by_iptables in ROWS:
        if chosen and scenario not in map(os.path.basename, chosen):
            continue
        if scenario.startswith("user") and not has_a_second_user():
            print(f"{scenario}: not run, since this user namespace has one user only; needs root")
            continue
        run(program, scenario, "nft", first, then)
        run(program, scenario, "iptables", first, by_iptables)


if __name__ == "__main__":
    hosts.alone(__file__, test)
