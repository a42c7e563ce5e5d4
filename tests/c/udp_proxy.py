"""udp_proxy under conditions that the demo does not have.

    udp_proxy.py DIRECTORY-OF-THE-PROGRAMS

Runs itself in namespaces of its own, as the demo does. Exits non-zero with a
sentence if something is not as it should be.
"""

import math
import os
import re
import resource
import signal
import socket
import subprocess
import time

import hosts
from hosts import demo, limit, on

SOL_UDP, UDP_SEGMENT = 17, 103
PORT = 5353
# Addresses that no host owns.
NOBODY = {"IPv4": "192.0.2.77", "IPv6": "2001:db8:77::77"}


def start(programs, *options):
    """Starts the proxy. Returns it, and the limits of sessions and descriptors that it prints."""
    proxy = demo.Program("proxy", os.path.join(programs, "udp_proxy"), *options, "3129", f"{PORT}-{PORT + 1}")
    proxy.bounds = list(map(int, re.findall(r"\d+", proxy.expect("listening"))))
    assert proxy.bounds, "udp_proxy did not start"
    return proxy


def end(proxy, number=signal.SIGTERM):
    proxy.process.send_signal(number)
    assert proxy.process.wait(demo.PATIENCE) == 0
    left = demo.leftovers()
    assert not left, f"it left {left}"


def statistics(proxy):
    proxy.process.send_signal(signal.SIGUSR1)
    line = "sessions: " + proxy.expect("sessions:")
    counts = {"now": int(re.search(r"sessions: (\d+)", line)[1])}
    for part in line.split(";"):
        head, _, rest = part.strip().partition(":")
        counts.update({f"{head} {name}": int(value) for name, value in re.findall(r"([a-z]+) (\d+)", rest)})
        counts[head] = int(re.search(r"\d+", rest)[0])
    return counts


def eventually(proxy, what, condition):
    deadline = time.monotonic() + demo.PATIENCE
    while not condition(statistics(proxy)):
        assert time.monotonic() < deadline, f"{what}: {statistics(proxy)}"
        time.sleep(0.05)


def open_socket(host, addr, port=0):
    def body():
        family = socket.AF_INET6 if ":" in addr else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_DGRAM)
        sock.bind((addr, port))
        sock.settimeout(demo.PATIENCE)
        return sock

    return on(host, body)


def heard(sock):
    """Receives a datagram. Returns the data, and the sender's address and port."""
    data, sender = sock.recvfrom(65536)
    return data, sender[:2]


def exchange(client, server, asked, words):
    """Sends a request to an address. The server replies to the client that it sees, and the reply comes from the address."""
    client.sendto(words, (asked, PORT))
    data, seen = heard(server)
    assert data == words, f"{len(data)} bytes arrived of {len(words)}"
    server.sendto(b"to " + words, seen)
    data, sender = heard(client)
    assert data == b"to " + words and sender == (asked, PORT), f"{sender} answered in place of {asked}"
    return seen


def relays(programs):
    """The server sees the client. All datagrams of a client use one session, whatever their length."""
    proxy = start(programs)
    for _, addr, server_addr in demo.FETCHES:
        server = open_socket("server", server_addr, PORT)
        client = open_socket("client", addr)
        for words in (b"first", b"", b"x" * 8000, b"y" * 65_000, b"last"):
            seen = exchange(client, server, server_addr, words)
            assert seen == client.getsockname()[:2], f"the server saw {seen}"
        # A batch that the kernel splits: the datagrams and the replies arrive one by one.
        many = [bytes([number]) * (1000 if number < 9 else 300) for number in range(10)]
        for sender, to, receiver in ((client, (server_addr, PORT), server), (server, seen, client)):
            sender.setsockopt(SOL_UDP, UDP_SEGMENT, 1000)
            sender.sendto(b"".join(many), to)
            assert [heard(receiver)[0] for _ in many] == many
        server.close()
    counts = statistics(proxy)
    assert counts["now"] == counts["sessions opened"] == 2, counts
    assert counts["requests unsent"] == counts["replies unsent"] == 0, counts
    # A batch that was received was passed on as a batch.
    assert counts["requests"] < 2 * (5 + 10), counts
    end(proxy)


