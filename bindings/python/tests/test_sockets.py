"""Stream sockets: foreign addresses, original destinations, connections from foreign addresses."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import pickle
import signal
import socket
import threading
import time

import pytest
from net import PATIENCE, V4, Hosts, Lab, Net, drop_capabilities, plain, read_all, relay, udp_client

import tproxy
from tproxy import SocketFlag

TRANSPARENT = (socket.SOL_IP, 19)
FOREIGN = pytest.mark.parametrize("foreign", ["192.0.2.77", "2001:db8:ffff::77"])


def family_of(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_socket_is_transparent_and_of_pythons_type(net: Net, family: int, kind: int) -> None:
    with net.run(lambda: tproxy.socket(family, kind)) as sock:
        assert type(sock) is socket.socket
        assert (sock.family, sock.type, sock.gettimeout()) == (family, kind, None)
        assert sock.getsockopt(*TRANSPARENT) == 1
        assert not sock.get_inheritable()
        if family == socket.AF_INET6:
            assert sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 0


def test_socket_with_nonblock_does_not_wait(net: Net) -> None:
    with net.run(lambda: tproxy.socket(type=socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)) as sock:
        assert sock.gettimeout() == 0
        with pytest.raises(BlockingIOError):
            tproxy.recvfrom(sock, 100)


def test_socket_has_default_timeout(net: Net) -> None:
    socket.setdefaulttimeout(0.05)
    try:
        with net.run(lambda: tproxy.socket(type=socket.SOCK_DGRAM)) as sock:
            assert sock.gettimeout() == 0.05
            with pytest.raises(socket.timeout):
                tproxy.recvfrom(sock, 100)
    finally:
        socket.setdefaulttimeout(None)


@FOREIGN
def test_set_transparent_and_bind_nonlocal_bind_foreign_address(net: Net, foreign: str) -> None:
    with net.run(lambda: socket.socket(family_of(foreign))) as sock:
        with pytest.raises(OSError, match="assign requested") as refused:
            net.run(lambda: sock.bind((foreign, 8080)))
        assert refused.value.errno == errno.EADDRNOTAVAIL
        net.run(lambda: tproxy.set_transparent(sock))
        assert sock.getsockopt(*TRANSPARENT) == 1
        net.run(lambda: sock.bind((foreign, 8080)))
    with net.run(lambda: socket.socket(family_of(foreign))) as sock:
        net.run(lambda: tproxy.bind_nonlocal(sock.fileno(), (foreign, 8081)))
        assert sock.getsockname()[:2] == (foreign, 8081)


@FOREIGN
def test_listen_on_foreign_address_listens(net: Net, foreign: str) -> None:
    with net.run(lambda: tproxy.listen((foreign, 0))) as listener:
        assert type(listener) is socket.socket
        assert (listener.family, listener.type) == (family_of(foreign), socket.SOCK_STREAM)
        assert listener.getsockname()[0] == foreign
        assert listener.getsockname()[1] != 0
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
        assert listener.gettimeout() is None


def test_listen_with_flags_shares_port_and_does_not_wait(net: Net) -> None:
    flags = SocketFlag.NONBLOCK | SocketFlag.REUSEPORT
    with net.run(lambda: tproxy.listen("0.0.0.0:3129", flags=flags)) as first:
        with pytest.raises(BlockingIOError):
            first.accept()
        with net.run(lambda: tproxy.listen(("0.0.0.0", 3129), flags=flags, backlog=7)):
            pass
        with pytest.raises(tproxy.Error) as refused:
            net.run(lambda: tproxy.listen("0.0.0.0:3129"))
        assert refused.value.errno == errno.EADDRINUSE
        assert "0.0.0.0:3129" in str(refused.value)


ADDRESSES = [
    ("127.0.0.1:80", ("127.0.0.1", 80)),
    (("127.0.0.1", 80), ("127.0.0.1", 80)),
    ((ipaddress.ip_address("127.0.0.1"), 80), ("127.0.0.1", 80)),
    (ipaddress.ip_address("127.0.0.1"), ("127.0.0.1", 0)),
    ("127.0.0.1", ("127.0.0.1", 0)),
    ("[2001:db8::1]:80", ("2001:db8::1", 80, 0, 0)),
    ("[2001:db8::1]", ("2001:db8::1", 0, 0, 0)),
    ("2001:db8::1", ("2001:db8::1", 0, 0, 0)),
    (("2001:db8::1", 80), ("2001:db8::1", 80, 0, 0)),
    (("2001:db8::1", 80, 5, 0), ("2001:db8::1", 80, 5, 0)),
    (("fe80::1", 80, 0, 1), ("fe80::1", 80, 0, 1)),
    (("fe80::1%1", 80), ("fe80::1", 80, 0, 1)),
    ("[fe80::1%7]:80", ("fe80::1", 80, 0, 7)),
    ((ipaddress.IPv6Address("fe80::1%7"), 80), ("fe80::1", 80, 0, 7)),
    (ipaddress.ip_address("2001:db8::1"), ("2001:db8::1", 0, 0, 0)),
    ("::ffff:192.0.2.1", ("::ffff:192.0.2.1", 0, 0, 0)),
]


@pytest.mark.parametrize(("given", "meant"), ADDRESSES)
def test_addresses_are_encoded_and_decoded(given: tproxy.Address, meant: tproxy.SockAddr) -> None:
    """An encoded address is decoded in the form of Python's own sockets."""
    from tproxy._address import decode, encode

    place, size = encode(given)
    assert decode(place) == meant
    assert size == (16 if len(meant) == 2 else 28)


