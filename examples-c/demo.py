#!/usr/bin/env python3
"""Shows tcp_proxy, udp_proxy and bind_nonlocal at work, on a network of its own.

    demo.py DIRECTORY-OF-THE-PROGRAMS

Three hosts, each a network namespace, joined by veth pairs:

    client ---- proxy ---- server

The client fetches a few megabytes over HTTP from the server, whose only way is
through the proxy's host, once over IPv4 and once over IPv6; then it asks a name
of the server's resolver, and of addresses that nobody owns. What each of the
three saw is put side by side, and the exit status is 0 only if all of it is
right. The network namespaces have no names and no mounts: they end with this
program. It needs root, or permission to create user namespaces.
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
# Whom the client asks for a name besides the server: nobody.
NOBODY = ("192.0.2.53", "2001:db8:53::53")
NAME = "name.example"
# The type that is asked for, and what the resolver knows.
RECORDS = (("A", "192.0.2.80"), ("AAAA", "2001:db8:80::80"))


def limit(seconds):
    """A time limit, multiplied by TPROXY_TEST_TIME_FACTOR (CONTRIBUTING.md)."""
    return seconds * float(os.environ.get("TPROXY_TEST_TIME_FACTOR", "1"))


PATIENCE = round(limit(20))


# The network namespace of each host, as a descriptor of this process.
namespaces = {}
CLONE_NEWNET = 0x40000000


def path_of(host):
    """The path of a host's network namespace, for commands that open it."""
    # os.getpid() would be wrong: without a /proc of its own, a PID namespace sees the process numbers of its parent.
    return f"/proc/{os.readlink('/proc/self')}/fd/{namespaces[host]}"


def on(host, *command):
    """The command line that runs a command on a host."""
    return ["nsenter", f"--net={path_of(host)}", *command]


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE).stdout


def ip(host, *arguments):
    return run(*on(host, "ip", *arguments))


def new_namespace():
    """A descriptor of a new network namespace, which ends with its last descriptor and its last process."""

    def make():
        # unshare(2) moves only the calling thread.
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


def build_network():
    """Makes the hosts; replaces those of an earlier call."""
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
    # The proxy's host is a router: what it does not intercept it would pass on.
    for path in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        run(*on("proxy", "sh", "-c", f"echo 1 > /proc/sys/net/{path}"))


def body():
    return random.Random(SEED).randbytes(SIZE)


def at_port(addr, port):
    return f"[{addr}]:{port}" if ":" in addr else f"{addr}:{port}"


def serve():
    """The server: answers every request with the same bytes, and says who asked."""
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
    """A program that runs on a host, and the lines that it prints."""

    def __init__(self, host, *command, **options):
        self.process = subprocess.Popen(on(host, *command), stdout=subprocess.PIPE, text=True, **options)
        self.lines = queue.Queue()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def expect(self, start):
        """The rest of the next line that starts so; "nothing" if none comes."""
        return self.find(lambda line: line[len(start):].strip() if line.startswith(start) else None)

    def find(self, part):
        """What it finds in the first line in which it finds anything; "nothing" if none comes."""
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
    """One row of the table, and whether it is right."""
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
    """A resolver on the server that knows one name; None if it does not start."""
    records = [f"--host-record={NAME},{','.join(value for _, value in RECORDS)}"]
    # All in the foreground, as whoever runs the demo, and without the host's own settings.
    settings = ["--no-daemon", "--conf-file=/dev/null", "--no-resolv", "--no-hosts"]
    logs = ["--log-queries=extra", "--log-facility=-"]
    resolver = Program("server", "dnsmasq", *settings, *logs, *records, stderr=subprocess.STDOUT)
    return resolver if resolver.find(lambda line: "started" if "started" in line else None) != "nothing" else None


def asked_by(line):
    """Who asks, of the resolver's line "... 1 198.51.100.2/40000 query[A] ..."."""
    found = re.search(r" (\S+)/(\d+) query\[", line)
    return at_port(*found.groups()) if found else None


def resolve(family, client, asked, proxy, resolver, keeps_port):
    """One row of the table, and whether it is right. dig takes no answer but from the address that it asked."""
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
    # Of what dig has to say, such as "reply from unexpected source", the first line.
    return (family, caller, at_port(asked, 53), seen_by_proxy, seen_by_resolver, answer.partition("\n")[0]), right


def show_names(programs):
    """Asks the server for a name, and addresses that nobody owns; gives whether all is right."""
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
    print("\nA name, through udp_proxy; the last two ask addresses that nobody owns:")
    print_table(("", "client", "asked", "original destination", "resolver saw", "answer", ""), rows)
    if resolver:
        resolver.stop()
    return right


def start_proxy(programs):
    """The proxy, once it says that it is ready; None if it never does."""
    proxy = Program("proxy", os.path.join(programs, "tcp_proxy"), "3129", str(PORT))
    return proxy if proxy.expect("listening") != "nothing" else None


def our_tables():
    return [line for line in run(*on("proxy", "nft", "list", "tables")).splitlines() if "libtproxy" in line]


def leftovers():
    """What a proxy that ended might have left on its host."""
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
    print(f"\nKilled, it left {', '.join(tables) or 'no table'}; a second start", "worked." if proxy else "FAILED.")

    status = proxy.stop() if proxy else None
    left = leftovers()
    verdicts.append(status == 0 and not left)
    print(f"Stopped, it ended with status {status} and left", f"{'; '.join(left) or 'nothing'}.")

    bound = subprocess.run(
        on("proxy", os.path.join(programs, "bind_nonlocal")), capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    verdicts.append(bound.returncode == 0)
    print(f"An address that nobody owns, through bind_nonlocal: {bound.stdout.strip() or bound.stderr.strip()}.")
    return 0 if all(verdicts) else 1


def main():
    if sys.argv[1] == "--serve":
        serve()
    elif sys.argv[1] == "--inside":
        sys.exit(show(sys.argv[2]))
    else:
        # The processes and the namespaces end with the first of them, however it ends.
        user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        new = ["unshare", *user, "--net", "--pid", "--fork", "--kill-child"]
        os.execvp(new[0], [*new, sys.executable, __file__, "--inside", os.path.abspath(sys.argv[1])])


if __name__ == "__main__":
    main()
