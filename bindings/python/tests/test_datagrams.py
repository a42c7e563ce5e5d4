"""Datagrams: original destinations, batches, and replies from any source."""

from __future__ import annotations

import errno
import gc
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from net import PATIENCE, V4, Hosts, Lab, Net, plain, udp_client

import tproxy
from tproxy import Batch, Datagram, DatagramFlag, Protocol, Replier, ReplierFlag

UDP_GRO = 104


@contextmanager
def receiver(lab: Lab, host: str = "::", port: int = 3053) -> Iterator[socket.socket]:
    """A socket on the proxy's host for which datagrams to ports 53 and 54 are intercepted."""

    def make() -> socket.socket:
        sock = tproxy.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        tproxy.bind_nonlocal(sock, (host, port))
        sock.settimeout(PATIENCE)
        return sock

    with lab.proxy.run(make) as sock, lab.proxy.run(lambda: tproxy.install_rules(listeners=[sock], ports=[53, 54])):
        yield sock


def local(net: Net, host: str) -> socket.socket:
    """A transparent socket on loopback."""

    def make() -> socket.socket:
        sock = tproxy.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((host, 0))
        sock.settimeout(PATIENCE)
        return sock

    return net.run(make)


@pytest.mark.parametrize("dual", [False, True], ids=["of its family", "dual-stack"])
def test_recvfrom_and_reply_reach_the_client(lab: Lab, hosts: Hosts, dual: bool) -> None:
    with receiver(lab, "::" if dual else hosts.any) as sock:
        asking = lab.client.start(lambda: udp_client(hosts.server, 53))
        data, client, to = tproxy.recvfrom(sock, 2048)
        assert data == b"query"
        assert to
        assert plain(client)[0] == hosts.client
        assert plain(to) == (hosts.server, 53)
        assert len(client) == len(to) == (4 if dual or hosts.family == socket.AF_INET6 else 2)
        with lab.proxy.run(Replier) as replier:
            lab.proxy.run(lambda: replier.reply(b"answer", client, to))
            assert asking.result() == [b"answer"]
            stats = replier.stats()
            assert (stats.sent, stats.errors, stats.sockets) == (1, 0, 1)


def by_the_library(sock: socket.socket, size: int, flags: int = 0) -> tuple[bytes, object, object]:
    """tp_recvfrom itself."""
    import ctypes
    from ctypes import byref

    from tproxy import _ctypes as c
    from tproxy._address import decode
    from tproxy._errors import checked

    buffer, src, dst = ctypes.create_string_buffer(size), c.sockaddr_storage(), c.sockaddr_storage()
    src_size, dst_size = c.socklen_t(128), c.socklen_t(128)
    got = checked(
        c.tp_recvfrom(sock.fileno(), buffer, size, flags, byref(src), byref(src_size), byref(dst), byref(dst_size))
    )
    return buffer.raw[:got], decode(src), decode(dst)


@pytest.mark.parametrize(
    ("listen", "to"), [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("::", "127.0.0.1"), ("::", "::1")]
)
@pytest.mark.parametrize("extra", [False, True], ids=["", "with more control data"])
def test_recvfrom_equals_tp_recvfrom(net: Net, listen: str, to: str, extra: bool) -> None:
    """The fast path with Python's recvmsg gives the same results as tp_recvfrom."""
    with local(net, listen) as sock:
        if extra:
            sock.setsockopt(socket.SOL_SOCKET, 29, 1)  # SO_TIMESTAMP
            sock.setsockopt(socket.SOL_IP, 8, 1)  # IP_PKTINFO
            sock.setsockopt(socket.SOL_IP, 12, 1)  # IP_RECVTTL
            if ":" in listen:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        port = sock.getsockname()[1]
        family = socket.AF_INET6 if ":" in to else socket.AF_INET
        host = "::ffff:127.0.0.1" if (listen, to) == ("::", "127.0.0.1") else to
        with net.run(lambda: socket.socket(family, socket.SOCK_DGRAM)) as sender:
            for words, size, flags in ((b"words", 100, 0), (b"", 100, 0), (b"too long", 3, 0), (b"x" * 9000, 65535, 0)):
                for _ in range(2):
                    sender.sendto(words, (to, port))
                ours, library = tproxy.recvfrom(sock, size, flags), by_the_library(sock, size, flags)
                assert ours == library
                assert ours[0] == words[:size]
                assert ours[2] == (host, port, 0, 0)[: len(ours[1])]