@pytest.mark.parametrize(
    "bad",
    [
        "localhost:80", "1.2.3.4:", "1.2.3.4:x", "1.2.3.4:65536", "[::1]80", "[::1", "", ("1.2.3.4", -1),
        ("1.2.3.4", 65536), ("::1", 1, 1 << 20, 0), ("::1", 1, 0, -1), ("::1", 1, 2), ("1.2.3", 1),
    ],
)  # fmt: skip
def test_listen_on_bad_address_is_value_error(net: Net, bad: tproxy.Address) -> None:
    with pytest.raises(ValueError, match=r"."):
        net.run(lambda: tproxy.listen(bad))


@pytest.mark.parametrize("bad", [80, None, (80, 80), [("::1", 1)]])
def test_listen_on_non_address_is_type_error(net: Net, bad: tproxy.Address) -> None:
    with pytest.raises(TypeError):
        net.run(lambda: tproxy.listen(bad))


def test_interception_proxies_with_port_of_client(lab: Lab, hosts: Hosts) -> None:
    """Intercepts, reads the original destination, and connects with the client's address and port."""

    def proxy() -> tuple[tproxy.SockAddr, tproxy.SockAddr]:
        with tproxy.listen("[::]:3129") as listener, tproxy.install_rules(listeners=[listener], ports=[80]):
            ready.set()
            listener.settimeout(PATIENCE)
            client, source = listener.accept()
            with client:
                to = tproxy.orig_dst(client)
                with tproxy.connect_from(source, to, flags=SocketFlag.KEEP_PORT, timeout=PATIENCE) as server:
                    assert plain(server.getsockname()) == plain(source)
                    relay(client, server)
            return source, to

    ready = threading.Event()
    with lab.serving(80) as server:
        proxied = lab.proxy.start(proxy)
        assert ready.wait(PATIENCE)
        heard = lab.ask(hosts.server, 80)
        source, to = proxied.result()
    assert heard.answer == f"seen {hosts.client}, heard who am I?"
    assert server.result() == [hosts.client]
    assert plain(source) == heard.client
    assert plain(to) == (hosts.server, 80)
    # Both addresses have the listener's family: IPv4-mapped, as accept() gives the client's.
    assert len(source) == len(to) == 4


def test_orig_dst_of_ipv4_listener_is_ipv4(lab: Lab) -> None:
    def proxy() -> tproxy.SockAddr:
        with tproxy.listen("0.0.0.0:3129") as listener, tproxy.install_rules(listeners=[listener], ports=[80]):
            ready.set()
            listener.settimeout(PATIENCE)
            with listener.accept()[0] as client:
                # Wait until the client closes.
                assert client.recv(1) == b""
                return tproxy.orig_dst(client)

    ready = threading.Event()
    proxied = lab.proxy.start(proxy)
    assert ready.wait(PATIENCE)
    lab.client.run(lambda: socket.create_connection(("203.0.113.2", 80), PATIENCE).close())
    assert proxied.result() == ("203.0.113.2", 80)


