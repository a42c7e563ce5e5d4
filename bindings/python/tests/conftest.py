"""The tests run in a user and network namespace of their own: they need no privilege and touch nothing of the host."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
from net import V4, V6, Hosts, Lab, Net

_INSIDE = "TPROXY_TESTS_INSIDE"


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main() -> None:
    if _INSIDE not in os.environ:
        os.environ[_INSIDE] = "1"
        # The legacy iptables locks a file in /run, which only root of the host may open: here /run is the tests' own.
        new = ["unshare", "--map-root-user", "--net", "--mount"]
        own_run = ["sh", "-c", 'mount -t tmpfs tmpfs /run && exec "$@"', "sh"]
        os.execvp(new[0], [*new, *own_run, sys.executable, "-m", "pytest", *sys.argv[1:]])


@pytest.fixture
def net() -> Iterator[Net]:
    """A host by itself, with loopback alone."""
    with Net() as host:
        yield host


@pytest.fixture
def lab() -> Iterator[Lab]:
    """client --- proxy --- server."""
    with Lab() as hosts:
        yield hosts


@pytest.fixture(params=[V4, V6], ids=["IPv4", "IPv6"])
def hosts(request: pytest.FixtureRequest) -> Hosts:
    """One address of each host, of one family, then the other."""
    found = request.param
    assert isinstance(found, Hosts)
    return found
