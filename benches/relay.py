"""Measures examples-c/relay.c, beside what a user would take instead, and the library itself.

    relay.py BUILD-DIRECTORY DOCS-DIRECTORY SECTION

Prints the section as Markdown and writes its plots. Each figure is the median of
repetitions in which the contenders take turns, each on new hosts. benches/run.sh
calls it. With QUICK in the environment it only tests that the section works.
"""

import ipaddress
import os
import re
import statistics
import subprocess
import sys
import time

import plots
from instructions import CALLS, instructions, target
from topology import SERVER, Contender, HAProxy, Load, Relay, TunedHAProxy, demo

QUICK = "QUICK" in os.environ
SECONDS = 0.1 if QUICK else 1
REPETITIONS = 1 if QUICK else 5
WITH_LIBRARY = "relay with libtproxy"
EQUIVALENT_C = "relay with equivalent C code"

# By name: the mode of benches/load.c, the number of clients, and the title of the table.
MODES = {
    "short": ("short", 4, "Short connections, four clients"),
    "kept": ("kept", 4, "Requests on four persistent connections"),
    "one": ("z", 1, "One stream"),
    "four": ("z", 4, "Four streams"),
    "copied": ("bulk", 1, "One stream, client and server copy"),
    "copied4": ("bulk", 4, "Four streams, client and server copy"),
}
RATE_COLUMNS = (
    ("rate", "per second", 0),
    ("cpu_op", "CPU s per 10,000", 3),
    ("p50", "p50 us", 0),
    ("p99", "p99 us", 0),
    ("p999", "p99.9 us", 0),
)
STREAM_COLUMNS = (("gbits", "Gbit/s", 1), ("cpu_gb", "CPU s per GB", 4))

# The ratios that have a target: label, mode, figure, the other contender, comparison, limit.
TARGETS = (
    ("short connections per second, relative to HAProxy", "short", "rate", "HAProxy", ">=", 1.3),
    ("CPU time per short connection, relative to HAProxy", "short", "cpu_op", "HAProxy", "<=", 0.75),
    ("throughput of four streams, relative to HAProxy", "four", "gbits", "HAProxy", ">=", 1.5),
    ("CPU time per GB of four streams, relative to HAProxy", "four", "cpu_gb", "HAProxy", "<=", 0.7),
    ("p99 of short connections, relative to HAProxy", "short", "p99", "HAProxy", "<=", 0.8),
    ("throughput of four streams, relative to plain forwarding", "four", "gbits", "plain forwarding", ">=", 0.65),
    ("short connections per second, relative to equivalent C code", "short", "rate", EQUIVALENT_C, ">=", 0.98),
    ("throughput of four streams, relative to equivalent C code", "four", "gbits", EQUIVALENT_C, ">=", 0.98),
)


def say(*lines):
    print(*lines, sep="\n", flush=True)


def ratio_of(ours, theirs):
    """Not a number if the other figure is 0, as it may be in a quick run: such a ratio meets no target."""
    return ours / theirs if theirs else float("nan")


def verdict(met):
    return "met" if met else "**missed**"


