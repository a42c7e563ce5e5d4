"""Converts addresses, prefixes and ports between Python and C."""

from __future__ import annotations

import ctypes
import ipaddress
import socket
import struct
from collections.abc import Iterable
from typing import Union, cast

from . import _ctypes as c
from ._flags import Protocol

#: An address in the format of Python's socket module: ``(host, port)`` for IPv4,
#: ``(host, port, flowinfo, scope_id)`` for IPv6.
SockAddr = Union[tuple[str, int], tuple[str, int, int, int]]

IPAddress = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]
IPNetwork = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]

#: An address argument: such a tuple, whose host may be an
#: :mod:`ipaddress` object; ``"192.0.2.1:80"``, ``"[2001:db8::1]:80"``; or a host
#: without a port, which is then 0. Names are not resolved.
Address = Union[tuple[Union[str, IPAddress], int], tuple[Union[str, IPAddress], int, int, int], str, IPAddress]

#: A prefix: ``"10.0.0.0/8"``, a host, or an :mod:`ipaddress` object.
Prefix = Union[str, IPAddress, IPNetwork]

#: A port, or the first and the last of a range.
PortRange = Union[int, tuple[int, int], range]

#: Ports of every protocol, or ``(Protocol.UDP, ports)`` for those of one.
ProtocolPorts = Union[PortRange, tuple[Protocol, PortRange]]

#: The number of a user or group, or the first and the last of a range.
IdRange = Union[int, tuple[int, int], range]

# struct sockaddr_in, sockaddr_in6, without the family. All fields except scope_id are in network byte order.
_IN = struct.Struct("!2xH4s8x")
_IN6 = struct.Struct("!2xHI16sI")

# For hot paths: (port, host), (port, flowinfo, host, scope_id before ntohl).
unpack_in = _IN.unpack
unpack_in6 = _IN6.unpack


