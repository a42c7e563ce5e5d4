"""asyncio: servers, connections and datagrams, cancelled, closed, and many at once."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import socket
import ssl
import threading
import weakref
from collections.abc import Coroutine
from typing import Any, Callable

import pytest
from net import PATIENCE, V4, Hosts, Lab, Net, Running, plain, udp_client

import tproxy
from tproxy import RulesFlag, SocketFlag


def start(net: Net, coroutine: Callable[[], Coroutine[Any, Any, Any]]) -> Running:
    """Runs a loop on a host in debug mode, which reports calls that block or are not awaited."""
    return net.start(lambda: asyncio.run(asyncio.wait_for(coroutine(), PATIENCE), debug=True))


def run(net: Net, coroutine: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return start(net, coroutine).result()


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.write_eof()


def test_start_server_and_open_connection_from_proxy_many_connections(lab: Lab, hosts: Hosts) -> None:
    """start_server and open_connection_from, with several connections at a time."""
    connections = 8
    ready = threading.Event()

    async def proxy() -> list[tuple[str, int]]:
        seen: list[tuple[str, int]] = []
        done = asyncio.Event()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, to: tproxy.SockAddr) -> None:
            client = writer.get_extra_info("peername")
            from_server, to_server = await tproxy.open_connection_from(client, to, flags=SocketFlag.KEEP_PORT)
            assert plain(to_server.get_extra_info("sockname")) == plain(client)
            await asyncio.gather(pump(reader, to_server), pump(from_server, writer))
            for stream in (writer, to_server):
                stream.close()
                await stream.wait_closed()
            seen.append(plain(to))
            if len(seen) == connections:
                done.set()

        async with await tproxy.start_server(handle, "[::]:3129") as server:
            with tproxy.install_rules(listeners=server.sockets, ports=[80]):
                ready.set()
                await done.wait()
        return seen

    with lab.serving(80, connections) as server:
        proxied = start(lab.proxy, proxy)
        assert ready.wait(PATIENCE)
        asking = [Running(lambda: lab.ask(hosts.server, 80)) for _ in range(connections)]
        for one in asking:
            assert one.result().answer == f"seen {hosts.client}, heard who am I?"
        assert proxied.result() == [(hosts.server, 80)] * connections
        assert server.result() == [hosts.client] * connections


def test_start_server_handler_is_kept_after_client_closed_its_direction(net: Net) -> None:
    """Only its own future refers to the handler then; the garbage collector must not take it."""

    async def main() -> bytes:
        answer = asyncio.Event()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: tproxy.SockAddr) -> None:
            await reader.read()
            got: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            wake.append(weakref.ref(got))
            answer.set()
            await got
            writer.write(b"late")
            await writer.drain()
            writer.close()
            await writer.wait_closed()

        wake: list[weakref.ref[asyncio.Future[None]]] = []
        async with await tproxy.start_server(handle, "127.0.0.1:0") as server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write_eof()
            await answer.wait()
            gc.collect()
            got = wake[0]()
            assert got is not None, "the handler was collected"
            got.set_result(None)
            del got
            heard = await reader.read()
            writer.close()
            await writer.wait_closed()
            return heard

    assert run(net, main) == b"late"


def test_start_server_with_redirect_listener_closes_direct_connection(lab: Lab) -> None:
    """An ordinary listener. A connection that was not intercepted is closed, and reported to the loop."""
    ready = threading.Event()

    async def proxy() -> tuple[Any, list[Any]]:
        loop = asyncio.get_running_loop()
        complaints: list[Any] = []
        loop.set_exception_handler(lambda _, context: complaints.append(context["exception"]))
        seen: asyncio.Future[Any] = loop.create_future()

        def handle(_: asyncio.StreamReader, writer: asyncio.StreamWriter, to: tproxy.SockAddr) -> None:
            writer.write(b"hello")
            writer.close()
            seen.set_result(to)

        listener = socket.create_server(("0.0.0.0", 3129))
        server = await tproxy.start_server(handle, sock=listener)
        async with server:
            with tproxy.install_rules(
                listeners=server.sockets, ports=[80], flags=RulesFlag.REDIRECT | RulesFlag.ALLOW_DIRECT
            ):
                ready.set()
                await asyncio.to_thread(heard.wait)
                return await seen, complaints

    heard = threading.Event()
    proxied = start(lab.proxy, proxy)
    assert ready.wait(PATIENCE)

    def connect(host: str, port: int) -> bytes:
        with socket.create_connection((host, port), PATIENCE) as sock:
            return sock.recv(10)

    assert lab.client.run(lambda: connect(V4.proxy, 3129)) == b""
    assert lab.client.run(lambda: connect(V4.server, 80)) == b"hello"
    heard.set()
    to, complaints = proxied.result()
    assert to == (V4.server, 80)
    assert [type(complaint) for complaint in complaints] == [type(tproxy.Error(errno.ENOENT, ""))]


def test_start_server_with_bad_arguments_is_refused(net: Net) -> None:
    async def main() -> None:
        def handle(*_: object) -> None:
            raise AssertionError("nobody connects")

        for arguments in ({}, {"addr": "[::]:1", "sock": socket.socket}):
            with pytest.raises(ValueError, match="one of addr and sock"):
                await tproxy.start_server(handle, **arguments)  # type: ignore[arg-type]
        server = await tproxy.start_server(handle, ("127.0.0.1", 0), start_serving=False)
        assert not server.is_serving()
        with pytest.raises(tproxy.Error) as taken:
            await tproxy.start_server(handle, server.sockets[0].getsockname())
        assert taken.value.errno == errno.EADDRINUSE
        server.close()
        await server.wait_closed()

    run(net, main)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_open_connection_from_that_fails_leaves_no_descriptor(net: Net, host: str) -> None:
    async def main() -> None:
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(ConnectionRefusedError) as refused:
            await tproxy.open_connection_from(host, (host, 9))
        assert isinstance(refused.value, tproxy.Error)
        with pytest.raises(ValueError, match="datagrams"):
            await tproxy.open_connection_from(host, (host, 9), flags=SocketFlag.DGRAM)
        with pytest.raises(tproxy.Error) as unreachable:
            await tproxy.open_connection_from(host, ("192.0.2.1" if ":" not in host else "2001:db8::1", 9))
        assert unreachable.value.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINVAL)
        assert len(os.listdir("/proc/self/fd")) == before

    run(net, main)


def test_open_connection_from_cancelled_leaves_no_descriptor(lab: Lab, hosts: Hosts) -> None:
    """No host replies. The loop goes on meanwhile, and nothing is left."""
    lab.server.ip("route del default", "route del default via 2001:db8:2::1")

    async def main() -> None:
        before = len(os.listdir("/proc/self/fd"))
        connecting = asyncio.ensure_future(tproxy.open_connection_from(hosts.client, (hosts.server, 80)))
        for _ in range(20):
            await asyncio.sleep(0.005)
        assert not connecting.done()
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(tproxy.open_connection_from(hosts.client, (hosts.server, 80)), 0.05)
        assert len(os.listdir("/proc/self/fd")) == before

    run(lab.proxy, main)


def test_start_server_and_open_connection_from_cancelled_at_any_step_leave_nothing(net: Net) -> None:
    """Nothing is left, and the loop does not confuse a new socket with a closed one of the same number."""

    async def nothing(*_: object) -> None:
        raise AssertionError("nobody connects")

    async def cancelled_after(steps: int, to: tuple[str, int]) -> int:
        done = 0
        for coroutine in (
            tproxy.start_server(nothing, ("127.0.0.1", 0)),
            tproxy.open_connection_from("127.0.0.1", to),
            tproxy.open_connection_from("127.0.0.1", to, ssl=ssl.create_default_context(), server_hostname="x.example"),
        ):
            task: asyncio.Task[Any] = asyncio.ensure_future(coroutine)
            for _ in range(steps):
                await asyncio.sleep(0)
            if task.done():
                done += 1
                result = task.result()
                server_or_writer = result[1] if isinstance(result, tuple) else result
                server_or_writer.close()
                await server_or_writer.wait_closed()
                continue
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        return done

    async def main() -> None:
        # A listener that accepts and sends nothing.
        with socket.create_server(("127.0.0.1", 0)) as silent:
            to = silent.getsockname()
            before = len(os.listdir("/proc/self/fd"))
            most = 0
            for steps in range(12):
                most = max(most, await cancelled_after(steps, to))
                # New sockets get the numbers of the closed ones.
                connections = [await tproxy.open_connection_from("127.0.0.1", to) for _ in range(3)]
                for _, writer in connections:
                    writer.close()
                    await writer.wait_closed()
            assert most == 2, "only the TLS handshake waits forever"
            await asyncio.sleep(0.01)
            assert len(os.listdir("/proc/self/fd")) == before

    run(net, main)


def test_open_datagram_endpoint_replies_to_clients(lab: Lab, hosts: Hosts) -> None:
    """The client's socket is connected, and receives only from the server's address."""
    ready = threading.Event()

    async def echo() -> set[tuple[str, int]]:
        seen = set()
        async with await tproxy.open_datagram_endpoint("[::]:3053") as endpoint:
            with tproxy.install_rules(listeners=[endpoint.socket], ports=[53]):
                ready.set()
                answered = 0
                async for data, client, to in endpoint:
                    assert to
                    assert plain(client)[0] == hosts.client
                    seen.add(plain(to))
                    await endpoint.reply(data.upper(), client, to)
                    answered += 1
                    if answered == 30:
                        return seen
        raise AssertionError("it ended by itself")

    echoing = start(lab.proxy, echo)
    assert ready.wait(PATIENCE)
    asking = [lab.client.start(lambda: udp_client(hosts.server, 53, b"shout", count=10)) for _ in range(3)]
    for one in asking:
        assert one.result() == [b"SHOUT"] * 10
    assert echoing.result() == {(hosts.server, 53)}


def test_datagram_endpoint_recv_cancelled_or_closed_loses_nothing(net: Net) -> None:
    async def main() -> None:
        before = len(os.listdir("/proc/self/fd"))
        endpoint = await tproxy.open_datagram_endpoint("127.0.0.1:0", batch=2, size=100)
        to = endpoint.socket.getsockname()
        # Cancelled while it waits: the next one is not disturbed, and no datagram is lost.
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(endpoint.recv(), 0.05)
        waiting = [asyncio.ensure_future(endpoint.recv()) for _ in range(3)]
        await asyncio.sleep(0.01)
        waiting[0].cancel()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for words in (b"one", b"two", b"three", b"four", b"five"):
                sender.sendto(words, to)
            source = ("127.0.0.1", sender.getsockname()[1])
            assert await waiting[1] == (b"one", source, to)
            assert await waiting[2] == (b"two", source, to)
            assert [(await endpoint.recv())[0] for _ in range(3)] == [b"three", b"four", b"five"]
        with pytest.raises(asyncio.CancelledError):
            await waiting[0]
        # Closed while it waits.
        late = asyncio.ensure_future(endpoint.recv())
        everything = asyncio.ensure_future(collect(endpoint))
        await asyncio.sleep(0.01)
        endpoint.close()
        endpoint.close()
        with pytest.raises(tproxy.Error) as closed:
            await late
        assert closed.value.errno == errno.EBADF
        assert await everything == []
        assert len(os.listdir("/proc/self/fd")) == before

    async def collect(endpoint: tproxy.DatagramEndpoint) -> list[Any]:
        return [one async for one in endpoint]

    run(net, main)


def test_datagram_endpoint_recv_in_a_flood_lets_other_tasks_run(net: Net) -> None:
    async def main() -> int:
        endpoint = await tproxy.open_datagram_endpoint("127.0.0.1:0", batch=4)
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        busy = asyncio.ensure_future(other())
        for _ in range(100):
            endpoint.socket.sendto(b"x", endpoint.socket.getsockname())
        for _ in range(100):
            await endpoint.recv()
        busy.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await busy
        endpoint.close()
        return turns

    assert run(net, main) >= 25


def test_datagram_endpoint_reply_that_fails_raises(net: Net) -> None:
    async def main() -> None:
        async with await tproxy.open_datagram_endpoint("127.0.0.1:0") as endpoint:
            with pytest.raises(tproxy.Error) as refused:
                await endpoint.reply(b"x", "127.0.0.1:9", ("224.0.0.1", 53))
            assert refused.value.errno == errno.EADDRNOTAVAIL
        with pytest.raises(ValueError, match="closed"):
            await endpoint.reply(b"x", "127.0.0.1:9", "192.0.2.1:53")

    run(net, main)
