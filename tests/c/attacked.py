"""Tests the example proxies with hostile clients: silent ones, more than the descriptors allow, and with denied destinations.

    attacked.py DIRECTORY-OF-THE-EXAMPLES

Runs in new namespaces, as the demo does. The exit status is not 0 if a test fails.
"""

import os
import re
import resource
import signal
import socket
import subprocess
import tempfile
import threading
import time

import hosts
from hosts import demo, limit, on

SERVER = ("203.0.113.2", 80)
SERVER6 = ("2001:db8:2::2", 80)


def server():
    """Sends a message on each connection, and then waits for its end."""
    for family, address in ((socket.AF_INET, SERVER), (socket.AF_INET6, SERVER6)):
        listener = socket.socket(family)
        listener.bind(address)
        listener.listen(1024)

        def serve(listener=listener):
            while True:
                connection, peer = listener.accept()
                seen.append(peer[0])
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()


seen = []


def answer(connection):
    try:
        connection.sendall(b"served")
        while connection.recv(4096):
            pass
    except OSError:
        pass
    connection.close()


class Proxy:
    """A proxy on its host, with a descriptor limit."""

    def __init__(self, program, *args, descriptors=None):
        def set_descriptors():
            if descriptors is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))

        self.process = on("proxy", lambda: subprocess.Popen([program, *args], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                                            text=True, preexec_fn=set_descriptors))
        assert self.process.stdout.readline().startswith("listening"), f"{program} did not start"
        threading.Thread(target=lambda: [None for _ in self.process.stdout], daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        assert self.process.wait(demo.PATIENCE + limit(35)) == 0

    def cpu_seconds(self):
        with open(f"/proc/{self.process.pid}/stat", encoding="ascii") as stat:
            fields = stat.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def call(address=SERVER, patience=demo.PATIENCE):
    """Returns the connected socket of a client that sends nothing."""
    client = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
    client.settimeout(patience)
    client.connect(address)
    return client


def served(address=SERVER, patience=demo.PATIENCE):
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            with call(address, limit(2)) as client:
                if client.recv(100) == b"served":
                    return True
        except OSError:
            pass
        time.sleep(0.1)
    return False


def few_descriptors(program, *options):
    """At the descriptor limit, the proxy does not spin, and serves a new client although silent clients use all descriptors."""
    for descriptors in range(18, 24):
        with Proxy(program, *options, "3129", "80", descriptors=descriptors) as proxy:
            clients = []
            for _ in range(40):
                try:
                    clients.append(on("client", lambda: call(patience=limit(1))))
                except OSError:
                    break
            time.sleep(1.2)
            before = proxy.cpu_seconds()
            time.sleep(limit(1.5))
            spent = proxy.cpu_seconds() - before
            # A loop that does not wait would use all CPU time, or half of it beside another program.
            assert spent < limit(0.5), f"{program} with {descriptors} descriptors was busy for {spent:.2f} of {limit(1.5)} s"
            assert on("client", served), f"{program} with {descriptors} descriptors does not serve other clients"
            for client in clients:
                client.close()


def silent_ones_end(program, *options):
    with Proxy(program, *options, "3129", "80"):
        client = on("client", call)
        assert client.recv(100) == b"served"
        started = time.monotonic()
        try:
            assert client.recv(100) == b"", "silence was answered"
        except ConnectionResetError:
            pass
        assert time.monotonic() - started < demo.PATIENCE, f"{program}: a silent connection did not end"
        client.close()


def many_silent_ones(program, *options):
    """Memory stays bounded, and other clients are served."""
    with Proxy(program, *options, "3129", "80") as proxy:
        clients = [on("client", call) for _ in range(300)]
        assert on("client", served)
        with open(f"/proc/{proxy.process.pid}/status", encoding="ascii") as status:
            kilobytes = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
        assert kilobytes < 65536, f"{program}: {kilobytes} KiB for 300 silent connections"
        for client in clients:
            client.close()


def denied(program, option):
    for address in (SERVER, SERVER6):
        with Proxy(program, option, address[0], "3129", "80"):
            del seen[:]
            # The proxy may refuse before connect() of the client returns.
            try:
                with on("client", lambda address=address: call(address)) as client:
                    assert client.recv(100) == b"", "the denied destination answered"
            except ConnectionResetError:
                pass
            other = SERVER6 if address == SERVER else SERVER
            assert on("client", lambda other=other: served(other)), "the other one is not served"
            assert len(seen) == 1, f"{program}: the denied server was called: {seen}"
        with Proxy(program, option, address[0], option, "none", "3129", "80"):
            assert on("client", lambda address=address: served(address)), f"{option} none did not clear the list"
    refused = subprocess.run([program, option, "10.0.0.0/33", "3129", "80"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "not a prefix" in refused.stderr, refused


def denied_datagrams(program):
    def ask(address):
        with socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(limit(1))
            client.sendto(b"question", address)
            try:
                return client.recv(100)
            except TimeoutError:
                return None

    def echo(address):
        service = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_DGRAM)
        service.bind(address)

        def run():
            while True:
                words, peer = service.recvfrom(100)
                heard.append(address)
                service.sendto(words, peer)

        threading.Thread(target=run, daemon=True).start()

    heard = []
    places = [("203.0.113.2", 53), ("2001:db8:2::2", 53)]
    for place in places:
        on("server", lambda place=place: echo(place))
    for place, other in (places, places[::-1]):
        with Proxy(program, "--deny", place[0], "3053", "53"):
            assert on("client", lambda place=place: ask(place)) is None
            assert on("client", lambda other=other: ask(other)) == b"question"
            assert place not in heard, f"{program}: the denied server was asked"
            del heard[:]


def room_at_the_limit(program):
    """At the limit of connections, a new client waits until another has been silent for ten seconds, and is then served."""
    with Proxy(program, "-c", "20", "3129", "80"):
        clients = [on("client", call) for _ in range(25)]
        assert on("client", lambda: served(patience=limit(60))), f"{program}: silent clients keep others out"
        for client in clients:
            client.close()


def is_reset(client):
    try:
        return client.recv(100) == b"" and False
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


def accept_fails(program, *options):
    """After an error of accept, whatever it is, the proxy retries with pauses, and serves clients afterwards."""
    for error in ("EMFILE", "ENFILE", "ENOBUFS", "ENOMEM", "EPERM"):
        with tempfile.NamedTemporaryFile("r") as log:
            traced = ["-f", "-o", log.name, "-e", "trace=accept4", "-e", f"inject=accept4:error={error}:when=1..2"]
            proxy = Proxy("strace", *traced, program, *options, "3129", "80")
            with open(f"/proc/{proxy.process.pid}/task/{proxy.process.pid}/children", encoding="ascii") as children:
                child = int(children.read())
            started = time.monotonic()
            assert on("client", served), f"{program}: does not serve clients after {error}"
            took, failed = time.monotonic() - started, log.read().count(f" = -1 {error} ")
            os.kill(child, signal.SIGKILL)
            proxy.process.wait(demo.PATIENCE)
            assert failed == 2 and took > 0.05, f"{program}: {error} {failed} times within {took:.3f} s"


def forwarded_to_itself(program, *options):
    """A port forward of another program leads to the listener itself, unseen by the rules: the proxy does not connect to itself."""
    rules = """table inet forward {
        chain prerouting {
            type nat hook prerouting priority -100
            iifname eth0 tcp dport 4129 dnat ip to 198.51.100.1:3129
            iifname eth0 tcp dport 4129 dnat ip6 to [2001:db8:1::1]:3129
        }
    }"""
    demo.run(*demo.on("proxy", "nft", rules))
    with Proxy(program, *options, "3129", "80"):
        for address in (SERVER, SERVER6):
            try:
                client = on("client", lambda host=address[0]: call((host, 4129), limit(5)))
            except ConnectionError:
                continue
            assert is_reset(client), f"{program} connects to itself"
            client.close()
    demo.run(*demo.on("proxy", "nft", "delete table inet forward"))


def own_addresses(program, allow, *options):
    """A rule of another program gives the proxy a connection to a service of its host: the proxy connects only if allowed."""
    hosts.textbook("tcp", 8080)
    count = """table inet count {
        chain output {
            type filter hook output priority 0
            oif lo tcp dport 8080 tcp flags syn / syn,ack counter
        }
    }"""
    for address in (("198.51.100.1", 8080), ("2001:db8:1::1", 8080)):
        for extra in ([], [allow]):
            demo.run(*demo.on("proxy", "nft", count))
            with Proxy(program, *options, *extra, "3129", "80"):
                try:
                    client = on("client", lambda address=address: call(address, limit(2)))
                except ConnectionError:
                    client = None
                # A refused connection is reset immediately. Otherwise the proxy waits for the service.
                reset = client is None or is_reset(client)
                if client:
                    client.close()
            rules = subprocess.run(demo.on("proxy", "nft", "list table inet count"), capture_output=True, text=True, check=True)
            packets = int(re.search(r"counter packets (\d+)", rules.stdout)[1])
            demo.run(*demo.on("proxy", "nft", "delete table inet count"))
            assert (reset, packets > 0) == ((False, True) if extra else (True, False)), (program, address, extra, reset, packets)
    demo.run(*demo.on("proxy", "nft", "delete table inet textbook"))


def server_that_does_not_accept(program, seconds, *options):
    """The proxy gives the server up in time, although its client continues to send."""
    unused = ("203.0.113.9", "2001:db8:2::9")
    for address in unused:
        entry = ["neigh", "replace", address, "lladdr", "02:00:00:00:00:99", "dev", "eth1", "nud", "permanent"]
        demo.run(*demo.on("proxy", "ip", *entry))
    with Proxy(program, *options, "3129", "80"):
        clients = [on("client", lambda address=address: call((address, 80))) for address in unused]
        clients += [on("client", lambda address=address: call((address, 80))) for address in unused]
        started, left = time.monotonic(), clients[:2]
        while left and time.monotonic() - started < seconds + demo.PATIENCE:
            time.sleep(0.5)
            for client in list(left):
                try:
                    client.send(b".")
                except ConnectionError:
                    left.remove(client)
        assert not left, f"{program} waits for a server that does not accept"
        assert all(map(is_reset, clients[2:])), f"{program} waits for it, for a client that says nothing"
        for client in clients:
            client.close()


def test(examples):
    hosts.meet()
    on("server", server)
    tcp_proxy, udp_proxy, relay = (os.path.join(examples, name) for name in ("tcp_proxy", "udp_proxy", "relay"))
    for program, options, seconds in ((tcp_proxy, [], 10), (relay, ["-d", "0", "-t", "1"], 20)):
        accept_fails(program, *options)
        forwarded_to_itself(program, *options)
        own_addresses(program, "-o" if program == relay else "--allow-own", *options)
        server_that_does_not_accept(program, seconds, *options)
    few_descriptors(tcp_proxy)
    silent_ones_end(tcp_proxy, "--idle", "1")
    silent_ones_end(relay, "-d", "0", "-i", "1")
    many_silent_ones(tcp_proxy)
    many_silent_ones(relay, "-d", "0")
    denied(tcp_proxy, "--deny")
    denied(relay, "-x")
    denied_datagrams(udp_proxy)
    room_at_the_limit(relay)


if __name__ == "__main__":
    hosts.alone(__file__, test)
