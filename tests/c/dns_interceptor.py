"""dns_interceptor: connections to the addresses of listed names are intercepted, for the time of the answer, and no others.

    dns_interceptor.py DIRECTORY-OF-THE-EXAMPLES

Runs in new namespaces, as the demo does. The exit status is not 0 if a test fails.
"""

import os
import random
import re
import signal
import socket
import struct
import subprocess
import threading
import time

import hosts
from hosts import demo, limit, on

LISTED, UNLISTED = "www.example.com", "www.example.net"
PORT = 80
# Each name has an address of its own in each family, all of the server's host.
ADDRESSES = {
    LISTED: {"A": "203.0.113.10", "AAAA": "2001:db8:2::10"},
    UNLISTED: {"A": "203.0.113.11", "AAAA": "2001:db8:2::11"},
}
TYPES = {"A": 1, "AAAA": 28, "CNAME": 5}
# Long enough for two connections.
TTL = round(limit(4))

# What the server has seen: clients of DNS, and clients of connections.
askers, callers = [], []


def name(text):
    return b"".join(bytes([len(label)]) + label.encode() for label in text.split(".")) + b"\0"


def record(owner, kind, ttl, data):
    return owner + struct.pack("!HHIH", TYPES[kind], 1, ttl, len(data)) + data


def question(text, kind, number):
    return struct.pack("!HHHHHH", number, 0x0100, 1, 0, 0, 0) + name(text) + struct.pack("!HH", TYPES[kind], 1)


def answer(query, records, flags=0x8180):
    """A response: the ID and the question of the query, and records."""
    return query[:2] + struct.pack("!HHHHH", flags, 1, len(records), 0, 0) + query[12:] + b"".join(records)


def asked(query):
    """The name and the type that a query is about."""
    labels, at = [], 12
    while query[at]:
        labels.append(query[at + 1 : at + 1 + query[at]].decode())
        at += 1 + query[at]
    kind = struct.unpack("!H", query[at + 1 : at + 3])[0]
    return ".".join(labels).lower(), next(text for text, number in TYPES.items() if number == kind)


def usual(query):
    """An alias, and the address of the alias: the owners are compressed."""
    text, kind = asked(query)
    address = ADDRESSES[text][kind]
    alias = name("alias.cdn.example")
    at = 0xC000 | (len(query) + 12)
    return [
        answer(query, [
            record(b"\xc0\x0c", "CNAME", TTL, alias),
            record(struct.pack("!H", at), kind, TTL, hosts.packed(address)),
        ])
    ]  # fmt: skip


reply_with = [usual]


