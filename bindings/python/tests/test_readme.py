"""Every example of the README runs on the proxy's host, with traffic."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from net import PATIENCE, V4, V6, Lab, Running, drop_capabilities, plain, udp_client

import tproxy
from tproxy import install_rules

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def answer(data: bytes | memoryview) -> bytes:
    """The reply of the examples."""
    return bytes(data).upper()


class Example:
    """The block with these words, the names that it expects, and the names that it defines."""

    def __init__(self, words: str, **given: Any) -> None:
        (self.text,) = (block for block in BLOCKS if words in block)
        self.names: dict[str, Any] = {"tproxy": tproxy, "contextlib": contextlib, "answer": answer, **given}
        self.installed = threading.Event()
        self.stopped = threading.Event()

    def install_rules(self, **config: Any) -> tproxy.Rules:
        """A replacement for the package's function, which tells the test that the rules are installed."""
        rules = install_rules(**config)
        self.installed.set()
        return rules

    def run(self) -> None:
        """Runs the block to its end; a block of asyncio is cancelled when the test stops it."""
        code = compile(self.text, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        result = eval(code, self.names)
        if inspect.iscoroutine(result):
            asyncio.run(self._until_stopped(result))

    async def _until_stopped(self, coroutine: Any) -> None:
        task = asyncio.ensure_future(coroutine)
        while not (task.done() or self.stopped.is_set()):
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@contextlib.contextmanager
def running(lab: Lab, example: Example) -> Iterator[Running]:
    """Runs the example, with its rules installed during the block and removed at its end."""
    before = lab.proxy.state()
    with mock.patch.object(tproxy, "install_rules", example.install_rules):
        thread = lab.proxy.start(example.run)
        assert example.installed.wait(PATIENCE)
        yield thread
    assert lab.proxy.state() == before


def whom_the_server_sees(lab: Lab, port: int) -> str:
    """The address that the server sees when the client connects and is intercepted."""
    with lab.server.run(lambda: socket.create_server(("::", port), family=socket.AF_INET6)) as listener:
        listener.settimeout(PATIENCE)
        with lab.client.run(lambda: socket.create_connection((V6.server, port), PATIENCE)):
            stream, peer = listener.accept()
            stream.close()
            assert lab.proxy.run(tproxy.read_stats).intercepted_packets > 0
            return plain(peer)[0]


def test_readme_blocks_are_all_tested() -> None:
    words = re.findall(r'Example\("(.*?)"', Path(__file__).read_text())
    assert [sum(word in block for word in words) for block in BLOCKS] == [1] * len(BLOCKS)


def test_readme_proxy_intercepts(lab: Lab) -> None:
    example = Example("tproxy.accept(listener)")
    with running(lab, example) as thread:
        assert whom_the_server_sees(lab, 8050) == V6.client
        # Only a failing accept() ends the example.
        example.names["listener"].shutdown(socket.SHUT_RDWR)
        with pytest.raises(OSError, match="Invalid argument"):
            thread.result()
    assert plain(example.names["destination"]) == (V6.server, 8050)
    for name in ("listener", "client", "server"):
        example.names[name].close()


def test_readme_rules_print_and_leave_nothing(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    with lab.proxy.run(lambda: tproxy.listen("[::]:3053")) as tcp:
        with lab.proxy.run(lambda: tproxy.socket(socket.AF_INET6, socket.SOCK_DGRAM)) as udp:
            udp.bind(("::", 3053))
            before = lab.proxy.state()
            lab.proxy.run(Example("rules.replace", tcp=tcp, udp=udp).run)
            assert lab.proxy.state() == before
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["0", "#!/bin/sh"]
    assert [line.split(" from ")[0] for line in said if line.startswith("OK")] == [
        "OK IPv4 connection",
        "OK IPv6 connection",
    ]


def test_readme_datagrams_reply(lab: Lab) -> None:
    with lab.proxy.run(lambda: tproxy.socket(socket.AF_INET6, socket.SOCK_DGRAM)) as sock:
        sock.bind(("::", 3053))
        sock.settimeout(PATIENCE)
        with lab.proxy.run(lambda: tproxy.install_rules(listeners=[sock], ports=[53])):
            example = lab.proxy.start(Example("tproxy.Batch", sock=sock).run)
            for host in (V4.server, V6.server):
                assert lab.client.run(lambda host=host: udp_client(host, 53)) == [b"QUERY"]  # type: ignore[misc]
            example.result()


def test_readme_asyncio_streams_proxy(lab: Lab) -> None:
    example = Example("start_server")
    with running(lab, example) as thread:
        assert whom_the_server_sees(lab, 80) == V6.client
        example.stopped.set()
        thread.result()


def test_readme_asyncio_datagrams_reply(lab: Lab) -> None:
    example = Example("open_datagram_endpoint")
    with running(lab, example) as thread:
        for host in (V4.server, V6.server):
            assert lab.client.run(lambda host=host: udp_client(host, 53, count=3)) == [b"QUERY"] * 3  # type: ignore[misc]
        example.stopped.set()
        thread.result()


def test_readme_errors_print_message(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    example = Example("except PermissionError")

    def powerless() -> None:
        drop_capabilities()
        example.run()

    lab.proxy.run(powerless)
    said = capsys.readouterr().out
    start, _, end = example.text.partition("# ")[2].partition(" ... ")
    assert said.startswith(start)
    assert said.endswith(end)