def _split(text: str) -> tuple[str, int]:
    """Splits text into a host and an optional port."""
    if text.startswith("["):
        host, bracket, port = text[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            raise ValueError(f"{text!r}: an IPv6 address and port are written [ADDRESS]:PORT")
        port = port[1:] if port else "0"
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    else:
        host, port = text, "0"
    if not (port.isascii() and port.isdigit()):
        raise ValueError(f"{text!r}: {port!r} is no port")
    return host, int(port)


def _scope(name: str) -> int:
    return int(name) if name.isdigit() else socket.if_nametoindex(name)


def _parts(address: Address) -> tuple[IPAddress, int, int, int]:
    """Returns host, port, flow information and scope, all validated."""
    flow = scope = 0
    host: object
    if isinstance(address, tuple):
        if len(address) == 2:
            host, port = address
        elif len(address) == 4:
            host, port, flow, scope = address
        else:
            raise ValueError(f"{address!r}: an address is (host, port), or (host, port, flowinfo, scope_id)")
    elif isinstance(address, str):
        host, port = _split(address)
    else:
        host, port = address, 0
    if isinstance(host, str):
        host, percent, zone = host.partition("%")
        if percent:
            scope = _scope(zone)
    elif isinstance(host, ipaddress.IPv6Address):
        # From Python 3.9 on, the address may have a zone.
        zone = host.scope_id or ""
        host, scope = host.packed, _scope(zone) if zone else scope
    elif not isinstance(host, ipaddress.IPv4Address):
        raise TypeError(f"{address!r} is no address")
    if not 0 <= port <= 0xFFFF:
        raise ValueError(f"{address!r}: {port} is no port")
    if not (0 <= flow <= 0xFFFFF and 0 <= scope <= 0xFFFFFFFF):
        raise ValueError(f"{address!r}: no such flowinfo or scope_id")
    return ipaddress.ip_address(host), port, flow, scope


def store(place: c.sockaddr_storage, address: Address) -> int:
    """Writes an address as a C struct, and returns its length."""
    ip, port, flow, scope = _parts(address)
    if isinstance(ip, ipaddress.IPv4Address):
        _IN.pack_into(place, 0, port, ip.packed)
        place.ss_family = socket.AF_INET
        return _IN.size
    _IN6.pack_into(place, 0, port, flow, ip.packed, socket.htonl(scope))
    place.ss_family = socket.AF_INET6
    return _IN6.size


def encode(address: Address) -> tuple[c.sockaddr_storage, int]:
    """Returns an address as a C struct, and its length."""
    place = c.sockaddr_storage()
    return place, store(place, address)


def decode(place: c.sockaddr_storage) -> SockAddr | None:
    """Returns the address in a C struct; ``None`` if it is empty."""
    if place.ss_family == socket.AF_INET:
        port, ip = _IN.unpack_from(place)
        return socket.inet_ntoa(ip), port
    if place.ss_family == socket.AF_INET6:
        port, flow, ip, scope = _IN6.unpack_from(place)
        return socket.inet_ntop(socket.AF_INET6, ip), port, flow, socket.ntohl(scope)
    return None


def family_of(address: c.sockaddr_storage) -> socket.AddressFamily:
    """Returns the family as an ``AF_`` constant."""
    return socket.AddressFamily(address.ss_family)


def prefixes(wanted: Iterable[Prefix]) -> ctypes.Array[c.tp_prefix]:
    """Returns an array of prefixes. Bits after the prefix length are cleared, as in C."""
    if isinstance(wanted, str):
        raise TypeError(f"{wanted!r}: a list of prefixes is needed, not one")
    networks = [ipaddress.ip_network(prefix, strict=False) for prefix in wanted]
    array = (c.tp_prefix * len(networks))()
    for place, network in zip(array, networks):
        packed = network.network_address.packed
        place.family = socket.AF_INET if network.version == 4 else socket.AF_INET6
        place.len = network.prefixlen
        place.addr[: len(packed)] = packed
    return array


def _ends(item: int | tuple[int, int] | range) -> tuple[int, int]:
    """Returns the first and the last of a range. A Python :class:`range` excludes its end, a tuple includes it."""
    if isinstance(item, int):
        return item, item
    if isinstance(item, range):
        if item.step != 1 or not item:
            raise ValueError(f"{item!r}: a range has at least one number, and every one")
        return item[0], item[-1]
    first, last = item
    return first, last


def ports(wanted: Iterable[ProtocolPorts]) -> ctypes.Array[c.tp_port_range]:
    """Returns an array of port ranges."""
    ranges = []
    for item in wanted:
        protocols = 0
        if isinstance(item, tuple) and isinstance(item[0], Protocol):
            protocols, item = int(item[0]), item[1]
        first, last = _ends(cast("PortRange", item))
        # The C struct has 16 bits: a larger number would become another port.
        if not 1 <= first <= last <= 0xFFFF:
            raise ValueError(f"{item!r}: ports are 1 to 65535, the lower first")
        ranges.append(c.tp_port_range(first, last, protocols))
    return (c.tp_port_range * len(ranges))(*ranges)


def ids(wanted: Iterable[IdRange]) -> ctypes.Array[c.tp_id_range]:
    """Returns an array of ranges of user or group numbers."""
    ranges = []
    for item in wanted:
        first, last = _ends(item)
        if not 0 <= first <= last < 0xFFFFFFFF:
            raise ValueError(f"{item!r}: numbers of users and groups are 0 to 4294967294, the lower first")
        ranges.append(c.tp_id_range(first, last))
    return (c.tp_id_range * len(ranges))(*ranges)


def macs(wanted: Iterable[str | bytes]) -> ctypes.Array[c.tp_mac]:
    """Returns an array of Ethernet addresses: text such as "02:00:00:00:00:01", or six bytes."""
    if isinstance(wanted, (str, bytes)):
        raise TypeError(f"{wanted!r}: a list of Ethernet addresses is needed, not one")
    addresses = []
    for item in wanted:
        parts = item.split(":") if isinstance(item, str) else []
        if isinstance(item, str) and not all(len(part) == 2 and part.isalnum() for part in parts):
            raise ValueError(f"{item!r} is not an Ethernet address such as 02:00:00:00:00:01")
        address = bytes.fromhex("".join(parts)) if isinstance(item, str) else bytes(item)
        if len(address) != 6:
            raise ValueError(f"{item!r} is not an Ethernet address, which has six bytes")
        addresses.append(c.tp_mac((ctypes.c_uint8 * 6)(*address)))
    return (c.tp_mac * len(addresses))(*addresses)
