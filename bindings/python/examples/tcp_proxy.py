#!/usr/bin/env python3
"""A transparent TCP proxy.

    tcp_proxy.py [--deny PREFIX]... [--connections N] [--connect SECONDS]
                 [--idle SECONDS] LISTEN-PORT PORT...

Intercepts every connection that this host would forward to one of the PORTs,
over IPv4 and IPv6, and connects to the server from the client's own address.
SIGINT or SIGTERM ends it and removes the rules.

A connection is reset if its server does not accept in time (--connect), or if
no byte moves for too long (--idle). At the limit (--connections) a new
connection replaces the one that has been silent for the longest time, if that
is at least a second; otherwise the new one is reset.

Connections to denied destinations are reset: loopback, link-local, multicast and
reserved addresses, the metadata services of clouds, this host's own addresses,
and every --deny PREFIX. Deny the networks that clients must not reach through
this host, such as management networks.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import signal
import socket
import struct
from collections.abc import Awaitable
from functools import partial
from typing import TypeVar

import tproxy

T = TypeVar("T")

DENIED = ["0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3"]
DENIED += ["::/96", "fe80::/10", "fec0::/10", "ff00::/8"]
# Metadata services, by the documentation of the clouds. Most of them are at 169.254.169.254, which is link-local.
DENIED += ["fd00:ec2::254"]  # AWS EC2: Instance Metadata Service over IPv6
DENIED += ["fd20:ce::254"]  # Google Compute Engine: metadata server over IPv6
DENIED += ["100.100.100.200"]  # Alibaba Cloud ECS: instance metadata
DENIED += ["168.63.129.16"]  # Microsoft Azure: WireServer, the platform's virtual public address
DENIED += ["192.0.0.192"]  # Oracle Cloud Infrastructure Classic: instance metadata
# Seconds without a byte after which a connection may be ended for a new one, at the limit.
SILENT_FOR = 1

# Time of the last byte of each connection. The connection that has been silent for the longest time is the first.
last_byte: dict[asyncio.Task[None], float] = {}


def note_byte(connection: asyncio.Task[None]) -> None:
    if last_byte.pop(connection, None) is not None:
        last_byte[connection] = asyncio.get_running_loop().time()


def make_room() -> bool:
    """Ends the connection that has been silent for the longest time. False: none has been silent long enough."""
    oldest = next(iter(last_byte))
    if asyncio.get_running_loop().time() - last_byte[oldest] < SILENT_FOR:
        return False
    del last_byte[oldest]
    return oldest.cancel()


def is_denied(to: tproxy.SockAddr, options: argparse.Namespace) -> bool:
    address = ipaddress.ip_address(to[0].partition("%")[0])
    # A v4-mapped address is compared as IPv4.
    address = getattr(address, "ipv4_mapped", None) or address
    return any(address in network for network in options.deny) or is_this_host(to)


def is_this_host(to: tproxy.SockAddr) -> bool:
    """Whether the kernel chooses the destination as the source address of a packet to it."""
    with socket.socket(socket.AF_INET6 if ":" in to[0] else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((to[0], 9, *to[2:]))
        except OSError:
            return False
        return bool(sock.getsockname()[0].partition("%")[0] == to[0].partition("%")[0])


def reset(writer: asyncio.StreamWriter) -> None:
    """Resets a connection. close() would wait until the peer has read all data."""
    with contextlib.suppress(OSError):
        on_close = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, on_close)
    writer.transport.abort()


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: asyncio.Task[None]) -> None:
    """Passes data on, and then the end of stream."""
    while data := await reader.read(65536):
        note_byte(connection)
        writer.write(data)
        await writer.drain()
        note_byte(connection)
    writer.write_eof()


async def relay(pumps: list[asyncio.Task[None]], connection: asyncio.Task[None], idle: float) -> None:
    """Runs until both directions have ended, one has failed, or no byte has moved for `idle` seconds."""
    try:
        while running := [one for one in pumps if not one.done()]:
            left = last_byte[connection] + idle - asyncio.get_running_loop().time()
            if left <= 0:
                raise TimeoutError
            done, _ = await asyncio.wait(running, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            for one in done:
                one.result()
    finally:
        for one in pumps:
            one.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def within(seconds: float, work: Awaitable[T]) -> T:
    """Like asyncio.wait_for(), which before Python 3.12 can lose the cancellation that ends the program."""
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait([task], timeout=seconds)
        if not done:
            raise TimeoutError
        return task.result()
    finally:
        task.cancel()


async def handle(
    options: argparse.Namespace, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, to: tproxy.SockAddr
) -> None:
    client = writer.get_extra_info("peername")
    connection = asyncio.current_task()
    assert connection
    if client is None or is_denied(to, options) or (len(last_byte) >= options.connections and not make_room()):
        reset(writer)
        return
    print(f"intercepted {client[0]} port {client[1]} -> {to[0]} port {to[1]}", flush=True)
    last_byte[connection] = asyncio.get_running_loop().time()
    writers = [writer]

    async def dial() -> asyncio.StreamReader:
        from_server, to_server = await tproxy.open_connection_from(client, to)
        writers.append(to_server)
        return from_server

    try:
        from_server = await within(options.connect, dial())
        to_server = writers[-1]
        note_byte(connection)
        directions = [(reader, to_server), (from_server, writer)]
        await relay([asyncio.create_task(pump(*one, connection)) for one in directions], connection, options.idle)
        # Sends the remaining data, within the time limit.
        for one in writers:
            one.close()
        await within(options.idle, asyncio.gather(*(one.wait_closed() for one in writers)))
    except OSError:
        # A client or a server that disconnects is not a fault of the proxy. TimeoutError is an OSError too.
        pass
    finally:
        last_byte.pop(connection, None)
        for one in writers:
            reset(one)


async def main(options: argparse.Namespace) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    # The end does not wait for clients: their connections are closed when the loop ends.
    server = await tproxy.start_server(partial(handle, options), ("::", options.listen_port))
    with contextlib.closing(server), tproxy.install_rules(listeners=server.sockets, ports=options.ports):
        print("listening", flush=True)
        await stop.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    prefix = partial(ipaddress.ip_network, strict=False)
    denied = [ipaddress.ip_network(one) for one in DENIED]
    parser.add_argument("--deny", metavar="PREFIX", type=prefix, action="append", default=denied)
    parser.add_argument("--connections", metavar="N", type=int, default=1000)
    parser.add_argument("--connect", metavar="SECONDS", type=float, default=20)
    parser.add_argument("--idle", metavar="SECONDS", type=float, default=300)
    parser.add_argument("listen_port", metavar="LISTEN-PORT", type=int)
    parser.add_argument("ports", metavar="PORT", type=int, nargs="+")
    asyncio.run(main(parser.parse_args()))