@pytest.mark.parametrize("dual", [False, True], ids=["of its family", "dual-stack"])
def test_orig_dst_of_redirected_connection_equals_tp_orig_dst(lab: Lab, hosts: Hosts, dual: bool) -> None:
    """An ordinary listener: connection tracking has the destination. The fast path equals tp_orig_dst."""
    family, any_host = (socket.AF_INET6, "::") if dual else (hosts.family, hosts.any)

    def proxy() -> list[tproxy.SockAddr]:
        with socket.socket(family) as listener:
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listener.bind((any_host, 3129))
            listener.listen()
            with tproxy.install_rules(listeners=[listener], ports=[80], flags=tproxy.RulesFlag.REDIRECT):
                ready.set()
                listener.settimeout(PATIENCE)
                with listener.accept()[0] as client:
                    found = [tproxy.orig_dst(client), by_the_library(client)]
                    relay_words = read_all(client)
                    client.sendall(b"redirected " + relay_words)
                    return found

    ready = threading.Event()
    proxied = lab.proxy.start(proxy)
    assert ready.wait(PATIENCE)
    assert lab.ask(hosts.server, 80).answer == "redirected who am I?"
    fast, slow = proxied.result()
    assert fast == slow
    assert plain(fast) == (hosts.server, 80)
    assert len(fast) == (4 if dual or hosts.family == socket.AF_INET6 else 2)


def by_the_library(sock: socket.socket) -> tproxy.SockAddr:
    """tp_orig_dst, without the fast path."""
    from ctypes import byref

    from tproxy import _ctypes as c
    from tproxy._address import decode
    from tproxy._errors import checked

    place, size = c.sockaddr_storage(), c.socklen_t(128)
    checked(c.tp_orig_dst(sock.fileno(), byref(place), byref(size)))
    found = decode(place)
    assert found
    return found


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_orig_dst_that_fails_equals_tp_orig_dst(net: Net, host: str) -> None:
    """The fast path fails with the errno and the message of tp_orig_dst, for every kind of socket."""
    with net.run(lambda: socket.create_server((host, 0), family=family_of(host))) as listener:
        client = net.run(lambda: socket.create_connection(listener.getsockname()[:2]))
        accepted, _ = listener.accept()
        wild = net.run(lambda: tproxy.listen(("::" if ":" in host else "0.0.0.0", 0)))
        transparent = net.run(lambda: tproxy.listen((host, 0)))
        fresh = net.run(lambda: tproxy.socket(family_of(host)))
        left, right = socket.socketpair()
        closed = socket.socket()
        closed.close()
        cases = (
            (accepted, errno.ENOENT),
            (client, errno.ENOENT),
            (wild, errno.ENOTCONN),
            (fresh, errno.ENOTCONN),
            (left, errno.EAFNOSUPPORT),
            (closed, errno.EBADF),
        )
        for sock, expected in cases:
            with pytest.raises(tproxy.Error) as fast:
                tproxy.orig_dst(sock)
            with pytest.raises(tproxy.Error) as slow:
                by_the_library(sock)
            assert fast.value.args == slow.value.args
            assert fast.value.errno == expected
        with pytest.raises(FileNotFoundError, match="not intercepted"):
            tproxy.orig_dst(accepted)
        # A transparent socket on an address: both give that address.
        assert tproxy.orig_dst(transparent) == by_the_library(transparent) == transparent.getsockname()
        for sock in (client, accepted, wild, transparent, fresh, left, right):
            sock.close()


@pytest.mark.parametrize("flags", [0, SocketFlag.TPROXY, SocketFlag.TPROXY | SocketFlag.NONBLOCK], ids=str)
def test_accept_intercepted_gives_client_and_destination(lab: Lab, hosts: Hosts, flags: int) -> None:
    def proxy() -> tuple[tproxy.SockAddr, tproxy.SockAddr]:
        with tproxy.listen("[::]:3129") as listener, tproxy.install_rules(listeners=[listener], ports=[80]):
            listener.settimeout(PATIENCE)
            ready.set()
            client, source, to = tproxy.accept(listener, flags=flags)
            with client:
                assert (client.getpeername(), client.getsockname()) == (source, to)
                assert client.family == socket.AF_INET6
                assert client.gettimeout() == (0 if flags & SocketFlag.NONBLOCK else None)
                client.setblocking(True)
                client.sendall(b"accepted " + read_all(client))
            return source, to

    ready = threading.Event()
    proxied = lab.proxy.start(proxy)
    assert ready.wait(PATIENCE)
    heard = lab.ask(hosts.server, 80)
    source, to = proxied.result()
    assert heard.answer == "accepted who am I?"
    assert tproxy.unmap_addr(source)[:2] == heard.client
    assert tproxy.unmap_addr(to)[:2] == (hosts.server, 80)


