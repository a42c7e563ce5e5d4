#!/usr/bin/env python3
"""Replies to DNS queries from the addresses of the servers that they were sent to.

    dns_interceptor.py LISTEN-PORT NAME ADDRESS

Intercepts the DNS queries that this host would forward to any server. The reply
to a query for NAME is ADDRESS (IPv4 or IPv6). Every other name does not exist.

It stores no query and opens no connection, so it needs no limits and no list of
denied destinations.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import struct
import sys

import tproxy

A, AAAA, ANSWER, NO_SUCH_NAME = 1, 28, 0x8400, 0x8403


def answer(query: bytes, name: str, address: str) -> bytes:
    """Returns the reply to a query (RFC 1035), with at most one record. Raises ValueError for other data."""
    if len(query) < 12 or query[2] & 0x80:
        raise ValueError("the header is missing, or the message is a reply")
    labels, at = [], 12
    while at < len(query) and (length := query[at]):
        labels.append(query[at + 1 : at + 1 + length].decode("ascii"))
        at += 1 + length
    if len(query) < at + 5:
        raise ValueError("the question is truncated")
    (kind,) = struct.unpack_from("!H", query, at + 1)
    question, ip = query[12 : at + 5], ipaddress.ip_address(address)
    if ".".join(labels).lower() != name.lower():
        return query[:2] + struct.pack("!5H", NO_SUCH_NAME, 1, 0, 0, 0) + question
    fits = kind == (A if ip.version == 4 else AAAA)
    # 0xC00C refers to the name in the question. Class IN, TTL 60 seconds.
    record = struct.pack("!3HIH", 0xC00C, kind, 1, 60, len(ip.packed)) + ip.packed if fits else b""
    return query[:2] + struct.pack("!5H", ANSWER, 1, int(fits), 0, 0) + question + record


async def main(port: int, name: str, address: str) -> None:
    async with await tproxy.open_datagram_endpoint(("::", port)) as endpoint:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, endpoint.close)
        with tproxy.install_rules(listeners=[endpoint.socket], ports=[53]):
            print("listening", flush=True)
            async for query, client, server in endpoint:
                # Ignores data that is not a query, and replies that cannot be sent within a second.
                with contextlib.suppress(ValueError, OSError, asyncio.TimeoutError):
                    if server:
                        await asyncio.wait_for(endpoint.reply(answer(query, name, address), client, server), 1)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], sys.argv[3]))
