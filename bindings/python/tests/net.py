"""Network namespaces joined by veth pairs, and what clients and servers do in them."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Callable, NamedTuple, TypeVar

import tproxy

T = TypeVar("T")


def limit(seconds: float) -> float:
    """A time limit, multiplied by TPROXY_TEST_TIME_FACTOR (CONTRIBUTING.md)."""
    return seconds * float(os.environ.get("TPROXY_TEST_TIME_FACTOR", "1"))


# How long a test waits for an event that must happen. A test that passes does not wait so long.
PATIENCE = limit(20)
CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def _system(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def drop_capabilities() -> None:
    """Drops the capabilities of this thread for good."""
    # capset(2), version 3: nothing effective, permitted or inheritable.
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    _system(_libc.capset(header, nothing))


class Running(threading.Thread):
    """A function that runs in a thread, and its result."""

    def __init__(self, body: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._body = body
        self._value: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._value = self._body()
        except BaseException as error:  # result() raises it.
            self._error = error

    def result(self, timeout: float | None = None) -> Any:
        timeout = limit(120) if timeout is None else timeout
        self.join(timeout)
        if self.is_alive():
            raise AssertionError(f"not done within {timeout} s")
        if self._error:
            try:
                raise self._error
            finally:
                self._error = None
        return self._value


class Net:
    """A network namespace; it ends when its descriptor and its last thread do."""

    def __init__(self) -> None:
        def make() -> int:
            _system(_libc.unshare(CLONE_NEWNET))
            return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

        self._fd: int = Running(make).result()
        # Without duplicate address detection an address is usable at once.
        self.sysctl("ipv6/conf/default/accept_dad", "0")
        self.ip("link set lo up")

    def __enter__(self) -> Net:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def start(self, body: Callable[[], Any]) -> Running:
        """Runs a function in this namespace, in a thread."""

        def inside() -> Any:
            _system(_libc.setns(self._fd, CLONE_NEWNET))
            return body()

        return Running(inside)

    def run(self, body: Callable[[], T]) -> T:
        """Runs a function in this namespace, and waits for its result."""
        result: T = self.start(body).result()
        return result

    def command(self, *command: str, text: str | None = None) -> str:
        def inside() -> str:
            done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=limit(60))
            assert done.returncode == 0, f"{command}: {done.stderr}"
            return done.stdout

        return self.run(inside)

    def ip(self, *lines: str) -> None:
        self.command("ip", "-batch", "-", text="\n".join(lines) + "\n")

    def sysctl(self, name: str, value: str) -> None:
        def inside() -> None:
            with open(f"/proc/sys/net/{name}", "w", encoding="ascii") as file:
                file.write(value)

        self.run(inside)

    @property
    def path(self) -> str:
        """By which `ip link ... netns` finds it."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def wait_for_ipv6(self, interface: str) -> None:
        """Waits until an interface has its link-local address: before that it answers to none of its IPv6 addresses."""

        def ready() -> bool:
            with open("/proc/thread-self/net/if_inet6", encoding="ascii") as file:
                fields = [line.split() for line in file]
            flags = [(address, int(flags, 16)) for address, _, _, _, flags, name in fields if name == interface]
            tentative = 0x40
            return any(a.startswith("fe80") for a, _ in flags) and not any(f & tentative for _, f in flags)

        def wait() -> None:
            deadline = time.monotonic() + PATIENCE
            while not ready():
                assert time.monotonic() < deadline, f"{interface} has no IPv6"
                time.sleep(0.01)

        self.run(wait)

    def state(self) -> list[str]:
        """Everything that rules could have changed here, except routes that the kernel adds by itself."""
        routes = [
            line
            for family in ("-4", "-6")
            for line in self.command("ip", family, "route", "show", "table", "all").splitlines()
            if "proto kernel" not in line
        ]
        rules = [self.command("ip", family, "rule") for family in ("-4", "-6")]
        return [self.command("nft", "list", "tables"), *rules, *routes]


MACS = ("02:00:00:00:00:0a", "02:00:00:00:00:0b")


def link(a: Net, a_name: str, a_addrs: list[str], b: Net, b_name: str, b_addrs: list[str]) -> None:
    """Joins two hosts by a veth pair."""
    a.ip(f"link add {a_name} address {MACS[0]} type veth peer name {b_name} address {MACS[1]} netns {b.path}")
    for net, name, addrs, others, mac in (
        (a, a_name, a_addrs, b_addrs, MACS[1]),
        (b, b_name, b_addrs, a_addrs, MACS[0]),
    ):
        net.ip(
            *(f"addr add {addr} dev {name}" for addr in addrs),
            f"link set {name} up",
            # Neighbor discovery may take a second.
            *(f"neigh add {other.split('/')[0]} lladdr {mac} dev {name}" for other in others),
        )


