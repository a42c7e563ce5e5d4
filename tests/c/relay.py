"""relay between clients and servers on the demo's hosts.

    relay.py DIRECTORY-OF-THE-PROGRAMS TCP-LOAD              each property, and a mixed load for a few seconds
    relay.py DIRECTORY-OF-THE-PROGRAMS TCP-LOAD SECONDS      the mixed load alone, as long as that
"""

import contextlib
import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time

import hosts
from hosts import demo, limit

FAMILIES = ((socket.AF_INET, "203.0.113.2"), (socket.AF_INET6, "2001:db8:2::2"))
ON = b"\x01\0\0\0\0\0\0\0"  # struct linger {1, 0}: close() resets


class Relay:
    """A relay on the proxy's host, which intercepts ports 80 to 89."""

    def __init__(self, programs, *options, descriptors=4096):
        command = [os.path.join(programs, "relay"), *options, "3129", "80-89"]
        self.program = demo.Program("proxy", "sh", "-c", f'ulimit -n {descriptors}; exec "$0" "$@"', *command)
        self.process = self.program.process
        assert self.program.expect("listening") != "nothing", "the relay does not start"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait(demo.PATIENCE)

    def counts(self):
        self.process.send_signal(signal.SIGUSR1)
        return json.loads("{" + self.program.expect("{"))

    def wait_for(self, **wanted):
        deadline = time.monotonic() + demo.PATIENCE
        while (counts := self.counts()) | wanted != counts:
            assert time.monotonic() < deadline, f"{wanted} does not come: {counts}"
            time.sleep(0.02)
        return counts

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def memory(self):
        """Returns the number of resident anonymous bytes."""
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as status:
            return int(re.search(r"RssAnon:\s+(\d+)", status.read())[1]) * 1024

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(demo.PATIENCE) == 0


def listening(family, port):
    """Opens a server's socket on its host."""

    def make():
        listener = socket.create_server(("", port), family=family, backlog=64)
        listener.settimeout(demo.PATIENCE)
        return listener

    return hosts.on("server", make)


def dial(family, server, port):
    def make():
        client = socket.socket(family)
        client.settimeout(demo.PATIENCE)
        client.connect((server, port))
        return client

    return hosts.on("client", make)


@contextlib.contextmanager
def pair(family, server, port=80):
    """Returns the client's socket and the server's socket of a connection through the relay."""
    with listening(family, port) as listener, dial(family, server, port) as client:
        peer, _ = listener.accept()
        peer.settimeout(demo.PATIENCE)
        with peer:
            yield client, peer


def read_to_end(sock):
    parts = []
    while part := sock.recv(1 << 20):
        parts.append(part)
    return b"".join(parts)


def is_reset(sock):
    try:
        return not sock.recv(1) and False
    except ConnectionResetError:
        return True


def is_refused(family, server, port):
    """Connects to a port without a server: the relay has accepted by then, and must reset the connection."""

    def refused():
        with socket.socket(family) as client:
            client.settimeout(demo.PATIENCE)
            try:
                client.connect((server, port))
                return client.recv(1) and False
            except ConnectionResetError:
                return True

    return hosts.on("client", refused)


def each_end_in_its_own_time(programs):
    """Half-close by either side, and a server that sends first."""
    with Relay(programs) as relay:
        for family, server in FAMILIES:
            for first in (0, 1):
                with pair(family, server) as ends:
                    one, other = ends[first], ends[1 - first]
                    one.sendall(b"question")
                    one.shutdown(socket.SHUT_WR)
                    assert read_to_end(other) == b"question"
                    time.sleep(0.05)
                    other.sendall(b"answer")
                    other.close()
                    assert read_to_end(one) == b"answer"
            with pair(family, server) as (client, peer):
                peer.sendall(b"banner")
                assert client.recv(100) == b"banner"
        counts = relay.wait_for(live=0)
        assert (counts["accepted"], counts["reset"], counts["refused"], counts["failed"]) == (6, 0, 0, 0), counts


def who_speaks_first(programs):
    """The handshake with the server waits for the client's first bytes only for a limited time, whatever the client does."""

    def seconds_to_greet(family, server):
        start = time.monotonic()
        with pair(family, server) as (client, peer):
            peer.sendall(b"banner")
            assert client.recv(100) == b"banner"
            return time.monotonic() - start

    for family, server in FAMILIES:
        # Without the relay's limit, the kernel completes the handshake after 0.2 s.
        with Relay(programs, "-w", "5000") as relay:
            waited = min(seconds_to_greet(family, server) for _ in range(3))
            assert waited >= 0.15, "the handshake did not wait"
            relay.wait_for(live=0)
        with Relay(programs) as relay:
            took = min(seconds_to_greet(family, server) for _ in range(5))
            assert took < waited / 2, f"{took:.3f} s until a server that speaks first was heard, {waited:.3f} s with -w 5000"
            # A client that only sends an end of stream is served too.
            with pair(family, server) as (client, peer):
                client.shutdown(socket.SHUT_WR)
                assert peer.recv(1) == b""
            relay.wait_for(live=0)