def test_accept_waits_by_the_timeout_of_the_listener(net: Net) -> None:
    with net.run(lambda: tproxy.listen("127.0.0.1:0")) as listener:
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            tproxy.accept(listener)
        listener.settimeout(0.05)
        with pytest.raises(socket.timeout):
            tproxy.accept(listener)
        for timeout in (PATIENCE, None):
            listener.settimeout(timeout)
            accepting = net.start(lambda: tproxy.accept(listener))
            client = net.run(lambda: socket.create_connection(listener.getsockname()))
            accepted, source, to = accepting.result()
            assert (source, to) == (client.getsockname(), listener.getsockname())
            client.close()
            accepted.close()


def test_accept_of_connection_that_was_not_intercepted_closes_it(net: Net) -> None:
    with net.run(lambda: socket.create_server(("127.0.0.1", 0))) as listener:
        client = net.run(lambda: socket.create_connection(listener.getsockname(), PATIENCE))
        with pytest.raises(FileNotFoundError, match="not intercepted") as refused:
            tproxy.accept(listener)
        assert isinstance(refused.value, tproxy.Error)
        assert client.recv(1) == b""
        client.close()


def test_listen_v6only_shares_port_with_ipv4(net: Net) -> None:
    with net.run(lambda: tproxy.listen("[::]:3129", flags=SocketFlag.V6ONLY)) as six:
        assert six.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1
        with net.run(lambda: tproxy.listen("0.0.0.0:3129")):
            pass


def test_connect_socket_keeps_options_and_connects_from_client(lab: Lab, hosts: Hosts) -> None:
    """A socket of each family that can: an AF_INET6 socket also connects between IPv4 addresses."""
    for family in {hosts.family, socket.AF_INET6}:
        for timeout in (None, PATIENCE):
            with lab.serving(80) as server:

                def connect() -> str:
                    with tproxy.install_rules(flags=tproxy.RulesFlag.DIVERT_ONLY):
                        with socket.socket(family) as sock:  # noqa: B023
                            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 7)
                            sock.settimeout(timeout)  # noqa: B023
                            tproxy.connect_socket(sock, (hosts.client, 4321), (hosts.server, 80))
                            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == 7
                            sock.sendall(b"hello")
                            sock.shutdown(socket.SHUT_WR)
                            return read_all(sock).decode()

                assert lab.proxy.run(connect) == f"seen {hosts.client}, heard hello"
                assert server.result() == [hosts.client]


def test_connect_from_same_port_in_use_is_eaddrinuse(net: Net) -> None:
    def connect() -> None:
        with tproxy.listen("127.0.0.1:0") as listener, tproxy.socket() as holder, socket.socket() as sock:
            tproxy.bind_nonlocal(holder, "192.0.2.1:4321")
            ends = ("192.0.2.1", 4321), listener.getsockname()
            for call in (
                lambda: tproxy.connect_from(*ends, flags=SocketFlag.SAME_PORT),
                lambda: tproxy.connect_socket(sock, *ends, flags=SocketFlag.SAME_PORT),
            ):
                with pytest.raises(tproxy.Error, match="in use") as refused:
                    call()
                assert refused.value.errno == errno.EADDRINUSE
            holder.close()
            tproxy.connect_socket(sock, ("127.0.0.1", 4321), listener.getsockname(), flags=SocketFlag.SAME_PORT)
            assert sock.getsockname() == ("127.0.0.1", 4321)

    net.run(connect)


def test_connect_socket_waits_by_its_timeout(lab: Lab, hosts: Hosts) -> None:
    """The server's host has no route back to this source."""
    lab.server.ip("route del default", "route del default via 2001:db8:2::1")

    def connect() -> None:
        for timeout in (0, 0.05):
            with socket.socket(hosts.family) as sock:
                sock.settimeout(timeout)
                with contextlib.ExitStack() as stack:
                    if timeout:
                        stack.enter_context(pytest.raises(socket.timeout))
                    tproxy.connect_socket(sock, hosts.client, (hosts.server, 80))
                assert sock.fileno() >= 0

    lab.proxy.run(connect)


