"""10,000 calls of each kind, including calls that fail, leave nothing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import sys
from collections.abc import Coroutine
from typing import Any, Callable, TypeVar

import pytest
from net import Net, limit

import tproxy
from tproxy import AddressSet, Batch, Datagram, Replier, RulesFlag

CALLS = 10_000

T = TypeVar("T")

pytestmark = pytest.mark.costly


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident() -> int:
    """The resident memory of this process in bytes."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def leaks_nothing(net: Net, call: Callable[[], Any], calls: int = CALLS) -> None:
    """Asserts that calls leave no descriptors, objects and memory, neither in Python nor in C."""

    def repeat() -> tuple[int, int, int, int]:
        # The first calls fill caches.
        for _ in range(100):
            call()
        gc.collect()
        before = (descriptors(), sys.getallocatedblocks(), len(gc.get_objects()), resident())
        for _ in range(calls):
            call()
        gc.collect()
        after = (descriptors(), sys.getallocatedblocks(), len(gc.get_objects()), resident())
        return tuple(b - a for a, b in zip(before, after))  # type: ignore[return-value]

    fds, blocks, objects, memory = net.start(repeat).result(limit(300))
    assert fds == 0, f"{fds} descriptors"
    # A leak would be one for each call; the test runner itself makes a few.
    assert blocks < calls // 4, f"{blocks} blocks of memory"
    assert objects < calls // 4, f"{objects} objects"
    # 100 bytes for each call, which includes memory of C.
    assert memory < 100 * CALLS, f"{memory} bytes"


def failing(call: Callable[[], Any]) -> Callable[[], None]:
    def expect() -> None:
        with contextlib.suppress(tproxy.Error):
            call()
            raise AssertionError("the call did not fail")

    return expect


def connected(net: Net, host: str) -> tuple[socket.socket, socket.socket, socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET

    def make() -> tuple[socket.socket, socket.socket, socket.socket]:
        listener = tproxy.listen((host, 0))
        client = socket.create_connection(listener.getsockname()[:2])
        accepted, _ = listener.accept()
        assert accepted.family == family
        return listener, client, accepted

    return net.run(make)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_orig_dst_leaks_nothing(net: Net, host: str) -> None:
    listener, client, accepted = connected(net, host)
    with listener, client, accepted:
        before = sys.getrefcount(accepted)
        leaks_nothing(net, lambda: tproxy.orig_dst(accepted))
        leaks_nothing(net, failing(lambda: tproxy.orig_dst(client)))
        assert sys.getrefcount(accepted) == before


def test_sockets_leak_nothing(net: Net) -> None:
    leaks_nothing(net, lambda: tproxy.socket(socket.AF_INET6, socket.SOCK_DGRAM).close())
    leaks_nothing(net, lambda: tproxy.listen("127.0.0.1:0").close())
    leaks_nothing(net, failing(lambda: tproxy.listen("127.0.0.1:0", flags=1 << 30)))
    leaks_nothing(net, failing(lambda: tproxy.connect_from("127.0.0.1", "127.0.0.1:9")))
    leaks_nothing(net, failing(lambda: tproxy.connect_from("127.0.0.1", "127.0.0.1:9", timeout=limit(1))))
    with net.run(lambda: socket.socket()) as sock:
        leaks_nothing(net, lambda: tproxy.set_transparent(sock))
        leaks_nothing(net, failing(lambda: tproxy.bind_nonlocal(sock, "[2001:db8::1]:80")))


def test_connect_from_leaks_nothing(net: Net) -> None:
    with net.run(lambda: tproxy.listen("[::1]:0", backlog=64)) as listener:
        to = listener.getsockname()

        def connect() -> None:
            with tproxy.connect_from("::1", to) as sock, listener.accept()[0]:
                # A reset leaves no port in TIME_WAIT.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

        leaks_nothing(net, connect)


def test_datagrams_leak_nothing(net: Net) -> None:
    def make() -> socket.socket:
        sock = tproxy.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("127.0.0.1", 0))
        return sock

    batch = Batch(4, 100)
    with net.run(make) as sock, net.run(Replier) as replier:
        to = sock.getsockname()

        def receive_one() -> None:
            sock.sendto(b"x", to)
            tproxy.recvfrom(sock, 100)

        def receive_batch() -> None:
            sock.sendto(b"x", to)
            for datagram in tproxy.recv_datagrams(sock, batch):
                bytes(datagram.data), datagram.client, datagram.orig_dst

        def reply() -> None:
            replier.reply(b"x", to, ("192.0.2.1", 5300))
            replier.send([Datagram(b"y", to, ("192.0.2.1", 5300))])
            sock.recv(10)
            sock.recv(10)

        before = sys.getrefcount(sock), sys.getrefcount(batch)
        for call in (receive_one, receive_batch, reply):
            leaks_nothing(net, call)
        leaks_nothing(net, failing(lambda: tproxy.recvfrom(sock, 100, socket.MSG_DONTWAIT)))
        leaks_nothing(net, failing(lambda: tproxy.recv_datagrams(sock, batch, socket.MSG_DONTWAIT)))
        leaks_nothing(net, failing(lambda: replier.reply(b"x", to, ("::1", 1))))
        assert (sys.getrefcount(sock), sys.getrefcount(batch)) == before
    leaks_nothing(net, lambda: Replier().close())
    leaks_nothing(net, lambda: Batch(2, 10), 2000)