def some_destinations(programs):
    """Only destinations in the file are intercepted. Connections to others are forwarded."""
    with tempfile.NamedTemporaryFile("w", suffix=".prefixes") as file:
        file.write("203.0.113.2\n192.0.2.0/24\n2001:db8:5::/48\n")
        file.flush()
        with Relay(programs, "-p", file.name) as relay:
            for (family, server), accepted in zip(FAMILIES, (1, 1)):
                with pair(family, server) as (client, peer):
                    client.sendall(b"x")
                    assert peer.recv(1) == b"x"
                assert relay.wait_for(live=0)["accepted"] == accepted


def resets_are_resets(programs):
    with Relay(programs) as relay:
        for family, server in FAMILIES:
            for first in (0, 1):
                with pair(family, server) as ends:
                    ends[first].sendall(b"x")
                    assert ends[1 - first].recv(10) == b"x"
                    ends[first].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ON)
                    ends[first].close()
                    assert is_reset(ends[1 - first]), "a reset was not passed on"
            assert is_refused(family, server, 89), "a refusal was not passed on"
        counts = relay.wait_for(live=0)
        assert (counts["reset"], counts["refused"]) == (4, 2), counts


def who_does_not_read_waits(programs):
    """Back-pressure: unread data stays with its sender, and arrives completely when it is read."""
    with Relay(programs) as relay:
        for family, server in FAMILIES:
            for first in (0, 1):
                with pair(family, server) as ends:
                    sender, reader = ends[first], ends[1 - first]
                    sent, chunk = hashlib.sha256(), random.Random(4).randbytes(1 << 20)
                    sender.settimeout(limit(1))
                    megabytes, rest = 0, b""
                    with contextlib.suppress(TimeoutError):
                        while megabytes < 200:
                            rest = chunk
                            while rest:
                                n = sender.send(rest)
                                sent.update(rest[:n])
                                rest = rest[n:]
                            megabytes += 1
                    assert 1 < megabytes < 100, f"{megabytes} MiB went to one that does not read"
                    assert relay.memory() < 4 << 20, relay.memory()
                    sender.close()
                    assert hashlib.sha256(read_to_end(reader)).digest() == sent.digest()
        relay.wait_for(live=0, reset=0)


def the_limit_holds(programs):
    """Connections beyond the limit wait in the queue, and are served when others end."""
    with Relay(programs, "-t", "1", "-c", "3") as relay:
        family, server = FAMILIES[0]
        with listening(family, 80) as listener, contextlib.ExitStack() as stack:
            clients = [stack.enter_context(dial(family, server, 80)) for _ in range(5)]
            peers = [stack.enter_context(listener.accept()[0]) for _ in range(3)]
            listener.settimeout(limit(0.3))
            try:
                listener.accept()
                raise AssertionError("a fourth connection")
            except TimeoutError:
                pass
            listener.settimeout(demo.PATIENCE)
            assert relay.counts()["live"] == 3
            for peer, client in zip(peers[:2], clients[:2]):
                client.close()
                assert peer.recv(1) == b""
                peer.close()
                stack.enter_context(listener.accept()[0]).sendall(b"you")
            assert [client.recv(3) for client in clients[3:]] == [b"you", b"you"]


def the_idle_are_ended(programs):
    with Relay(programs, "-i", "2") as relay:
        family, server = FAMILIES[1]
        with pair(family, server, 80) as (idle, _), pair(family, server, 81) as (busy, peer):
            for _ in range(40):
                busy.sendall(b"x")
                assert peer.recv(1) == b"x"
                time.sleep(0.1)
            assert is_reset(idle), "an idle connection goes on"
            assert relay.counts()["idle"] == 1


def without_pipes_it_copies(programs):
    """With few descriptors there are few pipes. More streams than pipes, with slow readers, still receive all data."""
    with Relay(programs, "-t", "1", descriptors=110) as relay:
        family, server = FAMILIES[0]
        content = random.Random(5).randbytes(12 << 20)
        with listening(family, 80) as listener, contextlib.ExitStack() as stack:
            clients = [stack.enter_context(dial(family, server, 80)) for _ in range(8)]

            def send(peer):
                with peer:
                    peer.sendall(content)

            threads = [threading.Thread(target=send, args=(listener.accept()[0],)) for _ in clients]
            for thread in threads:
                thread.start()
            time.sleep(1)
            for client in clients:
                assert hashlib.sha256(read_to_end(client)).digest() == hashlib.sha256(content).digest()
            for thread in threads:
                thread.join()
        counts = relay.wait_for(live=0)
        assert counts["starved"] > 0 and counts["pipes"] == 2, counts
        assert relay.descriptors() <= 110