class Hosts(NamedTuple):
    """One address of each host of a lab."""

    client: str
    proxy: str
    server: str

    @property
    def family(self) -> socket.AddressFamily:
        return socket.AF_INET6 if ":" in self.server else socket.AF_INET

    @property
    def any(self) -> str:
        return "::" if ":" in self.server else "0.0.0.0"


V4 = Hosts("198.51.100.2", "198.51.100.1", "203.0.113.2")
V6 = Hosts("2001:db8:1::2", "2001:db8:1::1", "2001:db8:2::2")


class Lab:
    """client --- proxy --- server. The proxy's host is a router, and forwards what it does not intercept."""

    def __init__(self) -> None:
        self.client, self.proxy, self.server = Net(), Net(), Net()
        link(
            self.client, "eth0", [V4.client + "/24", V6.client + "/64"],
            self.proxy, "eth0", [V4.proxy + "/24", V6.proxy + "/64"],
        )  # fmt: skip
        link(
            self.proxy, "eth1", ["203.0.113.1/24", "2001:db8:2::1/64"],
            self.server, "eth0", [V4.server + "/24", V6.server + "/64"],
        )  # fmt: skip
        self.client.ip(f"route add default via {V4.proxy}", f"route add default via {V6.proxy}")
        self.server.ip("route add default via 203.0.113.1", "route add default via 2001:db8:2::1")
        for net, name in ((self.client, "eth0"), (self.proxy, "eth0"), (self.proxy, "eth1"), (self.server, "eth0")):
            net.wait_for_ipv6(name)
        self.proxy.sysctl("ipv4/ip_forward", "1")
        self.proxy.sysctl("ipv6/conf/all/forwarding", "1")

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        for net in (self.client, self.proxy, self.server):
            net.__exit__()

    @contextmanager
    def serving(self, port: int, connections: int = 1) -> Iterator[Running]:
        """The server answers this many connections with the client's address; the result is the addresses."""
        listener = self.server.run(lambda: tcp_listener(port))

        def serve() -> list[str]:
            return [answer_one(listener) for _ in range(connections)]

        with listener:
            yield Running(serve)

    def ask(self, host: str, port: int) -> Heard:
        """The client connects, sends a request and reads the reply."""
        return self.client.run(lambda: ask(host, port))


class Heard(NamedTuple):
    #: The address of the client's socket.
    client: tuple[str, int]
    answer: str


def tcp_listener(port: int) -> socket.socket:
    """An ordinary server of both families."""
    listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    listener.settimeout(PATIENCE)
    return listener


def plain(address: tproxy.SockAddr) -> tuple[str, int]:
    """Host and port; an IPv4-mapped address as an IPv4 address."""
    host = address[0]
    return (host[len("::ffff:") :] if host.startswith("::ffff:") else host, address[1])


def read_all(stream: socket.socket) -> bytes:
    data = b""
    while more := stream.recv(65536):
        data += more
    return data


def answer_one(listener: socket.socket) -> str:
    stream, peer = listener.accept()
    with stream:
        stream.settimeout(PATIENCE)
        words = read_all(stream).decode()
        stream.sendall(f"seen {plain(peer)[0]}, heard {words}".encode())
    return plain(peer)[0]


def ask(host: str, port: int, words: bytes = b"who am I?") -> Heard:
    with socket.create_connection((host, port), PATIENCE) as stream:
        stream.sendall(words)
        stream.shutdown(socket.SHUT_WR)
        return Heard(plain(stream.getsockname()), read_all(stream).decode())


def relay(client: socket.socket, server: socket.socket) -> None:
    """Sends the whole request of the client to the server, and then the whole reply back."""
    server.sendall(read_all(client))
    server.shutdown(socket.SHUT_WR)
    client.sendall(read_all(server))


def udp_client(host: str, port: int, words: bytes = b"query", count: int = 1) -> list[bytes]:
    """Sends datagrams from a connected socket, which receives only from its peer; gives the replies."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(PATIENCE)
        sock.connect((host, port))
        for _ in range(count):
            sock.send(words)
        return [sock.recv(65535) for _ in range(count)]
