#!/usr/bin/env python3
"""What orig_dst() and recvfrom() cost beside the same by hand.

    bench.py [ROUNDS]

By hand: Python's socket module, and struct for what that gives as bytes, as
one would write it who knows both well: the same answers for the same sockets,
and the same refusals. The two take turns, in rounds that are short beside the
machine's own moods: nanoseconds a call of this thread's time, the medians, and
the median of how they compare in each round. In a network of its own.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import time
from statistics import median
from typing import Any, Callable, NamedTuple

import tproxy

IP_TRANSPARENT = 19
SO_ORIGINAL_DST = 80
IP_ORIGDSTADDR = 20
IPV6_ORIGDSTADDR = 74
IN = struct.Struct("!2xH4s8x")
IN6 = struct.Struct("!2xHI16sI")
WILDCARDS = ("0.0.0.0", "::", "::ffff:0.0.0.0")


def orig_dst_by_hand(sock: socket.socket) -> Any:
    transparent = sock.getsockopt(socket.SOL_IP, IP_TRANSPARENT)
    name = sock.getsockname()
    if transparent:
        if name[0] in WILDCARDS or not name[1]:
            raise ValueError("not an accepted connection")
        return name
    if len(name) == 2 or name[0].startswith("::ffff:"):
        port, ip = IN.unpack(sock.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, IN.size))
        host = socket.inet_ntoa(ip)
        to: Any = (host, port) if len(name) == 2 else ("::ffff:" + host, port, 0, 0)
    else:
        port, flow, ip, scope = IN6.unpack(sock.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, IN6.size))
        to = (socket.inet_ntop(socket.AF_INET6, ip), port, flow, socket.ntohl(scope))
    if to == name:
        raise ValueError("not intercepted")
    return to


V4_MAPPED = bytes(10) + b"\xff\xff"
UNSPECIFIED = bytes(16)


def recvfrom_by_hand(sock: socket.socket, size: int) -> Any:
    data, control, _, client = sock.recvmsg(size, 512)
    for level, kind, body in control:
        if level == socket.SOL_IP and kind == IP_ORIGDSTADDR:
            port, ip = IN.unpack(body)
            host = socket.inet_ntoa(ip)
            return data, client, (host, port) if len(client) == 2 else ("::ffff:" + host, port, 0, 0)
        if level == socket.IPPROTO_IPV6 and kind == IPV6_ORIGDSTADDR:
            port, flow, ip, scope = IN6.unpack(body)
            # A careful program would not answer from what a sender forged, either.
            if ip[:12] == V4_MAPPED or ip == UNSPECIFIED:
                return data, client, None
            return data, client, (socket.inet_ntop(socket.AF_INET6, ip), port, flow, socket.ntohl(scope))
    return data, client, None


class Cost(NamedTuple):
    """Nanoseconds a call."""

    what: str
    ours: float
    by_hand: float
    ratio: float


def compare(
    what: str,
    ours: Callable[..., Any],
    by_hand: Callable[..., Any],
    arguments: tuple[Any, ...],
    prepare: Callable[[int], Any],
    rounds: int,
) -> Cost:
    calls = 100

    def cost_of(call: Callable[..., Any]) -> float:
        prepare(calls)
        # Others may have the processor in between.
        began = time.thread_time_ns()
        for _ in range(calls):
            call(*arguments)
        return (time.thread_time_ns() - began) / calls

    prepare(1)
    answer = ours(*arguments)
    prepare(1)
    assert answer == by_hand(*arguments)
    pairs = []
    for at in range(rounds):
        if at % 2:
            first = cost_of(ours)
            pairs.append((first, cost_of(by_hand)))
        else:
            first = cost_of(by_hand)
            pairs.append((cost_of(ours), first))
    return Cost(what, median(a for a, _ in pairs), median(b for _, b in pairs), median(a / b for a, b in pairs))


class Kind(NamedTuple):
    """A kind of connection or datagram: where the socket listens, to whom it goes."""

    name: str
    any: str
    to: str

    @property
    def family(self) -> socket.AddressFamily:
        return socket.AF_INET6 if ":" in self.any else socket.AF_INET


KINDS = (
    Kind("IPv4", "0.0.0.0", "192.0.2.1"),
    Kind("IPv6", "::", "2001:db8::1"),
    Kind("v4-mapped", "::", "::ffff:192.0.2.1"),
)


def of_streams(by: str, kind: Kind, listener: socket.socket, rounds: int) -> Cost:
    """The host's own connection to somebody else, by way of loopback."""
    flags = tproxy.RulesFlag.LOCAL_OUTPUT | (tproxy.RulesFlag.REDIRECT if by == "REDIRECT" else 0)
    with listener, tproxy.install_rules(listeners=[listener], ports=[80], flags=flags):
        with socket.create_connection((kind.to, 80)), listener.accept()[0] as stream:
            assert tproxy.orig_dst(stream)[:2] == (kind.to, 80)
            name = f"orig_dst, {by}, {kind.name}"
            return compare(name, tproxy.orig_dst, orig_dst_by_hand, (stream,), lambda _: None, rounds)


def by_tproxy(kind: Kind, rounds: int) -> Cost:
    return of_streams("TPROXY", kind, tproxy.listen((kind.any, 0)), rounds)


def by_redirect(kind: Kind, rounds: int) -> Cost:
    six = kind.family == socket.AF_INET6
    return of_streams("REDIRECT", kind, socket.create_server(("", 0), family=kind.family, dualstack_ipv6=six), rounds)


def of_datagrams(kind: Kind, rounds: int) -> Cost:
    with tproxy.socket(kind.family, socket.SOCK_DGRAM) as sock, socket.socket(kind.family, socket.SOCK_DGRAM) as sender:
        sock.bind((kind.any, 0))
        port = sock.getsockname()[1]
        # This host is all of 127.0.0.0/8, and ::1.
        mine = {"IPv4": "127.0.0.{}", "IPv6": "::1", "v4-mapped": "::ffff:127.0.0.{}"}[kind.name]

        def send(count: int) -> None:
            for at in range(count):
                sender.sendto(b"x" * 100, (mine.format(at + 1), port))

        return compare(f"recvfrom, {kind.name}", tproxy.recvfrom, recvfrom_by_hand, (sock, 2048), send, rounds)


def costs(rounds: int) -> list[Cost]:
    """In this thread's network, whose loopback is up and leads everywhere."""
    return [measure(kind, rounds) for measure in (by_tproxy, by_redirect, of_datagrams) for kind in KINDS]


def main(rounds: int) -> int:
    print(f"Python {sys.version.split()[0]}: nanoseconds a call; the target is 1.0")
    found = costs(rounds)
    for cost in found:
        verdict = "met" if cost.ratio <= 1 else "not met"
        print(f"{cost.what:29} {cost.ours:7.0f} by hand {cost.by_hand:7.0f}  {cost.ratio:.3f}  {verdict}")
    return 0 if all(cost.ratio <= 1 for cost in found) else 1


if __name__ == "__main__":
    if "--inside" not in sys.argv:
        network = "ip link set lo up && ip -4 route add default dev lo && ip -6 route add default dev lo"
        inside = ["sh", "-c", network + ' && exec "$@"', "sh", sys.executable, *sys.argv, "--inside"]
        os.execvp("unshare", ["unshare", "--map-root-user", "--net", *inside])
    sys.exit(main(int(sys.argv[1]) if sys.argv[1] != "--inside" else 1500))
