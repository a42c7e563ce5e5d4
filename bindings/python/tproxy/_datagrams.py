"""Receives datagrams with their original destinations, and sends replies from any source."""

from __future__ import annotations

import ctypes
import errno
import select
import socket as _socket
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from ctypes import byref
from socket import AF_INET6, inet_ntoa, inet_ntop, ntohl
from typing import Any, NamedTuple, Union, overload

from . import _ctypes as c
from ._address import Address, SockAddr, decode, store, unpack_in, unpack_in6
from ._errors import Error, checked, kernel_error, last_error
from ._flags import DatagramFlag, ReplierFlag
from ._sockets import uint32, wait_for

_UNSPECIFIED4 = bytes(4)
_UNSPECIFIED6 = bytes(16)
_V4_MAPPED = bytes(10) + b"\xff\xff"

#: Data to send.
Buffer = Union[bytes, bytearray, memoryview]


def recvfrom(sock: _socket.socket, bufsize: int, flags: int = 0) -> tuple[bytes, SockAddr, SockAddr | None]:
    """Receives a datagram. Returns data, sender and original destination.

    Like ``sock.recvfrom``, for a socket of :func:`socket` or :func:`set_transparent`.
    The original destination is ``None`` if it is unknown. An AF_INET6 socket
    returns v4-mapped IPv4 addresses. The socket's timeout applies.
    If UDP_GRO is set on the socket, use :func:`recv_datagrams`.
    """
    # Makes one recvmsg call, as tp_recvfrom does. Python's recvmsg takes half the time of a ctypes call, handles
    # timeouts and signals, and splits the control data; only one message must be found and decoded. The buffer of 512
    # bytes also holds control data that the program has enabled. Numbers are used because looking up names costs
    # time.
    try:
        if flags:
            data, control, _, client = _recvmsg(sock, bufsize, flags)
        else:
            data, control, _, client = sock.recvmsg(bufsize, 512)
    except _socket.timeout:
        raise
    except OSError as error:
        raise kernel_error(error.errno or 0, "receiving datagrams") from None
    try:
        [(level, kind, body)] = control
    except ValueError:
        level, kind, body = _orig_dst_among(control)
    # SOL_IP, IP_ORIGDSTADDR; SOL_IPV6, IPV6_ORIGDSTADDR. A v4-mapped address or :: in the second comes from the IPv6
    # header of a hostile sender, who wants the program to connect to an address that only this host can reach, such
    # as 127.0.0.1. The result is then None, as with tp_recvfrom.
    if kind == 20 and level == 0:
        port, ip = unpack_in(body)
        if not ip[0] and ip == _UNSPECIFIED4:
            return data, client, None
        # The address has the family of the sender.
        if len(client) == 2:
            return data, client, (inet_ntoa(ip), port)
        return data, client, ("::ffff:" + inet_ntoa(ip), port, 0, 0)
    if kind == 74 and level == 41:
        port, flow, ip, scope = unpack_in6(body)
        # For most addresses, the first byte suffices.
        if not ip[0] and (ip.startswith(_V4_MAPPED) or ip == _UNSPECIFIED6):
            return data, client, None
        return data, client, (inet_ntop(AF_INET6, ip), port, flow, scope and ntohl(scope))
    return data, client, None


def _recvmsg(sock: _socket.socket, bufsize: int, flags: int) -> tuple[bytes, list[tuple[int, int, bytes]], int, Any]:
    # If the socket has a timeout, Python waits regardless of the flags.
    if flags & _socket.MSG_DONTWAIT and sock.gettimeout() and not _readable(sock):
        raise kernel_error(errno.EAGAIN, "receiving datagrams")
    return sock.recvmsg(bufsize, 512, flags)


def _orig_dst_among(control: list[tuple[int, int, bytes]]) -> tuple[int, int, bytes]:
    """Finds the original destination if it is not the only control message, or if the control data was truncated."""
    for level, kind, body in control:
        if (level, kind, len(body)) in ((0, 20, 16), (41, 74, 28)):
            return level, kind, body
    return 0, 0, b""


