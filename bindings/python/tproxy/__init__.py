"""Transparent proxying on Linux, by libtproxy.

Sockets are ordinary :class:`socket.socket` objects, and addresses are the
tuples that these use. A transparent TCP proxy::

    listener = tproxy.listen("[::]:3129")
    with tproxy.install_rules(listeners=[listener], ports=[80]):
        while True:
            client, source, destination = tproxy.accept(listener)
            server = tproxy.connect_from(source, destination)
            ...  # relay

A failed call of the library raises :class:`Error`, an :class:`OSError` with the
library's message. Invalid arguments (a bad address, a number out of range)
raise ValueError or TypeError.
"""

from ._address import Address, PortRange, Prefix, SockAddr
from ._asyncio import DatagramEndpoint, open_connection_from, open_datagram_endpoint, start_server
from ._check import Finding, Severity, check, self_test
from ._ctypes import tp_version as _tp_version
from ._datagrams import Batch, Datagram, Replier, ReplierStats, recv_datagrams, recvfrom
from ._errors import Error
from ._flags import AddressSet, Backend, DatagramFlag, Family, Format, Protocol, ReplierFlag, RulesFlag, SocketFlag
from ._rules import (
    Instance,
    Rules,
    RulesConfig,
    RulesStats,
    install_rules,
    list_rules,
    purge_rules,
    read_stats,
    render_rules,
)
from ._sockets import (
    accept,
    bind_nonlocal,
    connect_from,
    connect_socket,
    listen,
    orig_dst,
    set_transparent,
    socket,
    unmap_addr,
)

__all__ = [
    "Address",
    "AddressSet",
    "Backend",
    "Batch",
    "Datagram",
    "DatagramEndpoint",
    "DatagramFlag",
    "Error",
    "Family",
    "Finding",
    "Format",
    "Instance",
    "PortRange",
    "Prefix",
    "Protocol",
    "Replier",
    "ReplierFlag",
    "ReplierStats",
    "Rules",
    "RulesConfig",
    "RulesFlag",
    "RulesStats",
    "Severity",
    "SockAddr",
    "SocketFlag",
    "accept",
    "bind_nonlocal",
    "check",
    "connect_from",
    "connect_socket",
    "install_rules",
    "list_rules",
    "listen",
    "open_connection_from",
    "open_datagram_endpoint",
    "orig_dst",
    "purge_rules",
    "read_stats",
    "recv_datagrams",
    "recvfrom",
    "render_rules",
    "self_test",
    "set_transparent",
    "socket",
    "start_server",
    "unmap_addr",
    "version",
]


def version() -> str:
    """Returns the version of the loaded library."""
    return str(_tp_version().decode())
