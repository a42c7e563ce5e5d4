"""What the relay benchmark compares, on the three hosts of the demo: how each contender is started and what it uses."""

import glob
import json
import os
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "examples-c"))
import demo  # noqa: E402

LISTEN = 3129
CONGESTION_CONTROL = "reno"
SERVER = "203.0.113.2"

# The rules for contenders that install none: those of the textbooks, plus `socket wildcard 0`.
TEXTBOOK = f"""
table inet textbook {{
    chain prerouting {{
        type filter hook prerouting priority mangle
        meta l4proto tcp socket transparent 1 socket wildcard 0 meta mark set 1 accept
        tcp dport {demo.PORT} iifname "eth0" DESTINATIONS tproxy to :{LISTEN} meta mark set 1 accept
    }}
}}
"""
ROUTING = [f"-{family} {line}" for family in (4, 6) for line in ("rule add fwmark 1 lookup 100", "route add local default dev lo table 100")]

HAPROXY = f"""
global
    nbthread %d
defaults
    mode tcp
    timeout connect 30s
    timeout client 600s
    timeout server 600s
    option splice-request
    option splice-response
listen relay
    bind :::{LISTEN} v4v6 transparent
%s    option transparent
    source 0.0.0.0 usesrc clientip
"""


class Rules:
    """The textbook rules on the proxy's host, with or without `socket wildcard 0`, removed at exit."""

    def __init__(self, wildcard_0, prefixes=()):
        text = TEXTBOOK if wildcard_0 else TEXTBOOK.replace(" socket wildcard 0", "")
        text = text.replace("DESTINATIONS", "ip daddr @destinations" if prefixes else "")
        elements = "set destinations { type ipv4_addr; flags interval; elements = { %s } }\n" % ",".join(prefixes)
        if prefixes:
            text = text.replace("tproxy to", "tproxy ip to").replace("chain prerouting", elements + "chain prerouting")
        self.text = text

    def __enter__(self):
        subprocess.run(demo.on("proxy", "nft", "-f", "-"), input=self.text, text=True, check=True)
        for line in ROUTING:
            demo.ip("proxy", *line.split())

    def __exit__(self, *_):
        for line in ROUTING:
            demo.ip("proxy", *line.replace(" add ", " del ").split())
        demo.run(*demo.on("proxy", "nft", "delete", "table", "inet", "textbook"))


class Contender:
    """A program on the proxy's host that runs while it is measured; this base class is no program, only forwarding."""

    name = "plain forwarding"
    #: Textbook rules for this contender: False (none), True (with `socket wildcard 0`), or "textbook" (without).
    rules = False
    process = None
    prefixes = ()

    def __init__(self, threads=1):
        self.threads = threads

    def command(self):
        return None

    def __enter__(self):
        self.textbook = Rules(self.rules != "textbook", self.prefixes) if self.rules else None
        if self.textbook:
            self.textbook.__enter__()
        command = self.command()
        if command:
            self.program = demo.Program("proxy", *command, stderr=subprocess.DEVNULL)
            self.process = self.program.process
            self.wait()
        return self

    def __exit__(self, *_):
        if self.process:
            self.process.terminate()
            self.process.wait(demo.PATIENCE)
            self.process = None
        if self.textbook:
            self.textbook.__exit__()

    def cpu(self):
        """The CPU time of its threads, in seconds."""
        total = 0
        for path in glob.glob(f"/proc/{self.process.pid}/task/*/schedstat") if self.process else []:
            with open(path, encoding="ascii") as file:
                total += int(file.read().split()[0])
        return total / 1e9

    def memory(self):
        """The anonymous memory of the process, in bytes."""
        with open(f"/proc/{self.process.pid}/smaps_rollup", encoding="ascii") as file:
            for line in file:
                if line.startswith("Pss_Anon:"):
                    return int(line.split()[1]) * 1024
        return 0


class Relay(Contender):
    """examples-c/relay.c, built with the library or with equivalent C code."""

    def __init__(self, name, path, rules, threads=1, prefixes=()):
        super().__init__(threads)
        self.name, self.path, self.rules, self.prefixes = name, path, rules, prefixes

    def wait(self):
        """Waits until it listens and its rules are installed."""
        assert self.program.expect("listening") != "nothing", f"{self.name} does not start"

    def command(self):
        command = [self.path, "-t", str(self.threads), "-d", "0"]
        if self.prefixes and not self.rules:
            self.file = tempfile.NamedTemporaryFile("w", suffix=".prefixes")
            self.file.write("\n".join(self.prefixes) + "\n")
            self.file.flush()
            command += ["-p", self.file.name]
        return [*command, str(LISTEN), str(demo.PORT)]


class HAProxy(Contender):
    name, rules, options = "HAProxy", True, ""

    def command(self):
        self.config = tempfile.NamedTemporaryFile("w", suffix=".cfg")
        self.config.write(HAPROXY % (self.threads, self.options))
        self.config.flush()
        return ["haproxy", "-db", "-f", self.config.name]

    def wait(self):
        deadline = time.monotonic() + demo.PATIENCE
        while f":{LISTEN} " not in demo.run(*demo.on("proxy", "ss", "-Hltn")):
            assert self.process.poll() is None and time.monotonic() < deadline, "HAProxy does not start"
            time.sleep(0.02)


class TunedHAProxy(HAProxy):
    """HAProxy with the options that save packets."""

    name, options = "HAProxy, tuned", "    option tcp-smart-accept\n    option tcp-smart-connect\n"


class Load:
    """The server, and clients that measure, on new hosts."""

    def __init__(self, program):
        self.program, self.server = program, None

    def __enter__(self):
        # New namespaces: TIME_WAIT sockets and neighbor entries of one measurement do not change the next.
        demo.build_network()
        # Every network namespace may use reno. BBR, the default of some machines, paces packets and would limit the rate.
        for host in demo.HOSTS:
            demo.run(*demo.on(host, "sysctl", "-qw", f"net.ipv4.tcp_congestion_control={CONGESTION_CONTROL}"))
        self.server = demo.Program("server", self.program, "serve")
        assert self.server.expect("listening") != "nothing", "the server does not start"
        return self

    def __exit__(self, *_):
        self.server.process.kill()
        self.server.process.wait()

    def run(self, mode, clients, seconds, address=SERVER):
        command = demo.on("client", self.program, mode, str(clients), str(seconds), address)
        outcome = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + 60)
        return json.loads(outcome.stdout)
