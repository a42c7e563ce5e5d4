#!/usr/bin/env python3
"""Runs tcp_proxy, udp_proxy and bind_nonlocal in a network of three hosts.

    demo.py DIRECTORY-OF-THE-PROGRAMS

Three hosts, each a network namespace, joined by veth pairs:

    client ---- proxy ---- server

The client fetches a few megabytes over HTTP from the server, through the proxy's
host, once over IPv4 and once over IPv6. Then it sends DNS queries to the server's
resolver, and to addresses that no host owns. Tables show what each of the three
hosts received. The exit status is 0 only if all results are correct. The network
namespaces have no names and no mounts, and end with this program. It needs root,
or permission to create user namespaces.
"""

import concurrent.futures
import ctypes
import hashlib
import http.server
import os
import queue
import random
import re
import signal
import socket
import subprocess
import sys
import threading

SIZE = 4 << 20
SEED = 4093
PORT = 80
HOSTS = ("client", "proxy", "server")
# The two links: (host, interface, addresses).
LINKS = (
    (("client", "eth0", ("198.51.100.2/24", "2001:db8:1::2/64")), ("proxy", "eth0", ("198.51.100.1/24", "2001:db8:1::1/64"))),
    (("proxy", "eth1", ("203.0.113.1/24", "2001:db8:2::1/64")), ("server", "eth0", ("203.0.113.2/24", "2001:db8:2::2/64"))),
)
GATEWAYS = (("client", ("198.51.100.1", "2001:db8:1::1")), ("server", ("203.0.113.1", "2001:db8:2::1")))
FETCHES = (("IPv4", "198.51.100.2", "203.0.113.2"), ("IPv6", "2001:db8:1::2", "2001:db8:2::2"))
# Addresses that no host owns, to which the client sends DNS queries.
NOBODY = ("192.0.2.53", "2001:db8:53::53")
NAME = "name.example"
# Types of the queries, and the records of the resolver.
RECORDS = (("A", "192.0.2.80"), ("AAAA", "2001:db8:80::80"))


def limit(seconds):
    """Returns a time limit, multiplied by TPROXY_TEST_TIME_FACTOR (CONTRIBUTING.md)."""
    return seconds * float(os.environ.get("TPROXY_TEST_TIME_FACTOR", "1"))


PATIENCE = round(limit(20))


# The network namespace of each host, as a descriptor of this process.
namespaces = {}
CLONE_NEWNET = 0x40000000


def path_of(host):
    """Returns the path of a host's network namespace."""
    # Not os.getpid(): in a PID namespace without a new /proc, /proc has the PIDs of the parent namespace.
    return f"/proc/{os.readlink('/proc/self')}/fd/{namespaces[host]}"


def on(host, *command):
    """Returns the command line that runs a command on a host."""
    return ["nsenter", f"--net={path_of(host)}", *command]


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE).stdout


def ip(host, *arguments):
    return run(*on(host, "ip", *arguments))


def new_namespace():
    """Creates a network namespace and returns a descriptor. It ends with its last descriptor and its last process."""

    def make():
        # unshare(2) moves only the calling thread.
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


def build_network():
    """Creates the hosts, and replaces those of an earlier call."""
    for host in HOSTS:
        if host in namespaces:
            os.close(namespaces.pop(host))
        namespaces[host] = new_namespace()
        ip(host, "link", "set", "lo", "up")
    for (a, a_name, a_addrs), (b, b_name, b_addrs) in LINKS:
        ip(a, "link", "add", a_name, "type", "veth", "peer", "name", b_name, "netns", path_of(b))
        for host, name, addrs in ((a, a_name, a_addrs), (b, b_name, b_addrs)):
            for addr in addrs:
                ip(host, "addr", "add", addr, "dev", name, *(["nodad"] if ":" in addr else []))
            ip(host, "link", "set", name, "up")
    for host, gateways in GATEWAYS:
        for gateway in gateways:
            ip(host, "route", "add", "default", "via", gateway)
    # The proxy's host is a router: it forwards packets that it does not intercept.
    for path in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        run(*on("proxy", "sh", "-c", f"echo 1 > /proc/sys/net/{path}"))


