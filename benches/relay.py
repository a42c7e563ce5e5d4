"""examples-c/relay.c beside what a user would take instead: one run, written to docs/benchmarks.md.

    relay.py BUILD-DIRECTORY DOCS-DIRECTORY [SECONDS [REPETITIONS]]

Each figure is the median of repetitions in which the rivals take turns, on hosts
that are made anew for each; the spread is the least and the most. `make bench`
calls it.
"""

import ipaddress
import os
import platform
import re
import statistics
import subprocess
import sys
import time

import plots
from topology import SERVER, HAProxy, Load, Relay, Rival, TunedHAProxy, demo

# What is called, what the program calls it, and for how many datagrams.
CALLS = (
    ("tp_socket", "socket", 1),
    ("tp_connect_from", "connect", 1),
    ("tp_orig_dst", "orig_dst", 1),
    ("tp_recvfrom", "recvfrom", 1),
    ("tp_msg_orig_dst", "msg_orig_dst", 1),
    ("tp_recv_datagrams", "datagrams", 32),
)

MODES = {
    "short": ("short", 4, "short connections, four clients"),
    "kept": ("kept", 4, "requests on four kept connections"),
    "one": ("z", 1, "one stream"),
    "four": ("z", 4, "four streams"),
    "copied": ("bulk", 1, "one stream, ends that copy"),
    "copied4": ("bulk", 4, "four streams, ends that copy"),
}