def test_recvfrom_with_truncated_control_data_has_no_original_destination(net: Net) -> None:
    """A truncated address is dropped; the datagram is not lost."""

    class Cut(socket.socket):
        def recvmsg(self, bufsize: int, _: int = 0, flags: int = 0) -> Any:
            # Room for IP_PKTINFO, and for the header and 8 bytes of the other message.
            return super().recvmsg(bufsize, socket.CMSG_SPACE(12) + 16 + 8, flags)

    with Cut(fileno=local(net, "127.0.0.1").detach()) as sock:
        sock.setsockopt(socket.SOL_IP, 8, 1)
        sock.sendto(b"words", sock.getsockname())
        assert tproxy.recvfrom(sock, 100) == (b"words", sock.getsockname(), None)


def test_recvfrom_with_peek_and_dontwait_works(net: Net) -> None:
    with local(net, "127.0.0.1") as sock:
        with pytest.raises(BlockingIOError) as empty:
            tproxy.recvfrom(sock, 100, socket.MSG_DONTWAIT)
        assert isinstance(empty.value, tproxy.Error)
        assert empty.value.errno == errno.EAGAIN
        sock.sendto(b"to itself", sock.getsockname())
        assert tproxy.recvfrom(sock, 100, socket.MSG_PEEK) == tproxy.recvfrom(sock, 100)
        sock.sendto(b"to itself", sock.getsockname())
        assert tproxy.recvfrom(sock, 100, socket.MSG_DONTWAIT)[0] == b"to itself"
        sock.sendto(b"to itself", sock.getsockname())
        assert tproxy.recvfrom(sock, 100, socket.MSG_DONTWAIT)[0] == b"to itself"
        sock.settimeout(0.02)
        with pytest.raises(socket.timeout):
            tproxy.recvfrom(sock, 100)


def test_recvfrom_on_plain_socket_has_no_original_destination(net: Net) -> None:
    """No original destination: None, and the flag in a batch."""
    with net.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
        sock.bind(("127.0.0.1", 0))
        for _ in range(2):
            sock.sendto(b"words", sock.getsockname())
        assert tproxy.recvfrom(sock, 100) == (b"words", sock.getsockname(), None)
        (datagram,) = tproxy.recv_datagrams(sock, Batch(4, 100))
        assert datagram.flags == DatagramFlag.NO_ORIG_DST
        assert datagram.orig_dst is None
        assert datagram.client == sock.getsockname()


def test_recvfrom_that_fails_raises_error_of_errno(net: Net) -> None:
    """A pending ECONNREFUSED and a closed socket raise the class of their errno."""
    with local(net, "127.0.0.1") as sock:
        sock.connect(("127.0.0.1", 9))
        sock.send(b"nobody is there")
        with pytest.raises(ConnectionRefusedError, match="receiving datagrams") as refused:
            tproxy.recvfrom(sock, 100)
        assert isinstance(refused.value, tproxy.Error)
    with pytest.raises(tproxy.Error) as closed:
        tproxy.recvfrom(sock, 100)
    assert closed.value.errno == errno.EBADF
    with pytest.raises(tproxy.Error) as closed:
        tproxy.recv_datagrams(sock, Batch(1, 1))
    assert closed.value.errno == errno.EBADF


def test_recv_datagrams_and_send_reuse_a_batch(lab: Lab, hosts: Hosts) -> None:
    """The same batch receives again and again; each reply comes from the address that the client asked."""
    with receiver(lab) as sock, lab.proxy.run(Replier) as replier:
        batch = Batch(16, 512)
        assert len(batch) == 16
        for turn in range(3):
            asking = lab.client.start(lambda: udp_client(hosts.server, 53, b"a question", count=5))
            answered = 0
            while answered < 5:
                got = tproxy.recv_datagrams(sock, batch)
                assert all(one is batch[at] for at, one in enumerate(got))
                for datagram in got:
                    assert bytes(datagram.data) == b"a question"
                    assert datagram.orig_dst
                    assert plain(datagram.orig_dst) == (hosts.server, 53)
                    assert (datagram.flags, datagram.segment_len, datagram.error) == (0, 0, None)
                    assert [bytes(segment) for segment in datagram.segments] == [b"a question"]
                    datagram.data = f"answer {turn}".encode()
                answered += lab.proxy.run(lambda got=got: replier.send(got))  # type: ignore[misc]
            assert asking.result() == [f"answer {turn}".encode()] * 5
        assert replier.stats().sent == 15


