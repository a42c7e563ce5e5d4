"""Tests tcp_proxy under conditions that the demo does not have.

    tcp_proxy.py DIRECTORY-OF-THE-PROGRAMS

Runs in new namespaces, as the demo does. The exit status is not 0 if a test
fails.
"""

import os
import resource
import socket
import subprocess
import time

import hosts
from hosts import demo, limit, on

SERVER = ("203.0.113.2", 80)


def listen():
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Accepted sockets inherit the small buffer: a server that does not read soon stops its peer.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    listener.bind(SERVER)
    listener.listen(64)
    listener.settimeout(demo.PATIENCE)
    return listener


def cpu_seconds(pid):
    with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def half_closed_and_stuck(listener, proxy):
    """Both sides have sent their end of stream, and the server reads nothing. No byte can move, so the proxy must be idle."""
    client = on("client", lambda: socket.create_connection(SERVER, demo.PATIENCE))
    server, _ = listener.accept()
    server.shutdown(socket.SHUT_WR)
    assert client.recv(1) == b""
    sent = 0
    client.settimeout(limit(0.5))
    try:
        while sent < 200_000:
            sent += client.send(b"x" * 10_000)
    except TimeoutError:
        pass
    client.shutdown(socket.SHUT_WR)
    time.sleep(0.5)
    before = cpu_seconds(proxy.process.pid)
    time.sleep(limit(1))
    spent = cpu_seconds(proxy.process.pid) - before
    assert spent < limit(0.2), f"the proxy was busy for {spent:.2f} of {limit(1)} s with nothing to do"
    # The waiting data arrives when the server reads it.
    server.settimeout(demo.PATIENCE)
    got = 0
    while data := server.recv(65536):
        got += len(data)
    assert got == sent, f"{got} bytes of {sent} arrived"


def few_descriptors(listener, programs):
    """More clients than descriptors: each is served in turn, and none is refused."""
    descriptors = 18
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    command = ["sh", "-c", f'ulimit -n {descriptors}; exec "$0" "$@"', os.path.join(programs, "tcp_proxy"), "3129", "80"]
    proxy = demo.Program("proxy", *command)
    assert proxy.expect("listening") != "nothing"
    assert (soft, hard) == resource.getrlimit(resource.RLIMIT_NOFILE)
    clients = [on("client", lambda: socket.create_connection(SERVER, demo.PATIENCE)) for _ in range(24)]
    for client in clients:
        client.sendall(b"hello")
        client.shutdown(socket.SHUT_WR)
    for _ in clients:
        server, _ = listener.accept()
        server.settimeout(demo.PATIENCE)
        while server.recv(100):
            pass
        server.sendall(b"served")
        server.close()
    answers = [client.recv(100) for client in clients]
    assert answers == [b"served"] * len(clients), f"{answers.count(b'served')} of {len(clients)} clients were served"
    assert proxy.stop() == 0


def test(programs):
    for bad in (["3129"], ["3129", "80,443"], ["3129", "80-x"], ["68665", "80"], ["x", "80"], ["3129", "0"]):
        outcome = subprocess.run([os.path.join(programs, "tcp_proxy"), *bad], capture_output=True, check=False)
        assert outcome.returncode == 2, f"tcp_proxy {bad}: status {outcome.returncode}"
    listener = on("server", listen)
    proxy = demo.start_proxy(programs)
    assert proxy
    half_closed_and_stuck(listener, proxy)
    assert proxy.stop() == 0
    few_descriptors(listener, programs)


if __name__ == "__main__":
    hosts.alone(__file__, test)