class Run:
    def __init__(self, build, seconds, repetitions):
        self.build, self.seconds, self.repetitions = build, seconds, repetitions
        self.load = os.path.join(build, "bench", "load")
        self.page = []

    def rivals(self, threads):
        return [
            Relay("relay with libtproxy", os.path.join(self.build, "examples", "relay"), False, threads),
            Relay("the same relay by hand", os.path.join(self.build, "bench", "relay-raw"), True, threads),
            HAProxy(threads),
            TunedHAProxy(threads),
            Rival(),
        ]

    def say(self, *lines):
        self.page += lines
        print(*lines, sep="\n", flush=True)

    # ---- Traffic. ----

    def one(self, rival, mode, clients):
        with Load(self.load) as load, rival:
            load.run("short", 1, 0.1)
            before = rival.cpu()
            found = load.run(mode, clients, self.seconds)
            found["cpu"] = rival.cpu() - before
        assert found["failed"] == 0, f"{rival.name}, {mode}: {found}"
        found["rate"] = found["n"] / found["seconds"]
        found["gbits"] = found["bytes"] * 8 / found["seconds"] / 1e9
        found["cpu_op"] = found["cpu"] / max(found["n"], 1) * 1e4
        found["cpu_gb"] = found["cpu"] / (found["bytes"] / 1e9)
        return found

    def traffic(self, threads):
        """{mode: {rival: [what each repetition found]}}"""
        found = {}
        for key, (mode, clients, _) in MODES.items():
            for _ in range(self.repetitions):
                for rival in self.rivals(threads):
                    found.setdefault(key, {}).setdefault(rival.name, []).append(self.one(rival, mode, clients))
        return found

    def table(self, title, found, columns):
        """A line for each rival; each cell its median, its spread, and the relay's median divided by it."""
        self.say("", f"### {title}", "", "| | " + " | ".join(head for _, head, _ in columns) + " |", "|---|" + "---|" * len(columns))
        ours = next(iter(found.values()))
        for name, runs in found.items():
            cells = []
            for key, _, digits in columns:
                values = [run[key] for run in runs]
                middle = statistics.median(values)
                if key.startswith("cpu") and middle == 0:
                    cells.append("")
                    continue
                cell = f"**{middle:,.{digits}f}** ({min(values):,.{digits}f}-{max(values):,.{digits}f})"
                if runs is not ours:
                    cell += f", ratio {statistics.median(run[key] for run in ours) / middle:.2f}"
                cells.append(cell)
            self.say(f"| {name} | " + " | ".join(cells) + " |")

    def targets(self, found):
        def ratio(key, figure, rival, worst=False):
            values = [statistics.median(run[figure] for run in found[key][name]) for name in ("relay with libtproxy", rival)]
            return values[0] / values[1]

        rows = [
            ("short connections a second, to HAProxy", ratio("short", "rate", "HAProxy"), ">=", 1.3),
            ("CPU a connection, to HAProxy", ratio("short", "cpu_op", "HAProxy"), "<=", 0.75),
            ("throughput of four streams, to HAProxy", ratio("four", "gbits", "HAProxy"), ">=", 1.5),
            ("CPU a GB, to HAProxy", ratio("four", "cpu_gb", "HAProxy"), "<=", 0.7),
            ("p99 of short connections, to HAProxy", ratio("short", "p99", "HAProxy"), "<=", 0.8),
            ("throughput of four streams, to plain forwarding", ratio("four", "gbits", "plain forwarding"), ">=", 0.65),
            ("short connections, to the same by hand", ratio("short", "rate", "the same relay by hand"), ">=", 0.98),
            ("four streams, to the same by hand", ratio("four", "gbits", "the same relay by hand"), ">=", 0.98),
        ]
        self.say("", "| | measured | wanted | |", "|---|---|---|---|")
        for what, value, sign, limit in rows:
            met = value >= limit if sign == ">=" else value <= limit
            self.say(f"| {what} | {value:.2f} | {sign} {limit} | {'met' if met else '**missed**'} |")

    # ---- What is held, and what of it weighs on the rest. ----

    def memory(self):
        self.say("", "### Memory of an idle connection", "", "As many as the descriptor limit lets each have; memory that is the process's own.", "")
        self.say("| | connections | bytes each |", "|---|---|---|")
        each = {}
        for rival in self.rivals(1)[:3]:
            with Load(self.load) as load, rival:
                load.run("short", 1, 0.1)
                before = rival.memory()
                with Idle(self.load, 9_600) as idle:
                    time.sleep(0.5)
                    each[rival.name] = (rival.memory() - before) / idle.count
                    self.say(f"| {rival.name} | {idle.count:,} | {each[rival.name]:,.0f} |")
        ratio = each["relay with libtproxy"] / each["HAProxy"]
        self.say("", f"To HAProxy: {ratio:.2f} (wanted: <= 0.25).")

    def live(self):
        self.say("", "### Short connections a second beside connections that are idle", "")
        steps = (100, 1_000, 3_000, 7_000)
        lines = {}
        for count in steps:
            for rival in self.rivals(1)[:3]:
                values = []
                for _ in range(3):
                    with Load(self.load) as load, rival, Idle(self.load, count) as idle:
                        assert idle.count == count, f"{rival.name}: {idle.count} of {count}"
                        found = load.run("short", 4, self.seconds / 2)
                        values.append(found["n"] / found["seconds"])
                lines.setdefault(rival.name, []).append(statistics.median(values))
        self.say("| idle | " + " | ".join(lines) + " |", "|---|" + "---|" * len(lines))
        for i, count in enumerate(steps):
            self.say(f"| {count:,} | " + " | ".join(f"{values[i]:,.0f}" for values in lines.values()) + " |")
        return steps, lines

    def many_prefixes(self):
        self.say("", "### Short connections a second by how many destinations are intercepted", "")
        self.say("Scattered /24 networks, and the server's. By hand: an nft set of them (`flags interval`), loaded by `nft -f`.", "")
        steps = (1, 1_000, 10_000, 100_000, 1_000_000)
        path = os.path.join(self.build, "examples", "relay"), os.path.join(self.build, "bench", "relay-raw")
        lines, started = {}, {}
        for count in steps:
            prefixes = ["203.0.113.0/24", *(str(ipaddress.ip_address(0x01000000 + 512 * i)) + "/24" for i in range(count - 1))]
            rivals = [Relay("relay with libtproxy", path[0], False, 1, prefixes), Relay("the same relay by hand", path[1], True, 1, prefixes)]
            values = {rival.name: [] for rival in rivals}
            # To load a million takes nft long: once is enough.
            for _ in range(3 if count < 1_000_000 else 1):
                for rival in rivals:
                    with Load(self.load) as load:
                        start = time.monotonic()
                        with rival:
                            started.setdefault(rival.name, {})[count] = time.monotonic() - start
                            for _ in range(2 if count < 1_000_000 else 5):
                                found = load.run("short", 4, self.seconds / 2)
                                values[rival.name].append(found["n"] / found["seconds"])
            for name, rates in values.items():
                lines.setdefault(name, []).append(statistics.median(rates))
        self.say("| destinations | " + " | ".join(f"{name} | started in" for name in lines) + " |", "|---|" + "---|---|" * len(lines))
        for i, count in enumerate(steps):
            self.say(f"| {count:,} | " + " | ".join(f"{values[i]:,.0f} | {started[name][count]:.2f} s" for name, values in lines.items()) + " |")
        return steps, lines

    # ---- The library itself. ----

    def calls(self):
        self.say("", "## The calls beside the same by hand", "", "User-space instructions (callgrind) and system calls (strace) of one call.", "")
        self.say("| | instructions | by hand | ratio | system calls | by hand |", "|---|---|---|---|---|---|")
        for name, what, per in CALLS:
            cells = []
            for program in ("calls", "calls-raw"):
                command = [os.path.join(self.build, "bench", program), what]
                cells.append((instructions(command, name) / per, system_calls(command)))
            (ours, our_calls), (hand, hand_calls) = cells
            each = f", for each of {per}" if per > 1 else ""
            self.say(f"| {name}{each} | {ours:.0f} | {hand:.0f} | {ours / hand:.2f} | {our_calls:.0f} | {hand_calls:.0f} |")
        self.say("", "Wanted: at most 300 instructions, 1.5 times those by hand, and no system call more. By hand is the same service: both",
                 "address families, TPROXY and REDIRECT, the descriptor closed on failure. Not by hand: arguments and what the kernel says",
                 "are checked, nothing is written on failure, errno is left alone, what failed is told in a sentence, panics are caught.",
                 "Behind TPROXY alone one getsockname can do for tp_orig_dst; the relay by hand does so.")

    def library(self):
        path = os.path.join(self.build, "stage", "lib", "libtproxy.so")
        needed = re.findall(r"NEEDED.*\[(.*)\]", demo.run("readelf", "-d", path))
        self.say("", "## The shared library", "", f"- {os.stat(path).st_size:,} bytes, stripped (wanted: at most {420 << 10:,}); NEEDED: {', '.join(needed)}")
        took = {path: [], os.path.join(self.build, "bench", "libnothing.so"): []}
        for _ in range(20):
            for library, times in took.items():
                code = f"import ctypes,time;ctypes.CDLL(None);t=time.perf_counter();ctypes.CDLL({library!r});print(time.perf_counter()-t)"
                times.append(float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout))
        ours, empty = (statistics.median(times) * 1e6 for times in took.values())
        self.say(f"- loaded in {ours:,.0f} us; a library with nothing in it in {empty:,.0f} us")