def _readable(sock: _socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


class Datagram:
    """A received datagram, or a datagram to send, with its buffer.

    A :class:`Batch` has many, which can be reused. To send a single datagram,
    create it with ``Datagram(data, client, orig_dst)``.
    """

    __slots__ = ("_buffer", "_struct")

    def __init__(self, data: Buffer, client: Address, orig_dst: Address, *, segment_len: int = 0) -> None:
        buffer = (ctypes.c_char * max(1, memoryview(data).nbytes))()
        self._place(c.tp_datagram(), memoryview(buffer).cast("B"), ctypes.addressof(buffer))
        self.data = data
        self.client = client
        self.orig_dst = orig_dst
        self.segment_len = segment_len

    def _place(self, struct: c.tp_datagram, buffer: memoryview, address: int) -> None:
        """Wraps a struct, and a view that keeps the owner of the memory alive."""
        self._struct, self._buffer = struct, buffer
        struct.data, struct.capacity = address, len(buffer)

    @property
    def data(self) -> memoryview:
        """The received data, or the data to send, as a view. It is valid until the buffer is reused.

        Setting it copies the bytes. Raises ValueError if they do not fit the buffer.
        """
        return self._buffer[: self._struct.len]

    @data.setter
    def data(self, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        if len(view) > len(self._buffer):
            raise ValueError(f"{len(view)} bytes are too many for a place of {len(self._buffer)}")
        self._buffer[: len(view)] = view
        self._struct.len = len(view)
        self._struct.segment_len = 0

    @property
    def client(self) -> SockAddr | None:
        """The sender, which is the destination of a reply."""
        return decode(self._struct.client)

    @client.setter
    def client(self, address: Address) -> None:
        store(self._struct.client, address)

    @property
    def orig_dst(self) -> SockAddr | None:
        """The original destination, which is the source of a reply; ``None`` if it is unknown."""
        return decode(self._struct.orig_dst)

    @orig_dst.setter
    def orig_dst(self, address: Address) -> None:
        store(self._struct.orig_dst, address)

    @property
    def segment_len(self) -> int:
        """Length of each datagram in data except the last (UDP_GRO, UDP_SEGMENT). 0: data is one datagram."""
        return int(self._struct.segment_len)

    @segment_len.setter
    def segment_len(self, value: int) -> None:
        self._struct.segment_len = uint32("segment_len", value)

    @property
    def segments(self) -> Iterator[memoryview]:
        """The datagrams in data: one, unless they were received with UDP_GRO."""
        data = self.data
        step = self.segment_len or max(1, len(data))
        return (data[at : at + step] for at in range(0, max(1, len(data)), step))

    @property
    def flags(self) -> DatagramFlag:
        """Flags of a received datagram."""
        return DatagramFlag(self._struct.flags)

    @property
    def error(self) -> Error | None:
        """The error of a datagram that was not sent, or ``None``."""
        number = self._struct.error
        return kernel_error(number, f"a datagram from {self.orig_dst} to {self.client}") if number else None

    def __repr__(self) -> str:
        return f"<tproxy.Datagram of {self._struct.len} bytes, client={self.client}, orig_dst={self.orig_dst}>"


class Batch(Sequence[Datagram]):
    """Buffers for datagrams, which :func:`recv_datagrams` fills. They can be reused."""

    def __init__(self, count: int = c.TP_BATCH_MAX, size: int = 2048) -> None:
        """count: number of buffers; a call receives at most 64. size: bytes per buffer (with UDP_GRO: 65,535)."""
        if count < 1 or size < 0:
            raise ValueError(f"{count} datagrams of {size} bytes make no batch")
        self._array = (c.tp_datagram * count)()
        memory = (ctypes.c_char * (count * size or 1))()
        view, address = memoryview(memory).cast("B"), ctypes.addressof(memory)
        self._datagrams = []
        for at in range(count):
            datagram = Datagram.__new__(Datagram)
            datagram._place(self._array[at], view[at * size : (at + 1) * size], address + at * size)
            self._datagrams.append(datagram)

    def __len__(self) -> int:
        return len(self._datagrams)

    @overload
    def __getitem__(self, at: int) -> Datagram: ...
    @overload
    def __getitem__(self, at: slice) -> list[Datagram]: ...
    def __getitem__(self, at: int | slice) -> Datagram | list[Datagram]:
        return self._datagrams[at]


def recv_datagrams(sock: _socket.socket, batch: Batch, flags: int = 0) -> list[Datagram]:
    """Receives all queued datagrams into a batch, by one system call. Returns the received datagrams.

    Waits only for the first datagram, up to the socket's timeout.
    flags: ``socket.MSG_DONTWAIT``. The datagrams belong to the batch: the next
    call overwrites them. Only one thread at a time may use a batch.
    """
    timeout = sock.gettimeout()
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        count = c.tp_recv_datagrams(sock.fileno(), batch._array, len(batch), flags)
        if count >= 0:
            return batch._datagrams[:count]
        error = last_error()
        # A socket with a timeout is non-blocking in C. Python's own calls wait in the same way.
        if isinstance(error, BlockingIOError) and timeout and deadline and not flags & _socket.MSG_DONTWAIT:
            wait_for(sock, select.POLLIN, deadline)
        elif not isinstance(error, InterruptedError):
            raise error


class ReplierStats(NamedTuple):
    """Counters of a replier since it was opened."""

    #: Sockets that are open now.
    sockets: int
    #: Cache hits: lookups that found a socket for the source port, or a cached "port in use".
    hits: int
    #: Cache misses: lookups that had to create a socket.
    misses: int
    #: Datagrams sent through a raw socket because another socket uses the source port.
    raw: int
    #: Sockets closed because the maximum number was reached.
    evictions: int
    #: Datagrams that were not sent.
    errors: int
    #: Datagrams that were sent.
    sent: int


class Replier:
    """Sends datagrams from any address and port; a context manager.

    It has one socket for each source port, whatever the addresses and clients.
    Calls from several threads wait for each other: use one replier per thread.
    """

    def __init__(self, *, flags: int | ReplierFlag = 0, max_sockets: int = 0, idle_ms: int = 0) -> None:
        """max_sockets: 0 means 256. idle_ms: time after which an unused socket is closed; 0 means a minute."""
        self._handle: int | None = None
        # C calls release the GIL: another thread must not close the replier during a call.
        self._lock = threading.Lock()
        numbers = (uint32("flags", flags), uint32("max_sockets", max_sockets), uint32("idle_ms", idle_ms))
        config = c.tp_replier_config(*numbers)
        handle = ctypes.c_void_p()
        checked(c.tp_replier_open(byref(config), ctypes.sizeof(config), byref(handle)))
        self._handle = handle.value
        self._one = c.tp_datagram()
        self._many = (c.tp_datagram * c.TP_BATCH_MAX)()

    def reply(self, data: Buffer, client: Address, orig_dst: Address) -> None:
        """Sends a datagram from orig_dst to client. Raises :class:`Error` if it was not sent."""
        data = data if isinstance(data, bytes) else bytes(data)
        one = self._one
        with self._lock:
            store(one.client, client)
            store(one.orig_dst, orig_dst)
            one.data, one.len = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value, len(data)
            if checked(c.tp_reply(self._open(), one, 1)) == 1:
                return
            number = one.error
        raise kernel_error(number, f"a reply from {orig_dst} to {client}")

    def send(self, datagrams: Iterable[Datagram]) -> int:
        """Sends each datagram from its orig_dst to its client. Returns the number of datagrams that were sent.

        A datagram that fails does not stop the others; it has an ``error``.
        Datagrams of one flow and equal length are sent as one batch
        (UDP_SEGMENT).
        """
        wanted = list(datagrams)
        sent = 0
        many = self._many
        with self._lock:
            for start in range(0, len(wanted), len(many)):
                some = wanted[start : start + len(many)]
                # The given datagrams keep the memory alive.
                for at, datagram in enumerate(some):
                    many[at] = datagram._struct
                sent += checked(c.tp_reply(self._open(), many, len(some)))
                for at, datagram in enumerate(some):
                    datagram._struct.error = many[at].error
        return sent

    def stats(self) -> ReplierStats:
        """Returns the counters."""
        stats = c.tp_replier_stats()
        with self._lock:
            checked(c.tp_replier_stats_(self._open(), byref(stats), ctypes.sizeof(stats)))
        return ReplierStats(*(getattr(stats, name) for name in ReplierStats._fields))

    def _open(self) -> int:
        if self._handle is None:
            raise ValueError("the replier is closed")
        return self._handle

    def close(self) -> None:
        """Closes the sockets. May be called more than once."""
        with self._lock:
            handle, self._handle = self._handle, None
            c.tp_replier_close(handle)

    def __enter__(self) -> Replier:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()
