"""Transparent servers, connections and datagrams for asyncio."""

from __future__ import annotations

import asyncio
import errno
import inspect
import socket as _socket
import ssl as _ssl
from collections import deque
from collections.abc import Awaitable
from typing import Any, Callable, Optional

from ._address import Address, SockAddr, encode, family_of
from ._datagrams import Batch, Buffer, Replier, recv_datagrams
from ._errors import Error
from ._flags import ReplierFlag, SocketFlag
from ._sockets import Flags, bind_nonlocal, connect_from, listen, orig_dst, raise_pending, socket

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter, SockAddr], Optional[Awaitable[None]]]

# asyncio references a handler by its connection, and a connection by the events that it waits for. After the end of
# stream, a connection waits for no event: without these references, its handler could be garbage-collected.
_HANDLING: set[asyncio.Task[None]] = set()

#: The limit of asyncio's own streams.
_LIMIT = 1 << 16


async def start_server(
    handler: Handler,
    addr: Address | None = None,
    *,
    sock: _socket.socket | None = None,
    backlog: int = _socket.SOMAXCONN,
    flags: Flags = 0,
    limit: int = _LIMIT,
    ssl: _ssl.SSLContext | None = None,
    start_serving: bool = True,
) -> asyncio.Server:
    """Like :func:`asyncio.start_server`, with a transparent listener. The handler also gets the original destination.

    ``handler(reader, writer, orig_dst)`` is a function or a coroutine function.
    addr: as for :func:`listen`. sock: a listener instead of addr, such as an
    ordinary one for ``RulesFlag.REDIRECT``. A connection that was not
    intercepted is closed, and reported to the loop's exception handler.

    Pass ``server.sockets`` to :func:`install_rules` as the listeners.
    """
    if (addr is None) == (sock is None):
        raise ValueError("one of addr and sock is needed")
    if addr is not None:
        sock = listen(addr, backlog=backlog, flags=flags | SocketFlag.NONBLOCK)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        _HANDLING.add(task)
        try:
            await handle(reader, writer)
        except asyncio.CancelledError:
            # The loop ends. Some versions of asyncio report an error for a handler that was cancelled.
            writer.close()
        finally:
            _HANDLING.discard(task)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            to = orig_dst(writer.get_extra_info("socket"))
        except OSError as error:
            writer.close()
            context = {"message": "a connection without an original destination", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)
            return
        outcome = handler(reader, writer, to)
        if inspect.isawaitable(outcome):
            await outcome

    try:
        return await asyncio.start_server(
            connected, sock=sock, backlog=backlog, limit=limit, ssl=ssl, start_serving=start_serving
        )
    except BaseException:
        if sock is not None:
            # When the call is cancelled, the server may already run. The loop must forget the listener before its
            # number is reused.
            asyncio.get_running_loop().remove_reader(sock)
            if addr is not None:
                sock.close()
        raise


async def open_connection_from(
    src: Address,
    dst: Address,
    *,
    flags: Flags = 0,
    limit: int = _LIMIT,
    ssl: _ssl.SSLContext | None = None,
    server_hostname: str | None = None,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Like :func:`asyncio.open_connection`, with the source address src. flags: KEEP_PORT."""
    if flags & SocketFlag.DGRAM:
        raise ValueError("a stream of datagrams: take connect_from and the loop's create_datagram_endpoint")
    sock = connect_from(src, dst, flags=flags | SocketFlag.NONBLOCK)
    try:
        await _writable(sock)
        raise_pending(sock, dst)
        return await asyncio.open_connection(sock=sock, limit=limit, ssl=ssl, server_hostname=server_hostname)
    except BaseException:
        sock.close()
        raise


async def _writable(sock: _socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_writer(sock, wake)
    try:
        await ready
    finally:
        loop.remove_writer(sock)


async def open_datagram_endpoint(
    addr: Address, *, batch: int = 64, size: int = 2048, flags: int | ReplierFlag = 0
) -> DatagramEndpoint:
    """Opens an endpoint that receives datagrams with their original destinations and replies from there.

    addr: address to bind, owned by this host or not; ``"[::]:PORT"`` serves both families.
    batch, size: as for :class:`Batch`. flags: ReplierFlag.RAW.
    """
    place, _ = encode(addr)
    sock = socket(family_of(place), _socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        bind_nonlocal(sock, addr)
        return DatagramEndpoint(sock, Batch(batch, size), Replier(flags=flags | ReplierFlag.NONBLOCK))
    except BaseException:
        sock.close()
        raise


class DatagramEndpoint:
    """Receives datagrams with their original destinations, and replies to them.

    ::

        async with await tproxy.open_datagram_endpoint("[::]:3053") as endpoint:
            with tproxy.install_rules(listeners=[endpoint.socket], ports=[53]):
                async for query, client, orig_dst in endpoint:
                    await endpoint.reply(answer(query), client, orig_dst)
    """

    def __init__(self, sock: _socket.socket, batch: Batch, replier: Replier) -> None:
        #: Pass it to :func:`install_rules` as a listener.
        self.socket = sock
        self._batch = batch
        self._replier = replier
        self._received: deque[tuple[bytes, SockAddr, SockAddr | None]] = deque()
        # The loop allows only one reader per descriptor.
        self._one_at_a_time = asyncio.Lock()
        self._waiting: asyncio.Future[None] | None = None

    async def recv(self) -> tuple[bytes, SockAddr, SockAddr | None]:
        """Returns the next datagram: data, sender, original destination. Raises :class:`Error` when it is closed."""
        async with self._one_at_a_time:
            while not self._received:
                await self._receive()
            return self._received.popleft()

    async def _receive(self) -> None:
        """Receives a queued datagram, or waits for one."""
        if self.socket.fileno() < 0:
            raise Error(errno.EBADF, "the datagram endpoint is closed")
        try:
            filled = recv_datagrams(self.socket, self._batch)
        except BlockingIOError:
            loop = asyncio.get_running_loop()
            self._waiting = loop.create_future()
            loop.add_reader(self.socket, self._wake)
            try:
                await self._waiting
            finally:
                self._wake()
            return
        for datagram in filled:
            assert datagram.client, "a datagram has a sender"
            for segment in datagram.segments:
                self._received.append((bytes(segment), datagram.client, datagram.orig_dst))
        # Other tasks run, even if datagrams arrive without a pause.
        await asyncio.sleep(0)

    def _wake(self) -> None:
        """Wakes the waiting task, if there is one."""
        waiting, self._waiting = self._waiting, None
        if waiting:
            waiting.get_loop().remove_reader(self.socket)
            if not waiting.done():
                waiting.set_result(None)

    async def reply(self, data: Buffer, client: Address, orig_dst: Address) -> None:
        """Sends a datagram from orig_dst to client. Waits while the socket buffer is full."""
        while True:
            try:
                return self._replier.reply(data, client, orig_dst)
            except BlockingIOError:
                # The sockets are internal to the replier, so the loop cannot watch them.
                await asyncio.sleep(0.001)

    def close(self) -> None:
        """Closes the endpoint. A task that waits for a datagram gets an :class:`Error`."""
        self._wake()
        self.socket.close()
        self._replier.close()

    def __aiter__(self) -> DatagramEndpoint:
        return self

    async def __anext__(self) -> tuple[bytes, SockAddr, SockAddr | None]:
        try:
            return await self.recv()
        except Error:
            if self.socket.fileno() < 0:
                raise StopAsyncIteration from None
            raise

    async def __aenter__(self) -> DatagramEndpoint:
        return self

    async def __aexit__(self, *_: Any) -> None:
        self.close()
