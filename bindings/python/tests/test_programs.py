"""Tests the command, the examples, and how the library is found. Each runs as a separate process."""

from __future__ import annotations

import argparse
import contextlib
import ctypes.util
import ipaddress
import json
import os
import queue
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from net import PATIENCE, V4, V6, Hosts, Lab, Net, limit, tcp_listener, udp_client

import tproxy
from tproxy import Finding, Severity, __main__, _library
from tproxy import _ctypes as c

EXAMPLES = Path(__file__).parents[1] / "examples"
LIBRARY = _library.BESIDE


def python(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python that turns every warning into an error."""
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=limit(120),
        cwd="/",
        env={**os.environ, **environment},
    )


# The command.


def test_command_version_prints_version() -> None:
    done = python("-m", "tproxy", "version")
    assert done.stdout.startswith(f"libtproxy {tproxy.version()} (")
    assert done.returncode == 0


def test_command_render_prints_script() -> None:
    options = [
        "--listen",
        "[::]:3129",
        "--port",
        "80",
        "--port",
        "8000-8100",
        "--flag",
        "local-output",
        "--name",
        "one",
    ]
    done = python("-m", "tproxy", "render", *options)
    assert (done.returncode, done.stderr) == (0, "")
    expected = tproxy.render_rules(
        listen_addr="[::]:3129", ports=[80, (8000, 8100)], flags=tproxy.RulesFlag.LOCAL_OUTPUT, name="one"
    )
    assert done.stdout == expected
    more = [
        "--format",
        "iptables",
        "--dst",
        "10.0.0.0/8",
        "--src",
        "::/0",
        "--bypass",
        "10.1.0.0/16",
        "--protocol",
        "udp",
    ]
    done = python("-m", "tproxy", "render", "--listen", "[::]:3129", "--interface", "eth9", *more)
    assert done.returncode == 0
    for words in ("iptables-restore", "udp", "10.0.0.0/8", "10.1.0.0/16", "eth9"):
        assert words in done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 2, "usage"),
        (["render", "--port", "x"], 2, "port"),
        (["render", "--listen", "nowhere", "--port", "80"], 2, "nowhere"),
        (["render", "--dst", "10.0.0.0/99"], 2, "10.0.0.0/99"),
        (["render", "--flag", "no-such"], 2, "NO_SUCH"),
        (["render"], 1, "no listeners"),
        (["purge", "no such/name"], 1, "name"),
    ],
)
def test_command_with_bad_arguments_fails(arguments: list[str], status: int, words: str) -> None:
    done = python("-m", "tproxy", *arguments)
    assert done.returncode == status
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_command_purge_removes_stale_routing(net: Net) -> None:
    """A killed process has left its routing."""
    die = "import os, tproxy; rules = tproxy.install_rules(flags=tproxy.RulesFlag.DIVERT_ONLY); os._exit(0)"
    assert net.run(lambda: python("-c", die)).returncode == 0
    assert "7470" in net.command("ip", "rule")
    done = net.run(lambda: python("-m", "tproxy", "purge"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "7470" not in net.command("ip", "rule")


# The check. The findings come from the library; these tests replace them to test what Python makes of them.

FOUND = [
    (0, b"kernel.nf_tables", b"nf_tables is there", b"", b""),
    (
        2,
        b"sysctl.rp_filter",
        b"stra\xc3\x9fe",
        b"answers are dropped",
        b"sysctl -w a=0\nsysctl -w b=0",
    ),
    (3, b"cap.net_admin", b"missing", b"no rules can be made", b"run as root"),
]


def finds(found: Sequence[tuple[int, bytes, bytes, bytes, bytes]], result: int) -> Any:
    """A replacement for the library's call, with the same callbacks."""

    def tp_check(report: Any, context: Any) -> int:
        for finding in found:
            report(ctypes.pointer(c.tp_finding(*finding)), context)
        return result

    return ctypes.CFUNCTYPE(ctypes.c_int, c.tp_finding_fn, ctypes.c_void_p)(tp_check)


def test_check_and_command_check_print_findings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(c, "tp_check", finds(FOUND, 1))
    assert tproxy.check()[1] == Finding(
        Severity.WARNING, "sysctl.rp_filter", "straße", "answers are dropped", "sysctl -w a=0\nsysctl -w b=0"
    )
    assert __main__.main(["check"]) == 1
    table = capsys.readouterr().out
    assert "\033" not in table
    assert table.splitlines()[0] == "ok       kernel.nf_tables  nf_tables is there"
    assert "         fix: sysctl -w b=0" in table.splitlines()
    assert __main__.main(["check", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[2] == {
        "severity": "failure",
        "id": "cap.net_admin",
        "message": "missing",
        "impact": "no rules can be made",
        "fix": "run as root",
    }
    monkeypatch.setattr(c, "tp_check", finds(FOUND[:2], 0))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert __main__.main(["check"]) == 0
    assert "\033[33mwarning\033[0m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert __main__.main(["check"]) == 0
    assert "\033" not in capsys.readouterr().out


def test_command_check_prints_json() -> None:
    done = python("-m", "tproxy", "check", "--json")
    assert done.returncode in (0, 1), done.stderr
    findings = json.loads(done.stdout)
    assert findings
    assert all(set(finding) == set(Finding._fields) for finding in findings)


# How the library is found.


def load(*statements: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return python("-c", "; ".join(["import tproxy._ctypes as c", *statements, "print(c.library._name)"]), **environment)


def compiled(directory: Path, source: str, name: str = "other.so", *options: str) -> str:
    path = directory / name
    command = ["cc", "-shared", "-fPIC", *options, "-x", "c", "-", "-o", str(path)]
    subprocess.run(command, input=source, text=True, check=True, timeout=limit(60))
    return str(path)


def test_library_beside_package_or_in_environment_is_loaded(tmp_path: Path) -> None:
    assert load().stdout.strip() == str(LIBRARY)
    copy = shutil.copy(LIBRARY, tmp_path / "libmine.so")
    assert load(LIBTPROXY=str(copy)).stdout.strip() == str(copy)


def test_library_in_environment_is_ignored_by_isolated_python() -> None:
    """A program with more rights than its user runs `python -I`: which library is loaded is not the user's choice."""
    package = str(LIBRARY.parent.parent)
    words = f"import sys; sys.path.insert(0, {package!r}); import tproxy._ctypes as c; print(c.library._name)"
    done = python("-I", "-c", words, LIBTPROXY="/nonexistent/libtproxy.so")
    assert done.stdout.strip() == str(LIBRARY), done.stderr


def test_library_installed_is_found(tmp_path: Path) -> None:
    """Without one beside the package, the loader's; without that, every place that was tried is told."""
    shutil.copytree(LIBRARY.parent, tmp_path / "tproxy", ignore=shutil.ignore_patterns("*.so*", "__pycache__"))
    # This package is not where its own path file or an editable install has it.
    alone = {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = load(**alone)
    installed = ctypes.util.find_library("tproxy")
    if installed is None:
        assert done.returncode == 1
        for words in (
            "$LIBTPROXY: not set",
            "beside the package: nothing",
            "libtproxy.so.0",
            "find_library",
            "make install",
        ):
            assert words in done.stderr
    system = tmp_path / "lib"
    system.mkdir()
    # By another name than the loader is asked for, it is found by find_library.
    compiled(system, 'const char *tp_version(void) { return "9.0"; }', "libtproxy.so", "-Wl,-soname,libtproxy.so")
    assert "libtproxy.so is libtproxy 9.0" in load(**alone, LD_LIBRARY_PATH=str(system)).stderr
    shutil.copy(LIBRARY, system / "libtproxy.so.0")
    assert load(**alone, LD_LIBRARY_PATH=str(system)).stdout.strip() == "libtproxy.so.0"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            'const char *tp_version(void) { return "1.4.2"; }',
            "libtproxy 1.4.2, whose interface is another (libtproxy.so.1)",
        ),
        ("int something_else;", "is not libtproxy"),
        ('const char *tp_version(void) { return "0.0.1"; }', "has no tp_socket: it is older"),
    ],
)
def test_library_that_does_not_fit_is_refused(tmp_path: Path, source: str, words: str) -> None:
    done = load(LIBTPROXY=compiled(tmp_path, source))
    assert done.returncode == 1
    assert words in done.stderr.splitlines()[-1]


def test_library_named_but_missing_is_refused() -> None:
    """A library that is named is not replaced by another one."""
    done = load(LIBTPROXY="/nowhere/libtproxy.so")
    assert done.returncode == 1
    assert "/nowhere/libtproxy.so" in done.stderr


# The examples.


class Program:
    """An example that runs on a host, and the lines that it prints. It is killed at the end of the block."""

    def __init__(self, net: Net, *arguments: str | Path) -> None:
        command = [sys.executable, "-W", "error", *arguments]
        pipe = subprocess.PIPE
        self.process = net.run(lambda: subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True))
        self.lines: queue.Queue[str] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.put(line.strip())

    def line(self) -> str:
        return self.lines.get(timeout=PATIENCE)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.reader.join()
        self.process.__exit__(None, None, None)

    def stop(self, number: int) -> None:
        self.process.send_signal(number)
        assert self.process.stderr
        assert (self.process.wait(PATIENCE), self.process.stderr.read()) == (0, "")


@pytest.mark.parametrize(("name", "lines"), [("tcp_proxy.py", 200), ("dns_interceptor.py", 65)])
def test_examples_are_short(name: str, lines: int) -> None:
    assert len((EXAMPLES / name).read_text().splitlines()) < lines
    done = python(EXAMPLES / name)
    assert done.returncode in (1, 2)
    assert "PORT" in done.stderr


def test_example_tcp_proxy_proxies(lab: Lab, hosts: Hosts) -> None:
    before = lab.proxy.state()
    with Program(lab.proxy, EXAMPLES / "tcp_proxy.py", "3129", "80") as proxy:
        assert proxy.line() == "listening"
        with lab.serving(80, 2) as server:
            for _ in range(2):
                heard = lab.ask(hosts.server, 80)
                assert heard.answer == f"seen {hosts.client}, heard who am I?"
                way = f"{hosts.client} port {heard.client[1]} -> {mapped(hosts.server)} port 80"
                assert proxy.line().endswith(way)
            assert server.result() == [hosts.client] * 2
        # The server has ended: the proxy closes the client's connection.
        assert lab.client.run(lambda: hear(hosts.server, 80)) == b""
        # It does not wait for connections that are open.
        with lab.server.run(lambda: tcp_listener(80)) as listener:
            with lab.client.run(lambda: socket.create_connection((hosts.server, 80), PATIENCE)) as client:
                with listener.accept()[0]:
                    proxy.stop(signal.SIGTERM)
                with contextlib.suppress(ConnectionResetError):
                    assert client.recv(1) == b""
    assert lab.proxy.state() == before


def hear(host: str, port: int) -> bytes:
    """What the server says first; nothing, if the connection ends or is reset."""
    try:
        with socket.create_connection((host, port), PATIENCE) as stream:
            return stream.recv(10)
    except ConnectionResetError:
        return b""


def test_example_tcp_proxy_denies_destinations(lab: Lab, hosts: Hosts) -> None:
    other = V4 if hosts is V6 else V6
    with Program(lab.proxy, EXAMPLES / "tcp_proxy.py", "--deny", hosts.server, "3129", "80") as proxy:
        assert proxy.line() == "listening"
        with lab.server.run(lambda: tcp_listener(80)) as listener:
            assert lab.client.run(lambda: hear(hosts.server, 80)) == b""
            with lab.client.run(lambda: socket.create_connection((other.server, 80), PATIENCE)):
                # The first that comes is the other one.
                stream, seen = listener.accept()
                stream.close()
                assert seen[0].removeprefix("::ffff:") == other.client
        proxy.stop(signal.SIGTERM)


def test_example_tcp_proxy_denies_metadata_services() -> None:
    program = runpy.run_path(str(EXAMPLES / "tcp_proxy.py"))
    options = argparse.Namespace(deny=[ipaddress.ip_network(one) for one in program["DENIED"]])
    for address in (
        "169.254.169.254",
        "fd00:ec2::254",
        "fd20:ce::254",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
    ):
        assert program["is_denied"]((address, 80), options), address
        if "." in address:
            assert program["is_denied"]((f"::ffff:{address}", 80), options), address
    for address in ("192.0.2.1", "100.100.100.201", "fd20:ce::253"):
        assert not program["is_denied"]((address, 80), options), address


def test_example_tcp_proxy_ends_silent_connections(lab: Lab, hosts: Hosts) -> None:
    """A silent client makes room for the next one, and a connection in which nothing moves ends."""
    options = ["--connections", "2", "--idle", "3"]
    with Program(lab.proxy, EXAMPLES / "tcp_proxy.py", *options, "3129", "80") as proxy:
        assert proxy.line() == "listening"
        with lab.server.run(lambda: tcp_listener(80)):

            def dial() -> socket.socket:
                return socket.create_connection((hosts.server, 80), PATIENCE)

            clients = [lab.client.run(dial) for _ in range(2)]
            for _ in clients:
                proxy.line()
            time.sleep(1.2)
            clients.append(lab.client.run(dial))
            proxy.line()
            start = time.monotonic()
            for client in clients:
                with client, contextlib.suppress(ConnectionResetError):
                    assert client.recv(1) == b""
            assert time.monotonic() - start < PATIENCE
        proxy.stop(signal.SIGTERM)


def test_example_tcp_proxy_resets_a_reader_that_does_not_read(lab: Lab, hosts: Hosts) -> None:
    with Program(lab.proxy, EXAMPLES / "tcp_proxy.py", "--idle", "1", "3129", "80") as proxy:
        assert proxy.line() == "listening"
        with lab.server.run(lambda: tcp_listener(80)) as listener:
            with lab.client.run(lambda: socket.create_connection((hosts.server, 80), PATIENCE)):
                stream, _ = listener.accept()
                with stream, pytest.raises(ConnectionError):
                    stream.settimeout(PATIENCE)
                    while True:
                        stream.sendall(bytes(1 << 20))
        proxy.stop(signal.SIGTERM)


def mapped(host: str) -> str:
    return host if ":" in host else "::ffff:" + host


def dns_query(name: str, kind: int) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return struct.pack("!6H", 0x1234, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!2H", kind, 1)


@pytest.mark.parametrize("address", ["192.0.2.53", "2001:db8:53::53"])
def test_example_dns_interceptor_answers(lab: Lab, hosts: Hosts, address: str) -> None:
    """The client asks a server that does not exist, and gets a reply from its address."""
    before = lab.proxy.state()
    arguments = ["3053", "intercepted.example", address]
    with Program(lab.proxy, EXAMPLES / "dns_interceptor.py", *arguments) as interceptor:
        assert interceptor.line() == "listening"
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        kind, other = (28, 1) if ":" in address else (1, 28)

        def ask(query: bytes) -> bytes:
            return lab.client.run(lambda: udp_client(hosts.server, 53, query))[0]

        query = dns_query("Intercepted.Example", kind)
        answer = ask(query)
        assert answer[:2] == query[:2]
        assert struct.unpack("!5H", answer[2:12]) == (0x8400, 1, 1, 0, 0)
        assert answer[12 : len(query)] == query[12:]
        assert answer.endswith(socket.inet_pton(family, address))
        assert struct.unpack("!5H", ask(dns_query("intercepted.example", other))[2:12]) == (0x8400, 1, 0, 0, 0)
        assert struct.unpack("!5H", ask(dns_query("elsewhere.example", kind))[2:12]) == (0x8403, 1, 0, 0, 0)
        # Datagrams that are not queries are ignored, and the next query is answered.
        for nonsense in (b"", b"\0" * 5, query[:20], b"\xff" * 40):
            with pytest.raises(socket.timeout):
                lab.client.run(lambda nonsense=nonsense: silent(hosts.server, nonsense))  # type: ignore[misc]
        assert ask(query) == answer
        interceptor.stop(signal.SIGINT)
    assert lab.proxy.state() == before


def silent(host: str, words: bytes) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(limit(0.1))
        sock.connect((host, 53))
        sock.send(words)
        sock.recv(100)