def test_asyncio_leaks_nothing(net: Net) -> None:
    """Connections between a server and a client of ours, and datagrams there and back."""

    async def handle(_: asyncio.StreamReader, writer: asyncio.StreamWriter, __: tproxy.SockAddr) -> None:
        writer.close()
        await writer.wait_closed()

    async def connect() -> None:
        _, writer = await tproxy.open_connection_from("127.0.0.1", server.sockets[0].getsockname())
        # A reset leaves no port in TIME_WAIT.
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        writer.close()
        await writer.wait_closed()

    async def cancel() -> None:
        waiting = asyncio.ensure_future(endpoint.recv())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])

    async def echo() -> None:
        endpoint.socket.sendto(b"x", endpoint.socket.getsockname())
        data, client, _ = await endpoint.recv()
        await endpoint.reply(data, client, "192.0.2.1:5300")
        assert (await endpoint.recv())[1] == ("192.0.2.1", 5300)

    loop = asyncio.new_event_loop()

    def in_loop(coroutine: Coroutine[Any, Any, T]) -> T:
        return loop.run_until_complete(coroutine)

    with contextlib.closing(loop):
        endpoint = net.run(lambda: in_loop(tproxy.open_datagram_endpoint("127.0.0.1:0", batch=4, size=100)))
        for call in (echo, cancel):
            leaks_nothing(net, lambda call=call: in_loop(call()))  # type: ignore[misc]
        endpoint.close()
        server = net.run(lambda: in_loop(tproxy.start_server(handle, "127.0.0.1:0")))
        leaks_nothing(net, lambda: in_loop(connect()))
        server.close()
        net.run(lambda: in_loop(server.wait_closed()))


def test_rules_leak_nothing(net: Net) -> None:
    """Each costs the kernel a grace period or two: fewer of those that install."""
    config = tproxy.RulesConfig(listen_addr="[::]:3129", ports=[80, 443], dst=["10.0.0.0/8"], interfaces=["eth0"])
    with net.run(lambda: tproxy.install_rules(**config)) as rules:
        leaks_nothing(net, rules.stats, 2000)
        leaks_nothing(net, tproxy.read_stats, 2000)
        leaks_nothing(net, failing(lambda: tproxy.read_stats("nobody")))

        def update() -> None:
            rules.update(AddressSet.BYPASS, add=["10.1.0.0/16"])
            rules.update(AddressSet.BYPASS, remove=["10.1.0.0/16"])

        leaks_nothing(net, update, 100)
        leaks_nothing(net, failing(lambda: tproxy.install_rules(flags=1 << 30)))
        leaks_nothing(net, failing(lambda: rules.update(9)))
    leaks_nothing(net, lambda: tproxy.render_rules(**config))
    leaks_nothing(net, tproxy.check, 200)
    leaks_nothing(net, failing(tproxy.self_test))
    leaks_nothing(net, lambda: tproxy.self_test(**config), 100)
    leaks_nothing(net, lambda: tproxy.install_rules(flags=RulesFlag.DIVERT_ONLY).remove(), 100)
