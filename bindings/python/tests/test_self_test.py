"""tproxy.self_test(): probes through rules in a temporary network namespace."""

from __future__ import annotations

import errno
import os
import time
from typing import Any

import pytest
from net import V4, Net

import tproxy
from tproxy import Family, Protocol, RulesFlag, Severity

BOTH = Protocol.TCP | Protocol.UDP


def state(net: Net) -> list[str]:
    return [*net.state(), net.command("ip", "-o", "link"), net.command("ip", "-o", "addr", "show", "dev", "lo")]


def test_self_test_of_working_config_is_delivered(net: Net) -> None:
    """A connection and a datagram for each family; the caller's network is unchanged."""
    before, descriptors = state(net), len(os.listdir("/proc/self/fd"))
    findings = net.run(lambda: tproxy.self_test(listen_addr="[::]:3129", ports=[80, (8000, 8100)], protocols=BOTH))
    assert {finding.severity for finding in findings} == {Severity.OK}
    assert [finding.id for finding in findings] == ["self_test.connection", "self_test.datagram"] * 2
    assert [finding.message.split(" from ")[0] for finding in findings] == [
        "IPv4 connection",
        "IPv4 datagram",
        "IPv6 connection",
        "IPv6 datagram",
    ]
    assert all(":80: delivered, and the reply was received" in finding.message for finding in findings)
    assert state(net) == before
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_self_test_reports_what_it_skips(net: Net) -> None:
    """The keywords are those of install_rules, descriptors of listeners too."""
    with net.run(lambda: tproxy.listen("0.0.0.0:3129")) as listener:
        for config in ({"listeners": [listener]}, {"listen_addr": "[::]:3129", "families": Family.IPV4}):
            findings = net.run(lambda config=config: tproxy.self_test(dst=["192.0.2.128/25"], **config))  # type: ignore[misc]
            assert findings[0].message.startswith("IPv4 connection from ")
            assert "to 192.0.2.13" in findings[0].message
            assert [finding.severity for finding in findings] == [Severity.OK, Severity.NOTE, Severity.NOTE]
            assert {finding.id for finding in findings[1:]} == {"self_test.skipped"}


def test_self_test_of_lost_probe_releases_the_gil(net: Net) -> None:
    """Packets that are translated to loopback are martians. Other threads run while the call waits."""
    config = tproxy.RulesConfig(
        listen_addr="127.0.0.1:3129", flags=RulesFlag.REDIRECT | RulesFlag.LOCAL_OUTPUT, protocols=Protocol.TCP
    )
    testing = net.start(lambda: tproxy.self_test(**config))
    turns = 0
    while testing.is_alive():
        turns += 1
        time.sleep(0.001)
    # With the GIL held this thread would have had one turn or two.
    assert turns > 5
    lost = testing.result()[0]
    assert lost.severity == Severity.FAILURE
    assert "lost; last seen at hook prerouting" in lost.message
    assert lost.impact


@pytest.mark.parametrize(
    ("config", "error", "number"),
    [
        ({"ports": [80]}, tproxy.Error, errno.EINVAL),
        ({"listen_addr": V4.proxy + ":1", "flags": 1 << 30}, tproxy.Error, errno.EINVAL),
        ({"listeners": [1 << 20]}, tproxy.Error, errno.EBADF),
        ({"ports": [0]}, ValueError, None),
        ({"port": [80]}, TypeError, None),
    ],
)
def test_self_test_with_bad_config_raises(
    net: Net, config: dict[str, Any], error: type[Exception], number: int | None
) -> None:
    with pytest.raises(error) as refused:
        net.run(lambda: tproxy.self_test(**config))
    assert getattr(refused.value, "errno", None) == number