class Run:
    def __init__(self, build, docs):
        self.build, self.docs = build, docs
        self.load = os.path.join(build, "bench", "load")
        self.relay = os.path.join(build, "examples", "relay")
        self.relay_raw = os.path.join(build, "bench", "relay-raw")

    def relays(self, threads=1, prefixes=()):
        return [
            Relay(WITH_LIBRARY, self.relay, False, threads, prefixes),
            Relay(EQUIVALENT_C, self.relay_raw, True, threads, prefixes),
        ]

    def plot(self, name):
        return os.path.join(self.docs, name)

    # ---- Traffic. ----

    def measure(self, contender, mode, clients):
        """One repetition: its figures by name."""
        with Load(self.load) as load, contender:
            load.run("short", 1, 0.1)
            before = contender.cpu()
            found = load.run(mode, clients, SECONDS)
            found["cpu"] = contender.cpu() - before
        assert found["failed"] == 0, f"{contender.name}, {mode}: {found}"
        found["rate"] = found["n"] / found["seconds"]
        found["gbits"] = found["bytes"] * 8 / found["seconds"] / 1e9
        found["cpu_op"] = found["cpu"] / max(found["n"], 1) * 1e4
        found["cpu_gb"] = found["cpu"] / max(found["bytes"] / 1e9, 1e-9)
        return found

    def traffic(self, threads, mode, clients):
        """The figures of each repetition, by contender."""
        found = {}
        for _ in range(REPETITIONS):
            for contender in (*self.relays(threads), HAProxy(threads), TunedHAProxy(threads), Contender()):
                found.setdefault(contender.name, []).append(self.measure(contender, mode, clients))
        return found

    def table(self, title, found, columns):
        """Prints a row per contender. A cell has the median, the range, and the relay's median divided by this one."""
        say("", f"### {title}", "", "| | " + " | ".join(head for _, head, _ in columns) + " |", "|---|" + "---|" * len(columns))
        for name, runs in found.items():
            cells = []
            for key, _, digits in columns:
                values = [run[key] for run in runs]
                median = statistics.median(values)
                if key.startswith("cpu") and median == 0:
                    cells.append("")
                    continue
                cell = f"**{median:,.{digits}f}** ({min(values):,.{digits}f}-{max(values):,.{digits}f})"
                if name != WITH_LIBRARY:
                    cell += f", ratio {ratio_of(statistics.median(run[key] for run in found[WITH_LIBRARY]), median):.2f}"
                cells.append(cell)
            say(f"| {name} | " + " | ".join(cells) + " |")

    def targets(self, found):
        say("", "### Targets", "", "| | measured | target | |", "|---|---|---|---|")
        for label, key, figure, other, sign, limit in TARGETS:
            ours, theirs = (statistics.median(run[figure] for run in found[key][name]) for name in (WITH_LIBRARY, other))
            ratio = ratio_of(ours, theirs)
            say(f"| {label} | {ratio:.2f} | {sign} {limit} | {verdict(ratio >= limit if sign == '>=' else ratio <= limit)} |")

    def relay_section(self, threads):
        say(f"Each figure is the median of {REPETITIONS} runs of {SECONDS:g} s, with the minimum and the maximum.")
        found = {}
        for key, (mode, clients, title) in MODES.items():
            found[key] = self.traffic(threads, mode, clients)
            self.table(title, found[key], RATE_COLUMNS if key in ("short", "kept") else STREAM_COLUMNS)
        self.targets(found)
        for key, figure, label in (("short", "rate", "short connections per second"), ("four", "gbits", "Gbit/s, four streams")):
            medians = {name: statistics.median(run[figure] for run in runs) for name, runs in found[key].items()}
            plots.bars(self.plot(f"{figure}-{threads}.svg"), f"{label}, {threads} thread{'s' if threads > 1 else ''}", medians)
            say("", f"![{label}]({figure}-{threads}.svg)")

    # ---- Many connections and many destinations. ----

    def memory(self):
        count = 200 if QUICK else 9_600
        each = {}
        say("| | connections | bytes per connection |", "|---|---|---|")
        for contender in (*self.relays(), HAProxy()):
            with Load(self.load) as load, contender:
                load.run("short", 1, 0.1)
                before = contender.memory()
                with Idle(self.load, count) as idle:
                    time.sleep(0.5)
                    each[contender.name] = (contender.memory() - before) / idle.count
                    say(f"| {contender.name} | {idle.count:,} | {each[contender.name]:,.0f} |")
        ratio = ratio_of(each[WITH_LIBRARY], each["HAProxy"])
        say("", "| | measured | target | |", "|---|---|---|---|")
        say(f"| bytes per connection, relative to HAProxy | {ratio:.2f} | <= 0.25 | {verdict(ratio <= 0.25)} |")

    def idle(self):
        steps = (10, 100) if QUICK else (100, 1_000, 3_000, 7_000)
        rates = {}
        for count in steps:
            for contender in (*self.relays(), HAProxy()):
                values = []
                for _ in range(1 if QUICK else 3):
                    with Load(self.load) as load, contender, Idle(self.load, count) as idle:
                        assert idle.count == count, f"{contender.name}: {idle.count} of {count} connections"
                        values.append(self.short_rate(load))
                rates.setdefault(contender.name, []).append(statistics.median(values))
        say("Short connections per second, by number of idle connections.", "")
        say("| idle | " + " | ".join(rates) + " |", "|---|" + "---|" * len(rates))
        for i, count in enumerate(steps):
            say(f"| {count:,} | " + " | ".join(f"{values[i]:,.0f}" for values in rates.values()) + " |")
        plots.lines(self.plot("live.svg"), "short connections per second, by number of idle connections", steps, rates)
        say("", "![short connections per second, by number of idle connections](live.svg)")

    def destinations(self):
        steps = (1, 1_000) if QUICK else (1, 1_000, 10_000, 100_000, 1_000_000)
        rates, started = {}, {}
        for count in steps:
            prefixes = ["203.0.113.0/24", *(str(ipaddress.ip_address(0x01000000 + 512 * i)) + "/24" for i in range(count - 1))]
            contenders = self.relays(1, prefixes)
            values = {contender.name: [] for contender in contenders}
            # nft takes long to load a million prefixes: they are loaded once and measured more often.
            loads, runs = (1, 1) if QUICK else (3, 2) if count < 1_000_000 else (1, 5)
            for _ in range(loads):
                for contender in contenders:
                    with Load(self.load) as load:
                        start = time.monotonic()
                        with contender:
                            started.setdefault(contender.name, {})[count] = time.monotonic() - start
                            values[contender.name] += [self.short_rate(load) for _ in range(runs)]
            for name, found in values.items():
                rates.setdefault(name, []).append(statistics.median(found))
        say("Short connections per second, and the time to start the relay with its rules, by number of intercepted prefixes.", "")
        say("| prefixes | " + " | ".join(f"{name} | start" for name in rates) + " |", "|---|" + "---|---|" * len(rates))
        for i, count in enumerate(steps):
            say(f"| {count:,} | " + " | ".join(f"{values[i]:,.0f} | {started[name][count]:.2f} s" for name, values in rates.items()) + " |")
        plots.lines(self.plot("prefixes.svg"), "short connections per second, by number of intercepted prefixes", steps, rates)
        say("", "![short connections per second, by number of intercepted prefixes](prefixes.svg)")

    def short_rate(self, load):
        found = load.run("short", 4, SECONDS / 2)
        return found["n"] / found["seconds"]

    def textbook(self):
        """Measures clients that reuse ports of connections in TIME_WAIT, with and without `socket wildcard 0`."""
        contenders = (
            ("libtproxy", self.relays()[0]),
            ("textbook", Relay("", self.relay_raw, "textbook")),
            ("textbook, `socket wildcard 0`", Relay("", self.relay_raw, True)),
        )
        say("Short connections per second, four clients, shortly after other connections.", "")
        say("| rules | per second | p99 us |", "|---|---|---|")
        for name, contender in contenders:
            found = []
            for _ in range(1 if QUICK else 3):
                with Load(self.load) as load, contender:
                    load.run("short", 1, 0.3)
                    found.append(load.run("short", 4, SECONDS))
            median = sorted(found, key=lambda run: run["n"])[len(found) // 2]
            say(f"| {name} | {median['n'] / median['seconds']:,.0f} | {median['p99']:,.0f} |")

    # ---- The library itself. ----

    def calls(self):
        count = 50 if QUICK else 1000
        say("User-space instructions (callgrind) and system calls (strace) of one call.", "")
        say("| | instructions | equivalent C | ratio | target | | system calls | equivalent C |", "|---|---|---|---|---|---|---|---|")
        for name, argument, datagrams in CALLS:
            figures = []
            for program in ("calls", "calls-raw"):
                command = [os.path.join(self.build, "bench", program), argument]
                figures.append((instructions(command, name, count, isolated) / datagrams, system_calls(command, count)))
            (ours, our_calls), (theirs, their_calls) = figures
            most = target(theirs)
            label = name + (f", per datagram of {datagrams}" if datagrams > 1 else "")
            say(f"| {label} | {ours:.0f} | {theirs:.0f} | {ours / theirs:.2f} | <= {most:.0f} | {verdict(ours <= most)} "
                f"| {our_calls:.0f} | {their_calls:.0f} |")

    def library(self):
        path = os.path.join(self.build, "stage", "lib", "libtproxy.so")
        needed = ", ".join(re.findall(r"NEEDED.*\[(.*)\]", demo.run("readelf", "-d", path)))
        took = {path: [], os.path.join(self.build, "bench", "libnothing.so"): []}
        for _ in range(2 if QUICK else 20):
            for library, times in took.items():
                code = f"import ctypes,time;ctypes.CDLL(None);t=time.perf_counter();ctypes.CDLL({library!r});print(time.perf_counter()-t)"
                times.append(float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout))
        ours, empty = (statistics.median(times) * 1e6 for times in took.values())
        say("| | |", "|---|---|")
        say(f"| size, stripped | {os.stat(path).st_size:,} bytes |", f"| NEEDED | {needed} |")
        say(f"| time to load | {ours:,.0f} us |", f"| time to load an empty library | {empty:,.0f} us |")