def test_recv_datagrams_marks_truncated_and_empty(net: Net) -> None:
    with local(net, "::1") as sock:
        for words in (b"", b"much too long", b"fits"):
            sock.sendto(words, sock.getsockname())
        got = tproxy.recv_datagrams(sock, Batch(8, 4))
        assert [bytes(one.data) for one in got] == [b"", b"much", b"fits"]
        assert [one.flags for one in got] == [0, DatagramFlag.TRUNC, 0]
        assert [[bytes(part) for part in one.segments] for one in got] == [[b""], [b"much"], [b"fits"]]
        with pytest.raises(ValueError, match="too many"):
            got[0].data = b"12345"
        assert "12345" not in repr(got[0])
    with pytest.raises(ValueError, match="no batch"):
        Batch(0)
    with pytest.raises(ValueError, match="no batch"):
        Batch(1, -1)


def test_recv_datagrams_waits_as_long_as_the_timeout(net: Net) -> None:
    batch = Batch(2, 100)
    with local(net, "127.0.0.1") as sock:
        sock.settimeout(0.05)
        began = time.monotonic()
        with pytest.raises(socket.timeout):
            tproxy.recv_datagrams(sock, batch)
        assert time.monotonic() - began >= 0.04
        with pytest.raises(BlockingIOError):
            tproxy.recv_datagrams(sock, batch, socket.MSG_DONTWAIT)
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            tproxy.recv_datagrams(sock, batch)
        sock.settimeout(PATIENCE)
        late = threading.Timer(0.1, sock.sendto, (b"late", sock.getsockname()))
        late.start()
        assert bytes(tproxy.recv_datagrams(sock, batch)[0].data) == b"late"
        late.join()
        with pytest.raises(tproxy.Error) as refused:
            tproxy.recv_datagrams(sock, batch, socket.MSG_OOB)
        assert refused.value.errno == errno.EINVAL


@pytest.mark.parametrize("call", ["recvfrom", "recv_datagrams"])
def test_recvfrom_and_recv_datagrams_release_the_gil(net: Net, call: str) -> None:
    """While a thread waits in the kernel, another thread runs and sends what wakes it."""
    batch = Batch(1, 100)
    with local(net, "127.0.0.1") as sock:
        sock.setblocking(True)
        waits = {
            "recvfrom": lambda: tproxy.recvfrom(sock, 100)[0],
            "recv_datagrams": lambda: bytes(tproxy.recv_datagrams(sock, batch)[0].data),
        }
        waiting = net.start(waits[call])
        for _ in range(100):
            time.sleep(0.001)
        assert waiting.is_alive()
        sock.sendto(b"wake", sock.getsockname())
        assert waiting.result(PATIENCE) == b"wake"


def test_recv_datagrams_with_gro_gives_segments(net: Net) -> None:
    """A GSO batch arrives as one element with its segment length, and is split into segments."""
    with local(net, "127.0.0.1") as sock, net.run(Replier) as replier:
        sock.setsockopt(socket.SOL_UDP, UDP_GRO, 1)
        source = ("192.0.2.9", 53)
        parts = [bytes([at]) * 1000 for at in range(5)] + [b"end"]
        one = Datagram(b"".join(parts), sock.getsockname(), source, segment_len=1000)
        assert net.run(lambda: replier.send([one])) == 1
        got: list[bytes] = []
        batch = Batch(8, 65535)
        largest = 0
        while len(got) < len(parts):
            for datagram in tproxy.recv_datagrams(sock, batch):
                assert datagram.client == source
                largest = max(largest, datagram.segment_len)
                got += [bytes(segment) for segment in datagram.segments]
        assert got == parts
        assert largest == 1000