def one_server_for_all(programs):
    """One socket sends requests to several addresses that no host owns. Each reply comes from the address of its request."""
    options = [f"--to={demo.at_port(server, PORT + 1)}" for _, _, server in demo.FETCHES]
    proxy = start(programs, *options)
    for family, addr, server_addr in demo.FETCHES:
        server = open_socket("server", server_addr, PORT + 1)
        client = open_socket("client", addr)
        asked = [(NOBODY[family], PORT), (NOBODY[family][:-1] + "8", PORT), (NOBODY[family], PORT + 1)]
        for number, to in enumerate(asked):
            client.sendto(bytes([number]), to)
        answers = [heard(server) for _ in asked]
        assert {seen[0] for _, seen in answers} == {addr} and len({seen for _, seen in answers}) == len(asked), answers
        for data, seen in reversed(answers):
            server.sendto(data, seen)
        for data, sender in [heard(client) for _ in asked]:
            assert sender == asked[data[0]], f"{sender} answered in place of {asked[data[0]]}"
        server.close()
    end(proxy, signal.SIGINT)


def silence_ends_a_session(programs):
    proxy = start(programs, "--idle", str(math.ceil(limit(3))))
    _, addr, server_addr = demo.FETCHES[0]
    server, client = open_socket("server", server_addr, PORT), open_socket("client", addr)
    # The session lasts longer than the limit while one side sends.
    seen = exchange(client, server, server_addr, b"hello")
    for _ in range(4):
        time.sleep(limit(0.9))
        server.sendto(b"still here", seen)
        assert heard(client) == (b"still here", (server_addr, PORT))
    assert statistics(proxy)["now"] == 1
    eventually(proxy, "a silent session goes on", lambda counts: counts["now"] == 0 and counts["sessions idle"] == 1)
    exchange(client, server, server_addr, b"hello again")
    assert statistics(proxy)["sessions opened"] == 2
    end(proxy)


def few_sessions(programs):
    """Twelve clients with four sessions: the most recently used sessions remain, and other clients get new ones."""
    proxy = start(programs, "--sessions", "4", "--verbose")
    _, addr, server_addr = demo.FETCHES[1]
    server = open_socket("server", server_addr, PORT)
    clients = [open_socket("client", addr) for _ in range(12)]
    for client in clients:
        exchange(client, server, server_addr, b"hello")
        name = demo.at_port(*client.getsockname()[:2])
        assert proxy.expect("intercepted ") == f"{name} -> {demo.at_port(server_addr, PORT)}"
        descriptors = len(os.listdir(f"/proc/{proxy.process.pid}/fd"))
        assert descriptors <= proxy.bounds[1], f"{descriptors} descriptors of {proxy.bounds[1]}"
    for client, opened in ((clients[8], 12), (clients[0], 13), (clients[8], 13), (clients[9], 14)):
        exchange(client, server, server_addr, b"hello")
        counts = statistics(proxy)
        assert counts["now"] == 4 and counts["sessions opened"] == opened, counts
    end(proxy)


def a_server_that_refuses(programs):
    """Without a server, its host sends ICMP errors only to the proxy. The session works as soon as the server listens."""
    proxy = start(programs)
    for _, addr, server_addr in demo.FETCHES:
        client = open_socket("client", addr)
        client.connect((server_addr, PORT))
        before = statistics(proxy)
        for number in range(3):
            client.send(b"is anybody there?")
            refused = before["requests refused"] + number
            eventually(proxy, "no refusal", lambda counts, n=refused: counts["requests refused"] > n)
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0, "the client heard of a refusal"
        client.close()
        client = open_socket("client", addr)
        server = open_socket("server", server_addr, PORT)
        exchange(client, server, server_addr, b"hello")
        assert statistics(proxy)["sessions opened"] == before["sessions opened"] + 2
        server.close()
    end(proxy)


def bad_arguments(programs):
    for bad in (
        ["3129"],
        ["3129", "53,54"],
        ["3129", "0"],
        ["--idle", "0", "3129", "53"],
        ["--sessions", "x", "3129", "53"],
        ["--to", "192.0.2.1", "3129", "53"],
        ["--to", "192.0.2.1:0", "3129", "53"],
        ["--dst", "192.0.2.1/33", "3129", "53"],
        ["--what", "3129", "53"],
        ["--deny", "192.0.2.0/33", "3129", "53"],
        ["--deny", "example.org", "3129", "53"],
    ):
        outcome = subprocess.run([os.path.join(programs, "udp_proxy"), *bad], capture_output=True, check=False)
        assert outcome.returncode == 2 and outcome.stderr, f"udp_proxy {bad}: status {outcome.returncode}"


