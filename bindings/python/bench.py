#!/usr/bin/env python3
"""What orig_dst() and recvfrom() cost beside the same by hand.

    bench.py

By hand: Python's socket module, and struct for what that gives as bytes, with
the same answers for the same sockets. Nanoseconds a call, the best of many
rounds that take turns, and how they compare. In a network of its own.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import time
from typing import Any, Callable, NamedTuple

import tproxy

IP_TRANSPARENT = 19
SO_ORIGINAL_DST = 80
IP_ORIGDSTADDR = 20
IPV6_ORIGDSTADDR = 74
IN = struct.Struct("!2xH4s8x")
IN6 = struct.Struct("!2xHI16s4x")
WILDCARDS = ("0.0.0.0", "::", "::ffff:0.0.0.0")


def orig_dst_by_hand(sock: socket.socket) -> Any:
    if sock.getsockopt(socket.SOL_IP, IP_TRANSPARENT):
        name = sock.getsockname()
        if name[0] in WILDCARDS or name[1] == 0:
            raise ValueError("not an accepted connection")
        return name
    if sock.family == socket.AF_INET:
        port, ip = IN.unpack(sock.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, IN.size))
        return socket.inet_ntop(socket.AF_INET, ip), port
    port, flow, ip = IN6.unpack(sock.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, IN6.size))
    return socket.inet_ntop(socket.AF_INET6, ip), port, flow, 0


def recvfrom_by_hand(sock: socket.socket, size: int) -> Any:
    data, control, _, client = sock.recvmsg(size, 192)
    for level, kind, body in control:
        if level == socket.SOL_IP and kind == IP_ORIGDSTADDR:
            port, ip = IN.unpack(body)
            return data, client, (socket.inet_ntop(socket.AF_INET, ip), port)
        if level == socket.IPPROTO_IPV6 and kind == IPV6_ORIGDSTADDR:
            port, flow, ip = IN6.unpack(body)
            return data, client, (socket.inet_ntop(socket.AF_INET6, ip), port, flow, 0)
    return data, client, None


class Cost(NamedTuple):
    """Nanoseconds a call."""

    what: str
    ours: float
    by_hand: float

    @property
    def ratio(self) -> float:
        return self.ours / self.by_hand


def compare(
    what: str, ours: Callable[[], Any], by_hand: Callable[[], Any], prepare: Callable[[int], Any], rounds: int
) -> Cost:
    """Takes turns, in rounds that are short beside the machine's own moods; the best of each."""
    calls = 100
    prepare(2)
    assert ours() == by_hand()
    best = {ours: float("inf"), by_hand: float("inf")}
    for at in range(rounds):
        for call in (ours, by_hand) if at % 2 else (by_hand, ours):
            prepare(calls)
            began = time.perf_counter_ns()
            for _ in range(calls):
                call()
            best[call] = min(best[call], (time.perf_counter_ns() - began) / calls)
    return Cost(what, best[ours], best[by_hand])


def of_a_stream(what: str, stream: socket.socket, rounds: int) -> Cost:
    return compare(what, lambda: tproxy.orig_dst(stream), lambda: orig_dst_by_hand(stream), lambda _: None, rounds)


def by_tproxy(name: str, host: str, rounds: int) -> Cost:
    with tproxy.listen((host, 0)) as listener:
        with socket.create_connection(listener.getsockname()[:2]), listener.accept()[0] as stream:
            return of_a_stream(f"orig_dst, TPROXY, {name}", stream, rounds)


def by_redirect(name: str, host: str, rounds: int) -> Cost:
    """The host's own connection to somebody else, by way of loopback."""
    elsewhere = "2001:db8::1" if ":" in host else "192.0.2.1"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    flags = tproxy.RulesFlag.REDIRECT | tproxy.RulesFlag.LOCAL_OUTPUT
    with socket.create_server(("", 0), family=family) as listener:
        with tproxy.install_rules(listeners=[listener], ports=[80], flags=flags):
            with socket.create_connection((elsewhere, 80)), listener.accept()[0] as stream:
                assert tproxy.orig_dst(stream)[0] == elsewhere
                return of_a_stream(f"orig_dst, REDIRECT, {name}", stream, rounds)


def of_datagrams(name: str, host: str, rounds: int) -> Cost:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with tproxy.socket(family, socket.SOCK_DGRAM) as sock, socket.socket(family, socket.SOCK_DGRAM) as sender:
        sock.bind((host, 0))
        sender.connect(sock.getsockname())

        def send(count: int) -> None:
            for _ in range(count):
                sender.send(b"x" * 100)

        ours, by_hand = (lambda: tproxy.recvfrom(sock, 2048)), (lambda: recvfrom_by_hand(sock, 2048))
        return compare(f"recvfrom, {name}", ours, by_hand, send, rounds)


def costs(rounds: int = 1500) -> list[Cost]:
    """In this thread's network, whose loopback is up and leads everywhere."""
    hosts = (("IPv4", "127.0.0.1"), ("IPv6", "::1"))
    return [measure(*host, rounds) for measure in (by_tproxy, by_redirect, of_datagrams) for host in hosts]


def main() -> int:
    print(f"Python {sys.version.split()[0]}: nanoseconds a call; the target is 1.0")
    found = costs()
    for cost in found:
        verdict = "met" if cost.ratio <= 1 else "not met"
        print(f"{cost.what:24} {cost.ours:7.0f} by hand {cost.by_hand:7.0f}  {cost.ratio:.2f}  {verdict}")
    return 0 if all(cost.ratio <= 1 for cost in found) else 1


if __name__ == "__main__":
    if sys.argv[1:] != ["--inside"]:
        network = "ip link set lo up && ip -4 route add default dev lo && ip -6 route add default dev lo"
        inside = ["sh", "-c", network + ' && exec "$@"', "sh", sys.executable, __file__, "--inside"]
        os.execvp("unshare", ["unshare", "--map-root-user", "--net", *inside])
    sys.exit(main())