def stopping_is_no_gap(programs, load):
    """After a signal to stop under load, the relay finishes its connections. Later ones are forwarded, and no client fails."""
    # The kernel drops a forwarded connection with the ports of a relay connection in TIME_WAIT. The relay therefore uses other
    # ports than the clients.
    for host, ports in (("client", "30000 65000"), ("proxy", "10000 29999")):
        demo.run(*demo.on(host, "sh", "-c", f"echo {ports} > /proc/sys/net/ipv4/ip_local_port_range"))
    with Relay(programs, "-d", "20") as relay, contextlib.ExitStack() as stack:
        server = demo.Program("server", load, "serve")
        stack.callback(server.process.kill)
        assert server.expect("listening") != "nothing"
        clients = [ask(load, 8, 2, address, seed) for seed, (_, address) in enumerate(FAMILIES)]
        time.sleep(1)
        relay.process.send_signal(signal.SIGTERM)
        outcomes = [outcome(client) for client in clients]
        assert relay.process.wait(demo.PATIENCE) == 0
        last = json.loads("{" + relay.program.expect("{"))
        total = sum(one["whole"] + one["cut"] for one in outcomes)
        assert 0 < last["accepted"] < total and last["live"] == 0, (last, outcomes)
        for one in outcomes:
            assert one["whole"] > 0 and one | dict.fromkeys(("broken", "wrong", "stuck", "refused"), 0) == one, one
    assert "libtproxy" not in demo.run(*demo.on("proxy", "nft", "list", "tables"))


def ask(load, clients, seconds, address, seed):
    command = demo.on("client", load, "ask", str(clients), str(seconds), address, str(seed))
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def outcome(client):
    said, _ = client.communicate(timeout=limit(120))
    assert client.returncode == 0
    return json.loads(said)


def soak(programs, load, seconds):
    """Clients and servers start, break connections and are killed. No data is wrong, and nothing is stuck or left behind."""
    chance = random.Random(6)
    sums = {}
    with Relay(programs) as relay, contextlib.ExitStack() as stack:

        def serve():
            server = demo.Program("server", load, "serve", stderr=subprocess.PIPE)
            assert server.expect("listening") != "nothing"
            return server

        def complaints(server):
            server.process.kill()
            return server.process.communicate()[1]

        server = serve()
        stack.callback(lambda: server.process.kill())
        end, seed, wrong, memory, rounds = time.monotonic() + seconds, 0, "", [], 0
        while time.monotonic() < end:
            rounds += 1
            part = min(10, max(2, end - time.monotonic()))
            clients = [ask(load, 24, part, address, (seed := seed + 1)) for _, address in FAMILIES]
            victims = [ask(load, 24, part, address, (seed := seed + 1)) for _, address in FAMILIES]
            time.sleep(part * chance.uniform(0.3, 0.9))
            for victim in victims:
                victim.kill()
                victim.communicate()
            if rounds % 2 == 0:
                wrong += complaints(server)
                server = serve()
            for client in clients:
                for name, value in outcome(client).items():
                    sums[name] = sums.get(name, 0) + value
            memory.append(relay.memory())
            if rounds == 1:
                # No server was killed yet, so no client may have failed.
                assert sums["broken"] == sums["refused"] == 0, sums
        counts = relay.wait_for(live=0)
        wrong += complaints(server)
        said = f"{sums} {counts} memory {memory[0]} -> {memory[-1]}, at most {max(memory)}, descriptors {relay.descriptors()}"
        print(said)
        assert sums["wrong"] == sums["stuck"] == 0 and wrong == "" and sums["whole"] > 100 * len(memory), said + wrong
        assert counts["failed"] == 0 and counts["spliced"] > 0 and counts["copied"] > 0, said
        # Standard streams; a listener, epoll, eventfd and netlink socket per thread; the sockets of the rules; reserved pipes.
        threads = len(os.listdir(f"/proc/{relay.process.pid}/task")) - 1
        assert relay.descriptors() <= 8 + 3 * threads + 2 * counts["pipes"], said
        assert max(memory[len(memory) // 2:]) <= max(memory[: len(memory) // 2 + 1]) * 1.25 + 65536, f"{memory}"
        relay.stop()


def test(programs, load, seconds=None):
    hosts.meet()
    if seconds is not None:
        soak(programs, load, int(os.path.basename(seconds)))
        return
    each_end_in_its_own_time(programs)
    who_speaks_first(programs)
    some_destinations(programs)
    resets_are_resets(programs)
    who_does_not_read_waits(programs)
    the_limit_holds(programs)
    the_idle_are_ended(programs)
    without_pipes_it_copies(programs)
    stopping_is_no_gap(programs, load)
    soak(programs, load, 6)


if __name__ == "__main__":
    hosts.alone(__file__, test)