@pytest.mark.parametrize("timeout", [None, PATIENCE])
def test_connect_socket_refused_or_bound_raises(net: Net, timeout: float | None) -> None:
    def connect() -> None:
        with socket.socket() as sock:
            sock.settimeout(timeout)
            with pytest.raises(ConnectionRefusedError):
                tproxy.connect_socket(sock, "127.0.0.1", "127.0.0.1:9")
            with pytest.raises(tproxy.Error, match="bound already") as refused:
                tproxy.connect_socket(sock, "127.0.0.1", "127.0.0.1:9")
            assert refused.value.errno == errno.EINVAL

    net.run(connect)


@pytest.mark.parametrize(
    ("addr", "expected"),
    [
        (("::ffff:192.0.2.1", 80, 0, 0), ("192.0.2.1", 80)),
        (("192.0.2.1", 80), ("192.0.2.1", 80)),
        (("fe80::1", 80, 0, 3), ("fe80::1", 80, 0, 3)),
    ],
)
def test_unmap_addr_converts_only_v4_mapped_addresses(addr: tproxy.SockAddr, expected: tproxy.SockAddr) -> None:
    assert tproxy.unmap_addr(addr) == expected


def test_connect_from_foreign_address_gets_replies(lab: Lab, hosts: Hosts) -> None:
    """Without interception, the divert rule delivers the replies."""
    with lab.serving(80) as server:

        def connect() -> str:
            with tproxy.install_rules(flags=tproxy.RulesFlag.DIVERT_ONLY):
                with tproxy.connect_from(hosts.client, (hosts.server, 80), timeout=PATIENCE) as stream:
                    assert stream.gettimeout() == PATIENCE
                    stream.sendall(b"hello")
                    stream.shutdown(socket.SHUT_WR)
                    return read_all(stream).decode()

        assert lab.proxy.run(connect) == f"seen {hosts.client}, heard hello"
        assert server.result() == [hosts.client]


def test_connect_from_datagram_exchanges_with_server(lab: Lab, hosts: Hosts) -> None:
    with lab.server.run(lambda: socket.socket(hosts.family, socket.SOCK_DGRAM)) as server:
        server.bind((hosts.server, 53))
        server.settimeout(PATIENCE)

        def query() -> bytes:
            with tproxy.install_rules(flags=tproxy.RulesFlag.DIVERT_ONLY, protocols=tproxy.Protocol.UDP):
                flags = SocketFlag.DGRAM | SocketFlag.KEEP_PORT
                with tproxy.connect_from((hosts.client, 4444), (hosts.server, 53), flags=flags) as sock:
                    assert (sock.family, sock.type) == (hosts.family, socket.SOCK_DGRAM)
                    sock.settimeout(PATIENCE)
                    sock.send(b"query")
                    return sock.recv(100)

        asked = lab.proxy.start(query)
        data, peer = server.recvfrom(100)
        assert (data, peer[:2]) == (b"query", (hosts.client, 4444))
        server.sendto(b"answer", peer)
        assert asked.result() == b"answer"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_connect_from_nonblocking_does_not_wait(net: Net, host: str) -> None:
    with net.run(lambda: tproxy.listen((host, 0))) as listener:
        to = listener.getsockname()
        with net.run(lambda: tproxy.connect_from(host, to, flags=SocketFlag.NONBLOCK)) as sock:
            assert sock.gettimeout() == 0
            listener.accept()[0].close()


@pytest.mark.parametrize("timeout", [None, PATIENCE])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_connect_from_refused_raises(net: Net, host: str, timeout: float | None) -> None:
    with pytest.raises(ConnectionRefusedError, match=r"refused") as refused:
        net.run(lambda: tproxy.connect_from(host, (host, 9), timeout=timeout))
    assert isinstance(refused.value, tproxy.Error)
    assert refused.value.errno == errno.ECONNREFUSED


def test_connect_from_times_out_raises(lab: Lab, hosts: Hosts) -> None:
    """The server's host has no route back to this source."""
    lab.server.ip("route del default", "route del default via 2001:db8:2::1")
    began = time.monotonic()
    with pytest.raises(socket.timeout):
        lab.proxy.run(lambda: tproxy.connect_from(hosts.client, (hosts.server, 80), timeout=0.2))
    assert 0.15 < time.monotonic() - began < PATIENCE