def serve():
    """The server's host: DNS, and a service that says the address of its client."""

    def dns(sock):
        while True:
            query, sender = sock.recvfrom(65536)
            askers.append(sender[0])
            for response in reply_with[0](query):
                sock.sendto(response, sender)

    def service(listener):
        while True:
            connection, peer = listener.accept()
            callers.append(peer[0])
            connection.sendall(b"hello")
            threading.Thread(target=lambda connection=connection: (connection.recv(1), connection.close())).start()

    for family, _, addr in ((socket.AF_INET, *demo.FETCHES[0][1:]), (socket.AF_INET6, *demo.FETCHES[1][1:])):
        sock = socket.socket(family, socket.SOCK_DGRAM)
        sock.bind((addr, 53))
        threading.Thread(target=dns, args=(sock,), daemon=True).start()
    listener = socket.create_server(("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True)
    threading.Thread(target=service, args=(listener,), daemon=True).start()


def add_addresses():
    for addresses in ADDRESSES.values():
        for addr in addresses.values():
            nodad = ["nodad"] if ":" in addr else []
            demo.run(*demo.on("server", "ip", "addr", "add", f"{addr}/{64 if nodad else 24}", "dev", "eth0", *nodad))


def ask(resolver, query, patience=None):
    """A query of the client. Returns the response, or None."""

    def body():
        with socket.socket(socket.AF_INET6 if ":" in resolver else socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(patience or demo.PATIENCE)
            sock.sendto(query, (resolver, 53))
            try:
                response, sender = sock.recvfrom(65536)
            except TimeoutError:
                return None
            assert sender[:2] == (resolver, 53), f"{sender} answered in place of {resolver}"
            return response

    return on("client", body)


def resolve(text, kind, family):
    """The client resolves a name. The resolver sees the client."""
    client, resolver = demo.FETCHES[family == "IPv6"][1:]
    query = question(text, kind, random.randrange(65536))
    response = ask(resolver, query)
    assert response == usual(query)[0], response
    assert askers.pop() == client, f"the resolver saw {askers}"


def connects(addr):
    """The client connects to an address, and the server says hello to the client."""

    def body():
        with socket.create_connection((addr, PORT), demo.PATIENCE) as connection:
            assert connection.recv(5) == b"hello"

    on("client", body)
    client = demo.FETCHES[":" in addr][1]
    assert callers.pop().removeprefix("::ffff:") == client, "the server does not see the client"


def start(programs):
    proxy = demo.Program("proxy", os.path.join(programs, "dns_interceptor"), "3053", "3129", str(PORT), "Example.COM")
    assert proxy.expect("listening") != "nothing", "dns_interceptor did not start"
    return proxy


def end(proxy):
    proxy.process.send_signal(signal.SIGTERM)
    assert proxy.process.wait(demo.PATIENCE) == 0
    left = demo.leftovers()
    assert not left, f"it left {left}"


def counted():
    """The packets that the second instance intercepted."""
    table = demo.run(*demo.on("proxy", "nft", "list", "counter", "inet", "libtproxy-dns-tcp", "intercepted"))
    return int(re.search(r"packets (\d+)", table)[1])


def connection_is_intercepted(addr):
    before = counted()
    connects(addr)
    return counted() > before


def intercepts_listed_names_until_their_ttl(programs):
    proxy = start(programs)
    for kind, family in (("A", "IPv4"), ("AAAA", "IPv6"), ("A", "IPv6"), ("AAAA", "IPv4")):
        listed, unlisted = ADDRESSES[LISTED][kind], ADDRESSES[UNLISTED][kind]
        assert not connection_is_intercepted(listed) and not connection_is_intercepted(unlisted)
        resolve(UNLISTED, kind, family)
        begin = time.monotonic()
        resolve(LISTED, kind, family)
        assert proxy.expect("learned ") == f"{listed} of {LISTED} for {TTL} seconds"
        assert not connection_is_intercepted(unlisted), f"{UNLISTED} is intercepted"
        was = connection_is_intercepted(listed)
        assert was or time.monotonic() - begin > TTL, f"{LISTED} is not intercepted, {kind} over {family}"
        if was:
            assert proxy.expect("intercepted ").endswith(f" -> {demo.at_port(listed, PORT)}")
        time.sleep(max(0, TTL + 0.1 - (time.monotonic() - begin)))
        assert not connection_is_intercepted(listed), f"{LISTED} is intercepted after its TTL"
        assert not connection_is_intercepted(unlisted)
    end(proxy)


def learned():
    """The addresses in the sets of the second instance."""
    table = demo.run(*demo.on("proxy", "nft", "list", "table", "inet", "libtproxy-dns-tcp"))
    return set(re.findall(r"([0-9a-f.:]+) timeout", table))


def hostile_messages(programs):
    """Messages that are malformed, or about addresses that a proxy must not intercept. The client's next query works."""
    proxy = start(programs)
    resolver = demo.FETCHES[0][2]
    query = question(LISTED, "A", 7)
    good = record(b"\xc0\x0c", "A", TTL, hosts.packed("192.0.2.1"))

    def gets(response):
        """What the client gets if the server sends this response, and what is learned before."""
        reply_with[0] = lambda _: [response]
        found = ask(resolver, query, limit(1))
        return found, learned()

    # Passed on, and nothing learned: pointers to themselves and beyond the end, lengths that are too long, failures.
    for records in (
        [b"\xc0"],
        [b"\x3f" + b"a" * 10],
        [b"\x80" + good],
        [good[:-1]],
        [good[:2] + good[2:10] + b"\xff\xff" + good[12:]],
        [record(b"\xc0\x0c", "A", TTL, b"\1\2\3")],
        [record(b"\xc0\x0c", "AAAA", TTL, b"\1\2\3\4")],
        [record(b"\xc0\x0c", "A", TTL, hosts.packed(addr)) for addr in ("127.0.0.1", "0.0.0.0", "169.254.169.254", "224.0.0.1")],
        [record(b"\xc0\x0c", "A", TTL, hosts.packed(addr)) for addr in ("203.0.113.1", "198.51.100.1")],
        [record(b"\xc0\x0c", "AAAA", TTL, hosts.packed(addr)) for addr in ("::1", "::", "fe80::1", "2001:db8:1::1", "::ffff:127.0.0.1")],
    ):
        response = answer(query, records)
        found, sets = gets(response)
        assert found == response and not sets, (records, found, sets)
    for flags in (0x8183, 0x8182):
        response = answer(query, [good], flags)
        assert gets(response) == (response, set()), hex(flags)
    # Not the response to the query: dropped.
    for response in (
        b"", query, query[:11], answer(b"\0\1" + query[2:], [good]), answer(question(UNLISTED, "A", 7), [good]),
        answer(question(LISTED, "AAAA", 7), [good]), answer(query, [good])[:20],
    ):  # fmt: skip
        assert gets(response) == (None, set()), response
    # A pointer to itself is skipped, and not followed.
    loop = struct.pack("!H", 0xC000 | len(query))
    response = answer(query, [loop + good[2:]])
    assert gets(response) == (response, {"192.0.2.1"})
    # The time is bounded, and so are the addresses of one response.
    many = [record(b"\xc0\x0c", "A", 0xFFFFFFF, hosts.packed(f"192.0.2.{n}")) for n in range(2, 200)]
    found, sets = gets(answer(query, many))
    assert found is not None and 64 <= len(sets) <= 65, sets
    table = demo.run(*demo.on("proxy", "nft", "list", "table", "inet", "libtproxy-dns-tcp"))
    assert "timeout 1h" in table, table
    # Queries of clients: malformed ones are dropped, names that look listed are not.
    reply_with[0] = lambda query: [answer(query, [record(b"\xc0\x0c", "A", TTL, hosts.packed("192.0.2.250"))])]
    head = struct.pack("!HHHHHH", 9, 0x0100, 1, 0, 0, 0)
    tail = struct.pack("!HH", 1, 1)
    for bad in (
        b"", b"x", head, head + b"\xc0\x0c" + tail, head + b"\x3fa" + tail, head + name(LISTED), head + b"\x40" + b"a" * 64 + b"\0" + tail,
        head + (b"\x01a" * 128) + b"\0" + tail,
        head[:4] + b"\0\2" + head[6:] + name(LISTED) + tail, head[:2] + b"\x81" + head[3:] + name(LISTED) + tail,
    ):  # fmt: skip
        assert ask(resolver, bad, limit(0.2)) is None, bad
    # The longest name, a dot in a label, a NUL in a label, and the root.
    for odd in (b"\x01a" * 127 + b"\0", b"\x0bwww.example\x03com\0", b"\x04a\0.b\x07example\x03com\0", b"\0"):
        assert ask(resolver, head + odd + tail) is not None, odd
        assert "192.0.2.250" not in learned(), odd
    for text in ("xexample.com", "example.com.evil.example", "com", "example.co"):
        assert ask(resolver, question(text, "A", 1)) is not None
        assert "192.0.2.250" not in learned(), text
    assert ask(resolver, question("eXample.coM", "A", 1)) is not None
    assert "192.0.2.250" in learned()
    # Noise from a fixed seed.
    rng = random.Random(4093)
    for _ in range(200):
        noise = bytearray(answer(query, [good, good]))
        for _ in range(rng.randrange(1, 8)):
            noise[rng.randrange(len(noise))] = rng.randrange(256)
        reply_with[0] = lambda _, noise=noise: [bytes(noise[: rng.randrange(len(noise) + 1)])]
        ask(resolver, query, 0.01)
    reply_with[0] = usual
    askers.clear()
    resolve(LISTED, "A", "IPv4")
    end(proxy)


def refuses_bad_arguments(programs):
    for arguments in ([], ["1", "2", "3"], ["0", "2", "3", "a"], ["65536", "2", "3", "a"], ["1", "x", "3", "a"], ["1", "2", " 3", "a"], ["1", "2", "3", ""]):
        command = demo.on("proxy", os.path.join(programs, "dns_interceptor"), *arguments)
        outcome = subprocess.run(command, capture_output=True, text=True, timeout=demo.PATIENCE, check=False)
        assert outcome.returncode == 2 and outcome.stderr, (arguments, outcome)


def tests(programs):
    add_addresses()
    hosts.meet()
    on("server", serve)
    refuses_bad_arguments(programs)
    intercepts_listed_names_until_their_ttl(programs)
    hostile_messages(programs)


if __name__ == "__main__":
    hosts.alone(__file__, tests)
