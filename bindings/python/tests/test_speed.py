"""The fast paths are no slower than what a Python programmer would write without the package."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from net import Net


def load_bench() -> ModuleType:
    path = Path(__file__).parents[1] / "bench.py"
    spec = importlib.util.spec_from_file_location("bench", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.costly
def test_orig_dst_and_recvfrom(net: Net) -> None:
    bench = load_bench()
    net.ip("route add 192.0.2.0/24 dev lo", "route add 2001:db8::/64 dev lo")
    # Room for a machine that does other things at the same time; `make bench-python` tells exactly.
    slow = [cost for cost in net.run(lambda: bench.costs(300)) if cost.ratio > 1.15]
    assert not slow, slow