def test_replier_replies_from_any_source(net: Net) -> None:
    """Single replies, and iterables longer than a system call takes. A reply that fails does not stop the others."""
    with local(net, "127.0.0.1") as sock, net.run(Replier) as replier:
        to = sock.getsockname()
        good = [Datagram(f"{at}".encode(), to, (f"192.0.2.{at % 8 + 1}", 5300 + at % 4)) for at in range(150)]
        bad = Datagram(b"mixed", to, ("2001:db8::1", 53))
        assert net.run(lambda: replier.send(one for one in [bad, *good])) == 150
        assert bad.error is not None
        assert bad.error.errno == errno.EAFNOSUPPORT
        assert isinstance(bad.error, tproxy.Error)
        assert all(one.error is None for one in good)
        heard = {tproxy.recvfrom(sock, 100)[:2] for _ in good}
        assert heard == {(bytes(one.data), one.orig_dst) for one in good}
        for call, number in (
            (lambda: replier.reply(b"", to, ("2001:db8::1", 53)), errno.EAFNOSUPPORT),
            (lambda: replier.reply(b"", to, ("192.0.2.1", 0)), errno.EINVAL),
            (lambda: replier.reply(b"", to, ("224.0.0.1", 53)), errno.EADDRNOTAVAIL),
            (lambda: replier.reply(b"x" * 65600, to, ("192.0.2.1", 53)), errno.EMSGSIZE),
        ):
            with pytest.raises(tproxy.Error) as refused:
                net.run(call)
            assert refused.value.errno == number
        # Any buffer, with items of any size.
        for data in (bytearray(b"four"), memoryview(b"four"), memoryview(b"four").cast("H")):
            net.run(lambda data=data: replier.reply(data, to, "192.0.2.1:53"))  # type: ignore[misc]
            net.run(lambda data=data: replier.send([Datagram(data, to, "192.0.2.1:53")]))  # type: ignore[misc]
            assert tproxy.recvfrom(sock, 100) == tproxy.recvfrom(sock, 100) == (b"four", ("192.0.2.1", 53), to)
        stats = replier.stats()
        assert (stats.sent, stats.errors) == (156, 5)


def test_replier_with_raw_flag_sends_raw(lab: Lab) -> None:
    """RAW binds no port."""
    with receiver(lab) as sock:
        with lab.proxy.run(
            lambda: Replier(flags=ReplierFlag.RAW | ReplierFlag.NONBLOCK, max_sockets=4, idle_ms=10)
        ) as raw:
            asking = lab.client.start(lambda: udp_client(V4.server, 53))
            _, client, to = tproxy.recvfrom(sock, 100)
            assert to
            lab.proxy.run(lambda: raw.reply(b"raw", client, to))
            assert asking.result() == [b"raw"]
            assert raw.stats().raw == 1
    for bad in (1 << 30, ReplierFlag.RAW << 1):
        with pytest.raises(tproxy.Error) as refused:
            lab.proxy.run(lambda bad=bad: Replier(flags=bad))  # type: ignore[misc]
        assert refused.value.errno == errno.EINVAL
    with pytest.raises(ValueError, match="max_sockets"):
        Replier(max_sockets=1 << 32)


def test_replier_closed_raises(net: Net) -> None:
    replier = net.run(Replier)
    replier.close()
    replier.close()
    for call in (
        lambda: replier.reply(b"", "127.0.0.1:1", "127.0.0.1:2"),
        lambda: replier.send([Datagram(b"", "127.0.0.1:1", "127.0.0.1:2")]),
        replier.stats,
    ):
        with pytest.raises(ValueError, match="closed"):
            call()
    with pytest.warns(ResourceWarning, match="unclosed"):
        net.run(lambda: Replier() and None)
        gc.collect()


def test_install_rules_for_udp_and_tcp_intercepts_both(lab: Lab, hosts: Hosts) -> None:
    def stream() -> socket.socket:
        return tproxy.listen("[::]:3053")

    with receiver(lab, port=3054) as _, lab.proxy.run(stream) as listener:

        def both() -> tproxy.Rules:
            sock = tproxy.socket(socket.AF_INET6, socket.SOCK_DGRAM)
            tproxy.bind_nonlocal(sock, "[::]:3053")
            sock.settimeout(PATIENCE)
            received.append(sock)
            return tproxy.install_rules(name="both", listeners=[listener, sock], ports=[55])

        received: list[socket.socket] = []
        with lab.proxy.run(both):
            asking = lab.client.start(lambda: udp_client(hosts.server, 55))
            with received[0] as sock, lab.proxy.run(Replier) as replier:
                data, client, to = tproxy.recvfrom(sock, 100)
                assert to
                lab.proxy.run(lambda: replier.reply(data, client, to))
                assert asking.result() == [b"query"]
            lab.client.run(lambda: socket.create_connection((hosts.server, 55), PATIENCE).close())
            listener.settimeout(PATIENCE)
            listener.accept()[0].close()
    assert Protocol.TCP | Protocol.UDP == 3