@pytest.mark.parametrize(("src", "dst"), [("127.0.0.1", ("::1", 80)), ("::1", ("127.0.0.1", 80))])
def test_connect_from_two_families_is_eafnosupport(net: Net, src: str, dst: tuple[str, int]) -> None:
    with pytest.raises(tproxy.Error) as refused:
        net.run(lambda: tproxy.connect_from(src, dst))
    assert refused.value.errno == errno.EAFNOSUPPORT


@pytest.mark.parametrize("flags", [-1, 1 << 32])
def test_flags_out_of_range_are_value_error(net: Net, flags: int) -> None:
    with pytest.raises(ValueError, match="flags"):
        net.run(lambda: tproxy.listen("127.0.0.1", flags=flags))
    with pytest.raises(ValueError, match="flags"):
        net.run(lambda: tproxy.connect_from("127.0.0.1", "127.0.0.1:9", flags=flags))


def test_error_has_class_of_oserror_and_pickles() -> None:
    """Every errno has the class that OSError gives it, and the error can be pickled."""
    for number in errno.errorcode:
        error = tproxy.Error(number, "a sentence")
        assert isinstance(error, type(OSError(number, "")))
        assert isinstance(error, tproxy.Error)
        assert (error.errno, error.strerror) == (number, "a sentence")
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), again.args) == (type(error), error.args)


def test_errors_have_errno_and_message(net: Net) -> None:
    with pytest.raises(tproxy.Error) as refused:
        net.run(lambda: tproxy.listen("127.0.0.1", flags=1 << 30))
    assert refused.value.errno == errno.EINVAL
    assert refused.value.strerror
    assert "flag" in refused.value.strerror
    with pytest.raises(tproxy.Error) as bad:
        tproxy.set_transparent(-1)
    assert bad.value.errno == errno.EBADF
    with pytest.raises(tproxy.Error) as bad:
        net.run(lambda: tproxy.socket(socket.AF_UNIX))
    assert bad.value.errno == errno.EAFNOSUPPORT


def test_calls_without_privilege_raise_permission_error(net: Net) -> None:
    """An ordinary user gets PermissionError, with a fix."""

    def powerless() -> None:
        drop_capabilities()
        for call in (
            tproxy.socket,
            tproxy.Replier,
            tproxy.purge_rules,
            tproxy.read_stats,
            lambda: tproxy.self_test(flags=tproxy.RulesFlag.DIVERT_ONLY),
            lambda: tproxy.listen("127.0.0.1"),
            lambda: tproxy.connect_from("127.0.0.1", "127.0.0.1:1"),
            lambda: tproxy.install_rules(flags=tproxy.RulesFlag.DIVERT_ONLY),
        ):
            with pytest.raises(PermissionError, match=r"CAP_(NET|SYS)_") as refused:
                call()
            assert isinstance(refused.value, tproxy.Error)

    net.run(powerless)


def test_connect_from_releases_the_gil_and_runs_signal_handlers(lab: Lab) -> None:
    """While connect waits in C, other threads run; a signal handler that returns does not end the wait."""
    lab.server.ip("route del default", "route del default via 2001:db8:2::1")
    lab.proxy.sysctl("ipv4/tcp_syn_retries", "1")
    seen = []
    signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    try:

        def connect() -> float:
            began = time.monotonic()
            with pytest.raises(OSError, match=r"timed out|[Nn]o route"):
                tproxy.connect_from(V4.client, (V4.server, 80))
            return time.monotonic() - began

        connecting = lab.proxy.start(connect)
        turns = 0
        while connecting.is_alive():
            turns += 1
            if turns == 10:
                assert connecting.ident
                signal.pthread_kill(connecting.ident, signal.SIGUSR1)
            time.sleep(0.01)
        waited = connecting.result()
        assert waited > 0.5
        # With the GIL held this thread would have had one turn or two.
        assert turns > 20
        assert seen
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_udp_client_helper_takes_replies_of_its_server_only(net: Net) -> None:
    """The helper uses a connected socket, which does not receive replies from other sources."""
    with pytest.raises(ConnectionRefusedError):
        net.run(lambda: udp_client("127.0.0.1", 9))
