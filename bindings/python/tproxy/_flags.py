"""The constants of tproxy.h, by subject."""

from __future__ import annotations

from enum import IntEnum, IntFlag

from . import _ctypes as c


class SocketFlag(IntFlag):
    """For :func:`listen`, :func:`accept`, :func:`connect_from` and :func:`connect_socket`."""

    #: The new socket does not block; a connection may still be under way. ``listen``, ``accept``, ``connect_from``.
    NONBLOCK = c.TP_NONBLOCK
    #: Several listeners share the address and port, and the kernel spreads connections among them. ``listen``.
    REUSEPORT = c.TP_LISTEN_REUSEPORT
    #: The socket serves IPv6 only. ``listen``.
    V6ONLY = c.TP_LISTEN_V6ONLY
    #: The source's own port if it can be had, else any other. ``connect_from``, ``connect_socket``.
    KEEP_PORT = c.TP_CONNECT_KEEP_PORT
    #: The source's own port, or an error (EADDRINUSE). ``connect_from``, ``connect_socket``.
    SAME_PORT = c.TP_CONNECT_SAME_PORT
    #: A datagram socket. ``connect_from``.
    DGRAM = c.TP_CONNECT_DGRAM
    #: What is to be sent is there already: the handshake's last packet waits for it. ``connect_from``,
    #: ``connect_socket``.
    DATA_FOLLOWS = c.TP_CONNECT_DATA_FOLLOWS
    #: The listener is transparent, so the accepted socket is not asked. ``accept``.
    TPROXY = c.TP_ACCEPT_TPROXY


class DatagramFlag(IntFlag):
    """What is to be said of a received :class:`Datagram`."""

    #: It was longer than its place; the rest is lost.
    TRUNC = c.TP_DGRAM_TRUNC
    #: The socket reports more than there was room for: the original destination may be missing.
    CTRUNC = c.TP_DGRAM_CTRUNC
    #: The kernel told no original destination, as the socket was not asked to (:func:`set_transparent`).
    NO_ORIG_DST = c.TP_DGRAM_NO_ORIG_DST


class ReplierFlag(IntFlag):
    """How a :class:`Replier` works."""

    #: A datagram for which there is no room at once is not sent: BlockingIOError.
    NONBLOCK = c.TP_NONBLOCK
    #: Take no ports, reply by raw sockets alone.
    RAW = c.TP_REPLIER_RAW


class RulesFlag(IntFlag):
    """What rules do besides intercepting forwarded traffic; tproxy.h says all of it."""

    #: Intercept nothing; only bring packets to the transparent sockets that they belong to.
    DIVERT_ONLY = c.TP_RULES_DIVERT_ONLY
    #: By NAT redirection to an ordinary listener. TCP only.
    REDIRECT = c.TP_RULES_REDIRECT
    #: The host's own traffic too, but for what comes from transparent sockets.
    LOCAL_OUTPUT = c.TP_RULES_LOCAL_OUTPUT
    #: While there is no listener, traffic passes by; the default is to drop it.
    FAIL_OPEN = c.TP_RULES_FAIL_OPEN
    #: Leave connections alone that are made straight to the listener; the default is to drop them.
    ALLOW_DIRECT = c.TP_RULES_ALLOW_DIRECT
    #: Keep what is intercepted out of connection tracking.
    NOTRACK = c.TP_RULES_NOTRACK
    #: The rules outlive the process.
    PERSIST = c.TP_RULES_PERSIST
    #: Intercept only TCP packets that begin a connection; other TCP packets without a socket are forwarded.
    NEW_ONLY = c.TP_RULES_NEW_ONLY
    #: Deliver replies of servers on this host to the transparent sockets that connected to them.
    LOCAL_SERVERS = c.TP_RULES_LOCAL_SERVERS


class Backend(IntEnum):
    """By what rules are made."""

    #: nf_tables if the kernel has what is needed, else iptables.
    AUTO = c.TP_BACKEND_AUTO
    NFT = c.TP_BACKEND_NFT
    IPTABLES = c.TP_BACKEND_IPTABLES


class Protocol(IntFlag):
    """What is intercepted."""

    TCP = c.TP_PROTO_TCP
    UDP = c.TP_PROTO_UDP


class Family(IntFlag):
    """Of which addresses."""

    IPV4 = c.TP_FAMILY_IPV4
    IPV6 = c.TP_FAMILY_IPV6


class AddressSet(IntEnum):
    """A set of prefixes that :meth:`Rules.update` and :meth:`Rules.learn` change."""

    #: The destinations to intercept.
    DST = c.TP_SET_DST
    #: The sources to intercept.
    SRC = c.TP_SET_SRC
    #: The destinations never to intercept.
    BYPASS = c.TP_SET_BYPASS


class Format(IntEnum):
    """What :func:`render_rules` writes."""

    #: A script of ``ip`` and ``nft``.
    NFT = c.TP_FORMAT_NFT
    #: A script of ``ip`` and ``iptables-restore``.
    IPTABLES = c.TP_FORMAT_IPTABLES