def body():
    return random.Random(SEED).randbytes(SIZE)


def at_port(addr, port):
    return f"[{addr}]:{port}" if ":" in addr else f"{addr}:{port}"


def serve():
    """The server: replies to every request with the same bytes, and reports the client's address."""
    content = body()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            peer = self.client_address[0].removeprefix("::ffff:")
            print("asked by", at_port(peer, self.client_address[1]), flush=True)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    class Server(http.server.ThreadingHTTPServer):
        address_family = socket.AF_INET6

    with Server(("::", PORT), Handler) as server:
        print("listening", flush=True)
        server.serve_forever()


class Program:
    """A program that runs on a host, and its output lines."""

    def __init__(self, host, *command, **options):
        self.process = subprocess.Popen(on(host, *command), stdout=subprocess.PIPE, text=True, **options)
        self.lines = queue.Queue()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def expect(self, start):
        """Returns the rest of the next line with this beginning; "nothing" after a timeout."""
        return self.find(lambda line: line[len(start):].strip() if line.startswith(start) else None)

    def find(self, part):
        """Returns the match in the first line that matches; "nothing" after a timeout."""
        try:
            while (line := self.lines.get(timeout=PATIENCE)) is not None:
                if (found := part(line)) is not None:
                    return found
        except queue.Empty:
            pass
        return "nothing"

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(PATIENCE)


def port_of(addr):
    return addr.rpartition(":")[2]


def fetch(family, client, server, proxy, http_server):
    """Returns a row of the table, and whether it is correct."""
    asked = at_port(server, PORT)
    got = subprocess.run(
        on("client", "curl", "-q", "-s", "-g", "--noproxy", "*", "-m", str(PATIENCE), f"http://{asked}/"), capture_output=True, check=False
    ).stdout
    intercepted = proxy.expect("intercepted ")
    caller, _, seen_by_proxy = intercepted.partition(" -> ")
    seen_by_server = http_server.expect("asked by ")
    same = hashlib.sha256(got).digest() == hashlib.sha256(body()).digest()
    right = (
        seen_by_proxy == asked
        and caller == at_port(client, port_of(caller))
        and seen_by_server == at_port(client, port_of(seen_by_server))
        and same
    )
    return (family, caller, asked, seen_by_proxy, seen_by_server, f"{len(got)}", "same" if same else "DIFFERS"), right


def start_resolver():
    """Starts a resolver on the server that has one name; None if it does not start."""
    records = [f"--host-record={NAME},{','.join(value for _, value in RECORDS)}"]
    # In the foreground, as the user of the demo, and without the host's configuration.
    settings = ["--no-daemon", "--conf-file=/dev/null", "--no-resolv", "--no-hosts"]
    logs = ["--log-queries=extra", "--log-facility=-"]
    resolver = Program("server", "dnsmasq", *settings, *logs, *records, stderr=subprocess.STDOUT)
    return resolver if resolver.find(lambda line: "started" if "started" in line else None) != "nothing" else None


def asked_by(line):
    """Returns the client in a line of the resolver such as "... 1 198.51.100.2/40000 query[A] ..."."""
    found = re.search(r" (\S+)/(\d+) query\[", line)
    return at_port(*found.groups()) if found else None


def resolve(family, client, asked, proxy, resolver, keeps_port):
    """Returns a row of the table, and whether it is correct. dig accepts a reply only from the address of its query."""
    kind, known = RECORDS[family == "IPv6"]
    dig = ["dig", "-r", f"@{asked}", NAME, kind, "+short", "+norecurse", "+tries=1", f"+timeout={PATIENCE}"]
    outcome = subprocess.run(on("client", *dig), capture_output=True, text=True, check=False)
    answer = outcome.stdout.strip()
    intercepted = proxy.expect("intercepted ")
    caller, _, seen_by_proxy = intercepted.partition(" -> ")
    seen_by_resolver = resolver.find(asked_by)
    right = (
        outcome.returncode == 0
        and answer == known
        and seen_by_proxy == at_port(asked, 53)
        and caller == at_port(client, port_of(caller))
        and seen_by_resolver == (caller if keeps_port else at_port(client, port_of(seen_by_resolver)))
    )
    # The first line of dig's messages, such as "reply from unexpected source".
    return (family, caller, at_port(asked, 53), seen_by_proxy, seen_by_resolver, answer.partition("\n")[0]), right