class Idle:
    """Connections that are held."""

    def __init__(self, program, count):
        self.program, self.wanted = program, count

    def __enter__(self):
        command = demo.on("client", self.program, "idle", str(self.wanted), SERVER)
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.count = int(re.search(r"\d+", self.process.stdout.readline())[0])
        return self

    def __exit__(self, *_):
        self.process.communicate()


def alone(command):
    return ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]


def instructions(command, name, count=1000):
    tool = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", f"--toggle-collect={name}"]
    said = subprocess.run(alone([*tool, *command, str(count)]), capture_output=True, text=True, check=True).stderr
    return int(re.search(r"Collected : (\d+)", said)[1]) / (count + (name == "tp_connect_from"))


def system_calls(command, count=1000):
    """Of one turn of the loop, without the close that ends it."""

    def total(n):
        said = subprocess.run(alone(["strace", "-c", *command, str(n)]), capture_output=True, text=True, check=True).stderr
        calls = {line.split()[-1]: int(line.split()[3]) for line in said.splitlines() if re.match(r"\s*\d+[.,]\d+ ", line)}
        return sum(value for key, value in calls.items() if key not in ("close", "sendto", "total"))

    return (total(count) - total(0)) / count


def machine():
    with open("/proc/cpuinfo", encoding="ascii") as file:
        model = re.search(r"model name\s*: (.*)", file.read())
    haproxy = re.search(r"version (\S+)", demo.run("haproxy", "-v"))[1]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} x {model[1] if model else platform.machine()}, {memory:.0f} GiB; Linux {platform.release()}; HAProxy {haproxy}"