SECTIONS = {
    "relay-1": lambda run: run.relay_section(1),
    "relay-2": lambda run: run.relay_section(2),
    "memory": Run.memory,
    "idle": Run.idle,
    "destinations": Run.destinations,
    "textbook": Run.textbook,
    "calls": Run.calls,
    "library": Run.library,
}


class Idle:
    """A client that holds connections open."""

    def __init__(self, program, count):
        self.program, self.wanted = program, count

    def __enter__(self):
        command = demo.on("client", self.program, "idle", str(self.wanted), SERVER)
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.count = int(re.search(r"\d+", self.process.stdout.readline())[0])
        return self

    def __exit__(self, *_):
        self.process.communicate()


def isolated(command):
    """The command line that runs a command in a network namespace of its own, with loopback up."""
    return ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]


def system_calls(command, count):
    """The system calls of one iteration, without its close(2) and sendto(2), and without the client of tp_accept()."""

    def total(n):
        output = subprocess.run(isolated(["strace", "-c", *command, str(n)]), capture_output=True, text=True, check=True).stderr
        calls = {line.split()[-1]: int(line.split()[3]) for line in output.splitlines() if re.match(r"\s*\d+[.,]\d+ ", line)}
        client = ("socket", "connect") if "accept" in command else ()
        return sum(value for key, value in calls.items() if key not in ("close", "sendto", "total", *client))

    return (total(count) - total(0)) / count


if __name__ == "__main__":
    if sys.argv[1] != "--inside":
        # unshare makes all mounts of the new mount namespace private, and then mounts its own /proc there.
        user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        new = ["unshare", *user, "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
        os.execvp(new[0], [*new, sys.executable, os.path.abspath(__file__), "--inside", *sys.argv[1:]])
    build_directory, docs_directory, section = sys.argv[2:]
    SECTIONS[section](Run(build_directory, docs_directory))