def show_names(programs):
    """Sends queries to the server and to addresses that no host owns. Returns whether all results are correct."""
    resolver = start_resolver()
    servers = [server for _, _, server in FETCHES]
    to_server = [f"--to={at_port(server, 53)}" for server in servers]
    rows, right = [], resolver is not None
    for options, targets in (([], servers), (to_server, NOBODY)) if resolver else ():
        proxy = Program("proxy", os.path.join(programs, "udp_proxy"), "--verbose", *options, "3130", "53")
        right = proxy.expect("listening") != "nothing" and right
        for (family, client, _), asked in zip(FETCHES, targets):
            row, row_right = resolve(family, client, asked, proxy, resolver, not options)
            rows.append((*row, "ok" if row_right else "WRONG"))
            right = row_right and right
        right = proxy.stop() == 0 and right
    print("\nDNS queries through udp_proxy; no host owns the addresses of the last two:")
    print_table(("", "client", "asked", "original destination", "resolver saw", "answer", ""), rows)
    if resolver:
        resolver.stop()
    return right


def start_proxy(programs):
    """Starts the proxy and waits until it is ready; None if it fails."""
    proxy = Program("proxy", os.path.join(programs, "tcp_proxy"), "3129", str(PORT))
    return proxy if proxy.expect("listening") != "nothing" else None


def our_tables():
    return [line for line in run(*on("proxy", "nft", "list", "tables")).splitlines() if "libtproxy" in line]


def leftovers():
    """Returns rules and routes that a proxy may have left on its host."""
    rules = [line for f in ("-4", "-6") for line in ip("proxy", f, "rule").splitlines() if "116" in line]
    routes = [
        line
        for f in ("-4", "-6")
        for line in ip("proxy", f, "route", "show", "table", "all").splitlines()
        if "proto 116" in line
    ]
    return our_tables() + rules + routes


def print_table(head, rows):
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, tuple("-" * width for width in widths), *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def show(programs):
    build_network()
    http_server = Program("server", sys.executable, __file__, "--serve")
    proxy = start_proxy(programs)
    if http_server.expect("listening") == "nothing" or not proxy:
        sys.exit("demo: the server or the proxy did not start")

    rows, verdicts = [], []
    for family, client, server in FETCHES:
        row, right = fetch(family, client, server, proxy, http_server)
        rows.append((*row, "ok" if right else "WRONG"))
        verdicts.append(right)
    print("An HTTP response, through tcp_proxy:")
    print_table(("", "client", "asked for", "original destination", "server saw", "bytes", "SHA-256", ""), rows)

    verdicts.append(show_names(programs))

    proxy.process.kill()
    proxy.process.wait(PATIENCE)
    tables = our_tables()
    proxy = start_proxy(programs)
    verdicts.append(not tables and proxy is not None)
    print(f"\nAfter SIGKILL, the proxy left {', '.join(tables) or 'no table'}; a second start", "worked." if proxy else "FAILED.")

    status = proxy.stop() if proxy else None
    left = leftovers()
    verdicts.append(status == 0 and not left)
    print(f"After SIGTERM, it ended with status {status} and left", f"{'; '.join(left) or 'nothing'}.")

    bound = subprocess.run(
        on("proxy", os.path.join(programs, "bind_nonlocal")), capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    verdicts.append(bound.returncode == 0)
    print(f"bind_nonlocal, with an address that no host owns: {bound.stdout.strip() or bound.stderr.strip()}.")
    return 0 if all(verdicts) else 1


def main():
    if sys.argv[1] == "--serve":
        serve()
    elif sys.argv[1] == "--inside":
        sys.exit(show(sys.argv[2]))
    else:
        # All processes and namespaces end with the first process.
        user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        new = ["unshare", *user, "--net", "--pid", "--fork", "--kill-child"]
        os.execvp(new[0], [*new, sys.executable, __file__, "--inside", os.path.abspath(sys.argv[1])])


if __name__ == "__main__":
    main()