def main(build, docs, seconds="1", repetitions="5"):
    run = Run(build, float(seconds), int(repetitions))
    run.say("# Benchmarks", "", "Written by `make bench`; every figure of one section is from one run on one machine.", "", machine() + ".", "")
    run.say("Client, relay and server are three namespaces of this machine and share its cores: what the ends use is not the relay's to",
            "have. So they use little: one thread each with epoll, and streams are sent by sendfile and received without a copy",
            "(MSG_TRUNC), but where it says that the ends copy. Rivals without rules of their own have the textbook's, mended by",
            "`socket wildcard 0` (see below). Congestion control is reno for all: the pacing of others would be what is measured.",
            f"Each figure is the median of {run.repetitions} turns of {run.seconds:g} s, with the least and the most, and our figure divided by it.")
    for threads in (1, 2):
        run.say("", f"## {threads} thread{'s' if threads > 1 else ''}")
        found = run.traffic(threads)
        for key in ("short", "kept"):
            run.table(MODES[key][2], found[key], (("rate", "a second", 0), ("cpu_op", "CPU s for 10,000", 3),
                                                  ("p50", "p50 us", 0), ("p99", "p99 us", 0), ("p999", "p99.9 us", 0)))
        for key in ("one", "four", "copied", "copied4"):
            run.table(MODES[key][2], found[key], (("gbits", "Gbit/s", 1), ("cpu_gb", "CPU s a GB", 4)))
        run.targets(found)
        for key, figure, unit in (("short", "rate", "connections a second"), ("four", "gbits", "Gbit/s, four streams")):
            bars = {name: statistics.median(one[figure] for one in runs) for name, runs in found[key].items()}
            plots.bars(os.path.join(docs, f"{figure}-{threads}.svg"), f"{unit}, {threads} thread(s)", bars)
            run.say("", f"![{unit}]({figure}-{threads}.svg)")
    run.say("", "## Many connections")
    run.memory()
    steps, lines = run.live()
    plots.lines(os.path.join(docs, "live.svg"), "short connections a second beside idle ones", steps, lines)
    run.say("", "![short connections a second beside idle ones](live.svg)")
    steps, lines = run.many_prefixes()
    plots.lines(os.path.join(docs, "prefixes.svg"), "short connections a second by destinations that are intercepted", steps, lines)
    run.say("", "![short connections a second by destinations](prefixes.svg)")
    run.calls()
    run.library()
    textbook(run)
    with open(os.path.join(docs, "benchmarks.md"), "w", encoding="utf-8") as file:
        file.write("\n".join(run.page) + "\n")


def textbook(run):
    """What `-m socket --transparent`, or nft's `socket transparent 1`, does to clients that use a port again."""
    run.say("", "## The textbook's rules", "", "Short connections a second, four clients, after others that ended less than a minute ago. The textbook's rules give",
            "a SYN whose ports are those of a connection in TIME_WAIT to that, and not to the listener: it is answered by an",
            "ACK, reset by the client, and sent again later.", "", "| rules | a second | p99 us |", "|---|---|---|")
    raw = os.path.join(run.build, "bench", "relay-raw")
    for name, rival in (("libtproxy's", run.rivals(1)[0]), ("textbook", Relay("", raw, "textbook")), ("textbook, `socket wildcard 0`", Relay("", raw, True))):
        found = []
        for _ in range(3):
            with Load(run.load) as load, rival:
                load.run("short", 1, 0.3)
                found.append(load.run("short", 4, run.seconds))
        middle = sorted(found, key=lambda one: one["n"])[1]
        run.say(f"| {name} | {middle['n'] / middle['seconds']:,.0f} | {middle['p99']:,.0f} |")


if __name__ == "__main__":
    if sys.argv[1] != "--inside":
        new = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
        os.execvp(new[0], [*new, sys.executable, os.path.abspath(__file__), "--inside", *sys.argv[1:]])
    main(*sys.argv[2:])
