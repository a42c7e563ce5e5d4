"""What becomes of rules, and of traffic, when the program that installed them forks, ends, becomes a daemon, closes its
descriptors or drops its privileges.

    lifecycle.py DIRECTORY-OF-THE-EXAMPLES LIFECYCLE-PROGRAM

Runs itself in namespaces of its own, as the demo does. Exits non-zero with a sentence if something is not as it should be.
"""

import os
import signal
import socket
import subprocess
import sys
import threading

import hosts
from hosts import demo, limit, on

SERVER = ("203.0.113.2", 80)
PROXIED, PASSED, DROPPED = "proxied", "passed", "dropped"

# Scenario, what traffic sees while the program is ready, and what after its second half, by nf_tables and by iptables, whose
# chains no process owns: they stay until they are purged, and drop what finds no listener.
ROWS = [
    ("sigkill", PROXIED, PASSED, DROPPED),
    ("exit", PROXIED, PASSED, DROPPED),
    ("daemon", PROXIED, PASSED, None),
    ("double-fork", PROXIED, PASSED, PASSED),
    ("exec", PROXIED, PASSED, PASSED),
    ("prefork", PROXIED, PROXIED, PROXIED),
    ("parent-exit-handler", PROXIED, PASSED, PASSED),
    ("shared", PROXIED, PROXIED, PROXIED),
    ("worker-forgets", PROXIED, PROXIED, None),
    ("capabilities", PROXIED, PROXIED, None),
    ("chroot", PROXIED, PASSED, None),
    ("other-network", PROXIED, PASSED, PASSED),
    ("closefrom", PROXIED, PASSED, None),
    ("reused", PROXIED, PASSED, None),
    ("reused-blocking", PROXIED, PASSED, None),
    ("threads", None, PASSED, None),
    ("sigchld-ignored", PROXIED, PASSED, PASSED),
]


def server():
    listener = socket.socket()
    listener.bind(SERVER)
    listener.listen(64)

    def serve():
        while True:
            connection, _ = listener.accept()
            connection.sendall(b"passed")
            connection.close()

    threading.Thread(target=serve, daemon=True).start()
    return listener


def ask():
    with socket.socket() as client:
        # Long enough for a connection that comes about, and for one retransmission of the first packet.
        client.settimeout(demo.PATIENCE if expected_now != DROPPED else limit(2))
        try:
            client.connect(SERVER)
            return client.recv(100).decode()
        except TimeoutError:
            return DROPPED


expected_now = None


def look(case, expected):
    global expected_now
    expected_now = expected
    if expected is not None:
        seen = on("client", ask)
        assert seen == expected, f"{case}: the client saw {seen}, not {expected}"


def run(program, scenario, backend, first, then):
    case = f"{scenario} with {backend}"
    process = on("proxy", lambda: subprocess.Popen([program, scenario, backend], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                                   start_new_session=True, text=True))
    try:
        said = process.stdout.readline().strip()
        assert said == "ready", f"{case}: {said}"
        look(case, first)
        process.stdin.write("\n")
        process.stdin.flush()
        if scenario in ("sigkill", "exit"):
            process.wait(demo.PATIENCE)
        elif scenario == "threads":
            orphans = [process.stdout.readline().strip() for _ in range(20)]
            assert orphans == ["orphan"] * 20, f"{case}: {orphans}"
        else:
            said = process.stdout.readline().strip()
            assert said == "done", f"{case}: {said}"
        look(case, then)
        if scenario == "prefork":
            # The kernel keeps the table as long as a process has the socket; a restart says which one that is.
            tried = on("proxy", lambda: subprocess.run([program, "exit", backend], stdin=subprocess.DEVNULL,
                                                       env={**os.environ, "PORT": "3130"}, capture_output=True, text=True, check=False))
            assert "errno 16" in tried.stdout and "forked from process" in tried.stdout, f"{case}: {tried.stdout}"
            assert f"process {process.pid}, which installed them and has ended" in tried.stdout, f"{case}: {tried.stdout}"
    finally:
        process.stdin.close()
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
        try:
            # This process is the first of its PID namespace: what the program left behind became its children.
            while True:
                os.waitpid(-process.pid, 0)
        except ChildProcessError:
            pass
    if backend == "iptables" or scenario in ("chroot", "daemon", "double-fork"):
        on("proxy", lambda: subprocess.run([tproxyctl, "purge"], check=True))
    look(f"{case}, after the end", PASSED)
    print(f"{case}: {first or '-'}, then {then}")


def test(examples, program):
    global tproxyctl
    tproxyctl = os.path.join(os.path.dirname(examples), "stage", "bin", "tproxyctl")
    hosts.meet()
    listener = on("server", server)
    for scenario, first, then, by_iptables in ROWS:
        run(program, scenario, "nft", first, then)
        if by_iptables is not None:
            run(program, scenario, "iptables", first, by_iptables)
    listener.close()


if __name__ == "__main__":
    hosts.alone(__file__, test)
