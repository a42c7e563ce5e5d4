"""Transparent stream sockets, and where an intercepted connection was going."""

from __future__ import annotations

import select
import socket as _socket
import time
from ctypes import byref
from socket import AF_INET6, inet_ntoa, inet_ntop, ntohl
from typing import Protocol as _Protocol
from typing import Union

from . import _ctypes as c
from ._address import Address, SockAddr, decode, encode, family_of, unpack_in, unpack_in6
from ._errors import checked, kernel_error, last_error
from ._flags import SocketFlag

#: What is asked of arguments that go as flags: an enum's, or a number.
Flags = Union[int, SocketFlag]


class HasFileno(_Protocol):
    """A socket, or what has the descriptor of one."""

    def fileno(self) -> int: ...


def descriptor(sock: HasFileno | int) -> int:
    return sock if isinstance(sock, int) else sock.fileno()


def uint32(what: str, value: int) -> int:
    """ctypes would cut a larger number to another one."""
    if not 0 <= value <= 0xFFFFFFFF:
        raise ValueError(f"{what}: {value} is not a number of 32 bits")
    return value


def _owned(fd: int, family: int, kind: int, proto: int, flags: int = 0) -> _socket.socket:
    sock = _socket.socket(family, kind, proto, fileno=fd)
    if flags & c.TP_NONBLOCK:
        sock.setblocking(False)
    return sock


def socket(family: int = _socket.AF_INET, type: int = _socket.SOCK_STREAM, proto: int = 0) -> _socket.socket:  # noqa: A002
    """A socket that can be bound to, listen on and send from foreign addresses.

    An AF_INET6 socket is dual-stack. A SOCK_DGRAM socket also reports the
    original destination of every datagram (:func:`recvfrom`).
    """
    return _owned(checked(c.tp_socket(family, type, proto)), family, type, proto)


def set_transparent(sock: HasFileno | int) -> None:
    """Makes a socket transparent that the program has already; as :func:`socket` does, before it is bound."""
    checked(c.tp_set_transparent(descriptor(sock)))


def bind_nonlocal(sock: HasFileno | int, addr: Address) -> None:
    """Binds a socket to any address, whether this host owns it or not; makes it transparent first."""
    place, size = encode(addr)
    checked(c.tp_bind_nonlocal(descriptor(sock), byref(place), size))


def listen(addr: Address, *, backlog: int = -1, flags: Flags = 0) -> _socket.socket:
    """A transparent stream socket that listens on any address: the listener for :func:`install_rules`.

    ``::`` serves IPv6 and IPv4, ``0.0.0.0`` IPv4; ``127.0.0.1`` and ``::1`` are
    reached by interception alone. A negative backlog asks for the most that the
    system allows. flags: NONBLOCK, REUSEPORT, V6ONLY (``::`` serves IPv6 only).
    """
    place, size = encode(addr)
    fd = checked(c.tp_listen(byref(place), size, max(-1, min(backlog, 0x7FFFFFFF)), uint32("flags", flags)))
    return _owned(fd, family_of(place), _socket.SOCK_STREAM, 0, flags)


def connect_from(src: Address, dst: Address, *, flags: Flags = 0, timeout: float | None = None) -> _socket.socket:
    """Connects to dst so that the server sees the connection come from src, which may be anybody's address.

    v4-mapped addresses are taken as IPv4: what ``accept`` and :func:`orig_dst`
    gave can be passed on as it is. flags: KEEP_PORT, SAME_PORT, NONBLOCK (the
    connection may still be under way), DGRAM (a UDP socket that is connected to dst),
    DATA_FOLLOWS (the client's first bytes are to be sent at once: a packet less).

    timeout: how many seconds to wait for the connection, and for what is done
    with the socket later, as for :func:`socket.create_connection`; ``None``:
    as long as the kernel tries.
    """
    (src_place, src_size), (dst_place, dst_size) = encode(src), encode(dst)
    flags = uint32("flags", flags)
    if timeout is not None:
        flags |= c.TP_NONBLOCK
    while True:
        fd = c.tp_connect_from(byref(src_place), src_size, byref(dst_place), dst_size, flags)
        if fd >= 0:
            break
        error = last_error()
        # A signal whose handler did not raise is no reason to fail (PEP 475).
        if not isinstance(error, InterruptedError):
            raise error
    # Of which family the library decides: a v4-mapped address is taken as IPv4.
    sock = _socket.socket(fileno=fd)
    try:
        if timeout is not None:
            _wait_connected(sock, timeout, dst)
        sock.settimeout(0 if flags & c.TP_NONBLOCK and timeout is None else timeout)
    except BaseException:
        sock.close()
        raise
    return sock


def connect_socket(sock: _socket.socket, src: Address, dst: Address, *, flags: Flags = 0) -> None:
    """Connects a socket of the program's own, as :func:`connect_from` connects a new one.

    For options that are set before: SO_MARK, SO_BINDTODEVICE, IP_TOS, TCP Fast
    Open, Multipath TCP. The socket is a stream or datagram socket that is not
    bound; it is made transparent. An AF_INET6 socket that is not IPv6-only also
    connects between IPv4 addresses. flags: KEEP_PORT, SAME_PORT, DATA_FOLLOWS.

    Waits as ``sock.connect`` does, by the timeout of the socket; with a timeout
    of 0 the connection may still be under way. If it fails before connect(2),
    the socket is as it was; afterwards it stays bound, and is to be closed.
    """
    (src_place, src_size), (dst_place, dst_size) = encode(src), encode(dst)
    timeout = sock.gettimeout()
    rc = c.tp_connect_socket(
        sock.fileno(), byref(src_place), src_size, byref(dst_place), dst_size, uint32("flags", flags)
    )
    if rc < 0:
        error = last_error()
        # The kernel goes on connecting after a signal whose handler did not raise (PEP 475).
        if not isinstance(error, InterruptedError):
            raise error
        _wait_connected(sock, None, dst)
    elif timeout:
        _wait_connected(sock, timeout, dst)