def only_some_destinations(programs):
    proxy = start(programs, "--dst", f"{demo.FETCHES[0][2]}/32", "--dst", "2001:db8:ffff::/48")
    for _, addr, server_addr in demo.FETCHES:
        server, client = open_socket("server", server_addr, PORT), open_socket("client", addr)
        exchange(client, server, server_addr, b"hello")
        server.close()
    assert statistics(proxy)["sessions opened"] == 1
    end(proxy)


# Addresses of the proxy's host, and a port that only rules of another program intercept.
OWN = {"IPv4": "198.51.100.1", "IPv6": "2001:db8:1::1"}
TEXTBOOK_PORT = 6000


def impossible_addresses_get_no_session(programs):
    """Datagrams from or to addresses that no other host can have are dropped, whichever rules intercept them."""
    hosts.textbook("udp", TEXTBOOK_PORT)
    # rp_filter, which would drop forged IPv4 sources, is disabled on such a host.
    for name in ("accept_local=1", "route_localnet=1", "rp_filter=0"):
        key, value = name.split("=")
        for interface in ("all", "eth0"):
            demo.run(*demo.on("proxy", "sh", "-c", f"echo {value} > /proc/sys/net/ipv4/conf/{interface}/{key}"))
    proxy = start(programs)
    server4, server6 = (server for _, _, server in demo.FETCHES)
    client4, client6 = (client for _, client, _ in demo.FETCHES)
    mapped = [f"::ffff:{addr}" for addr in ("127.0.0.1", OWN["IPv4"], "0.0.0.0", "255.255.255.255")]
    mapped_foreign = [f"::ffff:{client4}", f"::ffff:{server4}"]
    bad4 = [OWN["IPv4"], "127.0.0.1", "0.0.0.0", "198.51.100.255", "255.255.255.255", "224.0.0.9", "203.0.113.1"]
    bad6 = [OWN["IPv6"], "::1", "::", "ff02::9", "::198.51.100.1", "2001:db8:2::1", *mapped, *mapped_foreign]
    pairs = [(bad, server4) for bad in bad4] + [(client4, bad) for bad in bad4] + [(OWN["IPv4"], OWN["IPv4"])]
    pairs += [(bad, server6) for bad in bad6] + [(client6, bad) for bad in bad6] + [(a, b) for a in bad6 for b in bad6]
    # A service only for this host, which an attacker tries to reach, and a server that replies.
    inner = [open_socket("proxy", addr, TEXTBOOK_PORT) for addr in ("127.0.0.1", "::1", *OWN.values())]
    servers = [open_socket("server", addr, TEXTBOOK_PORT) for addr in (server4, server6)]
    for sock in (*inner, *servers):
        sock.settimeout(0)
    for number in range(0, len(pairs), 16):
        some = pairs[number : number + 16]
        hosts.inject(hosts.datagram(src, 4444, dst, TEXTBOOK_PORT, f"{src} to {dst}".encode()) for src, dst in some)
        # A valid datagram follows on the same path: after its reply, all were processed.
        client = open_socket("client", client6)
        client.sendto(b"last", (server6, TEXTBOOK_PORT))
        deadline = time.monotonic() + demo.PATIENCE
        data = b""
        while data != b"last" and time.monotonic() < deadline:
            for server in servers:
                try:
                    data, seen = server.recvfrom(200)
                except BlockingIOError:
                    time.sleep(0.005)
                    continue
                server.sendto(b"answer", seen)
                assert data == b"last", f"the server got {data}"
        assert heard(client) == (b"answer", (server6, TEXTBOOK_PORT))
        client.close()
        for sock in inner:
            try:
                raise AssertionError(f"a service on {sock.getsockname()[0]} of the proxy's host got {sock.recv(200)}")
            except BlockingIOError:
                pass
    counts = statistics(proxy)
    good = (len(pairs) + 15) // 16
    assert counts["sessions opened"] == counts["replies"] == good, counts
    # These reached the listener, so the proxy itself refused them.
    assert counts["sessions denied"] >= 8, counts
    demo.run(*demo.on("proxy", "nft", "delete table inet textbook"))
    end(proxy)


