#!/usr/bin/env python3
"""A transparent TCP proxy.

    tcp_proxy.py LISTEN-PORT PORT...

intercepts every connection that this host would forward to one of the PORTs,
over IPv4 and IPv6, and connects onward from the client's own address. Until
SIGINT or SIGTERM, which leave nothing behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys

import tproxy


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Passes on what comes, and the end of it."""
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.write_eof()


async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, to: tproxy.SockAddr) -> None:
    client = writer.get_extra_info("peername")
    print(f"intercepted {client[0]} port {client[1]} -> {to[0]} port {to[1]}", flush=True)
    # A client or a server that goes is their own affair.
    with contextlib.suppress(OSError), contextlib.closing(writer):
        from_server, to_server = await tproxy.open_connection_from(client, to)
        with contextlib.closing(to_server):
            await asyncio.gather(pump(reader, to_server), pump(from_server, writer))


async def main(port: int, ports: list[int]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    # Its end does not wait for the clients: they are cut off when the loop ends.
    with contextlib.closing(await tproxy.start_server(handle, ("::", port))) as server:
        with tproxy.install_rules(listeners=server.sockets, ports=ports):
            print("listening", flush=True)
            await stop.wait()


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    asyncio.run(main(int(sys.argv[1]), [int(port) for port in sys.argv[2:]]))