def accept(listener: _socket.socket, *, flags: Flags = 0) -> tuple[_socket.socket, SockAddr, SockAddr]:
    """Accepts an intercepted connection: its socket, the client's address, the original destination.

    As ``listener.accept`` and :func:`orig_dst`. Both addresses are of the
    listener's family (:func:`unmap_addr`). FileNotFoundError: the connection was
    not intercepted, and is closed. flags: TPROXY (the listener is transparent,
    a system call less), NONBLOCK (the accepted socket does not block).

    Waits as ``listener.accept`` does, by the timeout of the listener.
    """
    flags = uint32("flags", flags)
    timeout = listener.gettimeout()
    deadline = None if timeout is None else time.monotonic() + timeout
    client, client_size = c.sockaddr_storage(), c.socklen_t(128)
    to, to_size = c.sockaddr_storage(), c.socklen_t(128)
    while True:
        fd = c.tp_accept(listener.fileno(), byref(client), byref(client_size), byref(to), byref(to_size), flags)
        if fd >= 0:
            break
        error = last_error()
        if isinstance(error, BlockingIOError) and timeout:
            wait_for(listener, select.POLLIN, deadline)
        elif not isinstance(error, InterruptedError):
            raise error
    sock = _owned(fd, listener.family, listener.type, listener.proto, flags)
    source, destination = decode(client), decode(to)
    assert source, "the library gives IPv4 and IPv6 addresses alone"
    assert destination, "the library gives IPv4 and IPv6 addresses alone"
    return sock, source, destination


def unmap_addr(addr: Address) -> SockAddr:
    """The IPv4 address that a v4-mapped address (``::ffff:a.b.c.d``) stands for; any other address as it is."""
    place, size = encode(addr)
    checked(c.tp_unmap_addr(byref(place), byref(c.socklen_t(size))))
    decoded = decode(place)
    assert decoded, "an address that was encoded is one"
    return decoded


def _wait_connected(sock: _socket.socket, timeout: float | None, dst: Address) -> None:
    wait_for(sock, select.POLLOUT, None if timeout is None else time.monotonic() + timeout)
    raise_pending(sock, dst)


def raise_pending(sock: _socket.socket, dst: Address) -> None:
    """Raises what became of a connection that was under way, if it failed."""
    errno = sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_ERROR)
    if errno:
        raise kernel_error(errno, f"connect() to {dst}")


def wait_for(sock: HasFileno, events: int, deadline: float | None) -> None:
    """Waits until a socket is ready, as Python's own calls do when it has a timeout; ``None``: as long as it takes."""
    poll = select.poll()
    poll.register(sock, events)
    if not poll.poll(None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000):
        raise _socket.timeout("timed out")


def orig_dst(sock: _socket.socket) -> SockAddr:
    """Where an accepted connection was going before it was intercepted, by TPROXY or by REDIRECT.

    The address is of the socket's family: an IPv4 connection of an AF_INET6
    listener gives it v4-mapped. FileNotFoundError: it was not intercepted.
    """
    # What tp_orig_dst does, by Python's own calls, which take half the time of a call by ctypes; numbers, because
    # names cost too. In any case but the two that are wanted the library is asked, and has the last word.
    try:
        # SOL_IP, IP_TRANSPARENT: by TPROXY, and the address is the socket's own.
        if sock.getsockopt(0, 19):
            name: SockAddr = sock.getsockname()
            host = name[0]
            # One after the other: a set hashes first, which costs more, and varies with the seed of hashes.
            if host != "::" and host != "0.0.0.0" and host != "::ffff:0.0.0.0" and name[1]:
                return name
        else:
            # By REDIRECT, and connection tracking has another address than the socket's own. It is asked by the level
            # of the address, not of the socket: SOL_IP or SOL_IPV6, SO_ORIGINAL_DST.
            name = sock.getsockname()
            found: SockAddr
            if len(name) == 2:
                port, ip = unpack_in(sock.getsockopt(0, 80, 16))
                found = inet_ntoa(ip), port
            elif name[0].startswith("::ffff:"):
                port, ip = unpack_in(sock.getsockopt(0, 80, 16))
                found = "::ffff:" + inet_ntoa(ip), port, 0, 0
            else:
                port, flow, ip, scope = unpack_in6(sock.getsockopt(41, 80, 28))
                found = inet_ntop(AF_INET6, ip), port, flow, scope and ntohl(scope)
            if found != name:
                return found
    except OSError:
        pass
    place, size = c.sockaddr_storage(), c.socklen_t(128)
    checked(c.tp_orig_dst(sock.fileno(), byref(place), byref(size)))
    decoded = decode(place)
    assert decoded, "the library gives IPv4 and IPv6 addresses alone"
    return decoded