def addresses_that_come_later(programs):
    """A client's address becomes an address of the proxy's host: the session ends, and replies do not loop."""
    proxy = start(programs)
    for _, addr, server_addr in demo.FETCHES:
        server, client = open_socket("server", server_addr, PORT), open_socket("client", addr)
        other = open_socket("client", addr)
        seen = exchange(client, server, server_addr, b"hello")
        before = statistics(proxy)
        demo.run(*demo.on("proxy", "ip", "addr", "add", addr, "dev", "lo", *(["nodad"] if ":" in addr else [])))
        server.sendto(b"an answer", seen)
        eventually(proxy, "the session goes on", lambda counts, n=before["now"] - 1: counts["now"] <= n)
        time.sleep(0.3)
        after = statistics(proxy)
        assert after["replies"] <= before["replies"] + 8, f"{after['answers'] - before['answers']} answers to one datagram"
        # A prefix with a local route counts as this host's own. Other addresses do not.
        demo.run(*demo.on("proxy", "ip", "addr", "del", addr, "dev", "lo"))
        network = f"{addr}/{128 if ':' in addr else 32}"
        exchange(other, server, server_addr, b"hello again")
        demo.run(*demo.on("proxy", "ip", "route", "add", "local", network, "dev", "lo"))
        eventually(proxy, "the session goes on", lambda counts, n=before["now"] - 1: counts["now"] <= n)
        demo.run(*demo.on("proxy", "ip", "route", "del", "local", network, "dev", "lo"))
        server.close()
    # Addresses of no session, and addresses that are not local, end no session.
    server, client = open_socket("server", server_addr, PORT), open_socket("client", addr)
    exchange(client, server, server_addr, b"hello")
    opened = statistics(proxy)["sessions opened"]
    for route in ("198.18.0.0/15", "2001:db8:9::/48"):
        demo.run(*demo.on("proxy", "ip", "route", "add", "local", route, "dev", "lo"))
    for family in ("-4", "-6"):
        demo.run(*demo.on("proxy", "ip", family, "route", "add", "local", "default", "dev", "lo", "table", "77"))
    exchange(client, server, server_addr, b"hello")
    assert statistics(proxy)["sessions opened"] == opened
    server.close()
    end(proxy)


def denied_destinations(programs):
    """Metadata services are denied, unless the list is cleared. --deny denies further destinations."""
    metadata = hosts.metadata_service()
    servers = [server for _, _, server in demo.FETCHES]
    clients = dict(zip((*metadata, *servers), [addr for _, addr, _ in demo.FETCHES] * 2))
    for options, denied in (
        ([], metadata),
        (["--deny", "none"], ()),
        (["--deny", "none", "--deny", "203.0.113.0/24", "--deny", "2001:db8:2::2"], servers),
        (["--deny", "::ffff:203.0.113.2", "--deny", "2001:db8:3::/48", "--deny", "::/0"], (*metadata, *servers)),
    ):
        proxy = start(programs, *options)
        for addr, client_addr in clients.items():
            server, client = open_socket("server", addr, PORT), open_socket("client", client_addr)
            if addr in denied:
                before = statistics(proxy)["sessions denied"]
                client.sendto(b"secrets?", (addr, PORT))
                eventually(proxy, f"{addr} is not denied", lambda counts, n=before: counts["sessions denied"] == n + 1)
                server.settimeout(0)
                try:
                    raise AssertionError(f"{addr} got {server.recv(100)} in spite of {options}")
                except BlockingIOError:
                    pass
            else:
                exchange(client, server, addr, b"hello")
            server.close()
        end(proxy)


def no_descriptors(programs):
    """With fewer descriptors than the proxy expects, and many clients that send once, it continues to serve clients."""
    proxy = start(programs, "--sessions", "200")
    _, addr, server_addr = demo.FETCHES[0]
    server = open_socket("server", server_addr, PORT)
    now = len(os.listdir(f"/proc/{proxy.process.pid}/fd"))
    resource.prlimit(proxy.process.pid, resource.RLIMIT_NOFILE, (now + 20, now + 20))
    clients = [open_socket("client", addr) for _ in range(100)]
    for client in clients:
        exchange(client, server, server_addr, b"hello")
    counts = statistics(proxy)
    assert counts["sessions opened"] == len(clients) and counts["sessions failed"] == 0, counts
    assert counts["now"] <= 20 and counts["sessions evicted"] >= 80, counts
    server.close()
    end(proxy)


def test(programs):
    hosts.meet()
    bad_arguments(programs)
    for check in (
        relays,
        one_server_for_all,
        silence_ends_a_session,
        few_sessions,
        a_server_that_refuses,
        only_some_destinations,
        impossible_addresses_get_no_session,
        addresses_that_come_later,
        denied_destinations,
        no_descriptors,
    ):
        check(programs)


if __name__ == "__main__":
    hosts.alone(__file__, test)
