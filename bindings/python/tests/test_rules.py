"""Rules: their configuration, their effect and their end."""

from __future__ import annotations

import errno
import gc
import ipaddress
import os
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from net import PATIENCE, V4, Hosts, Lab, Net, answer_one, limit

import tproxy
from tproxy import AddressSet, Backend, Family, Format, Protocol, RulesFlag


def test_rules_verify_and_list_rules(net: Net) -> None:
    """Missing routing is reported and repaired; the instances are listed with what they were asked for."""

    def use() -> None:
        with tproxy.listen("[::]:3129") as listener, tproxy.install_rules(name="a", listeners=[listener]) as rules:
            rules.verify()
            (listed,) = tproxy.list_rules()
            assert (listed.name, listed.backend, listed.owner_pid) == ("a", Backend.NFT, os.getpid())
            assert (listed.flags, listed.families, listed.protocols) == (
                RulesFlag(0),
                Family.IPV4 | Family.IPV6,
                Protocol.TCP,
            )
            assert listed.listen_addr is not None
            assert listed.listen_addr[:2] == ("::", 3129)
            net.ip(f"rule del pref {listed.priority}")
            with pytest.raises(tproxy.Error) as caught:
                rules.verify()
            assert caught.value.errno == errno.ESTALE
            rules.verify(repair=True)
            rules.verify()
        assert tproxy.list_rules() == []

    net.run(use)


@contextmanager
def proxy(lab: Lab, **config: object) -> Iterator[tuple[tproxy.Rules, socket.socket]]:
    """Rules, and a listener on the proxy's host that answers every intercepted connection."""
    listener = lab.proxy.run(lambda: tproxy.listen("[::]:3129"))
    listener.settimeout(0.2)
    enough = threading.Event()

    def serve() -> None:
        while not enough.is_set():
            try:
                stream, _ = listener.accept()
            except socket.timeout:
                continue
            with stream:
                stream.settimeout(PATIENCE)
                stream.recv(100)
                stream.sendall(b"intercepted")

    serving = lab.proxy.start(serve)
    try:
        with lab.proxy.run(lambda: tproxy.install_rules(listeners=[listener], **config)) as rules:  # type: ignore[arg-type]
            yield rules, listener
    finally:
        enough.set()
        serving.result()
        listener.close()


def answer(lab: Lab, host: str, port: int) -> str:
    """The host that answers: the proxy or the server."""
    with lab.server.run(lambda: socket.create_server((host, port), family=family_of(host))) as server:
        server.settimeout(PATIENCE)
        serving = lab.server.start(lambda: answer_one(server))
        heard = lab.ask(host, port).answer
        if heard.startswith("seen"):
            serving.result()
            return "server"
        # The server still waits for a connection.
        lab.server.run(lambda: socket.create_connection((host, port), PATIENCE).close())
        serving.join()
        return heard.replace("intercepted", "proxy")


def family_of(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def test_install_rules_selects_ports_destinations_and_sources(lab: Lab, hosts: Hosts) -> None:
    """Ports and prefixes in every form that Python has for them."""
    net = ipaddress.ip_network(hosts.server + ("/120" if ":" in hosts.server else "/24"), strict=False)
    chosen = {
        "ports": [80, (8000, 8010), range(9000, 9002)],
        "dst": [net],
        "src": [hosts.client, ipaddress.ip_network("192.0.2.0/24")],
        "bypass": [str(ipaddress.ip_address(hosts.server) + 7)],
        "interfaces": ["eth0", "eth7"],
    }
    with proxy(lab, **chosen) as (rules, _):
        said = {port: answer(lab, hosts.server, port) for port in (80, 81, 8000, 8010, 8011, 9001, 9002)}
        assert [port for port, who in said.items() if who == "proxy"] == [80, 8000, 8010, 9001]
        stats = rules.stats()
        assert stats.intercepted_packets > 0
        assert stats.intercepted_bytes >= 20 * stats.intercepted_packets
        assert stats.dropped_packets == stats.direct_packets == 0


def test_install_rules_exempts_and_refuses(lab: Lab, hosts: Hosts) -> None:
    """Ports of one protocol, what is exempt, and what is refused."""
    host, client = hosts.server, hosts.client
    link = lab.client.run(lambda: subprocess.run(["ip", "-o", "link", "show", "eth0"], capture_output=True, text=True))
    mac = link.stdout.split("link/ether ")[1].split()[0]
    other = bytes([2, 0, 0, 0, 0, 9])
    for chosen, expected in (
        ({"ports": [(Protocol.TCP, 80), (Protocol.UDP, (81, 89))]}, {80: "proxy", 81: "server"}),
        ({"bypass_ports": [80, (Protocol.UDP, 81)]}, {80: "server", 81: "proxy"}),
        ({"bypass_src": [client]}, {80: "server"}),
        ({"bypass_interfaces": ["eth*"]}, {80: "server"}),
        ({"macs": [mac, other]}, {80: "proxy"}),
        ({"macs": [other]}, {80: "server"}),
        ({"bypass_macs": [mac]}, {80: "server"}),
    ):
        with proxy(lab, **chosen):
            assert {port: answer(lab, host, port) for port in expected} == expected
    with proxy(lab, reject_ports=[80]), pytest.raises(ConnectionRefusedError):
        lab.client.run(lambda: socket.create_connection((host, 80), PATIENCE))


def test_install_rules_selects_owners_of_this_host(lab: Lab, hosts: Hosts) -> None:
    """Users, groups and marks of the traffic that this host sends."""

    def own() -> str:
        listener = lab.server.run(lambda: socket.create_server((hosts.server, 80), family=family_of(hosts.server)))
        with listener:
            listener.settimeout(1)
            with lab.proxy.run(lambda: socket.create_connection((hosts.server, 80), PATIENCE)):
                try:
                    listener.accept()[0].close()
                    return "server"
                except socket.timeout:
                    return "proxy"

    for chosen, expected in (
        ({"uids": [0, (5, 9)]}, "proxy"),
        ({"uids": [range(1, 5)]}, "server"),
        ({"bypass_gids": [0]}, "server"),
        ({"gids": [], "uids": [0]}, "server"),
    ):
        with proxy(lab, flags=RulesFlag.LOCAL_OUTPUT, **chosen):
            assert own() == expected


def test_update_rules_adds_and_removes_prefixes(lab: Lab, hosts: Hosts) -> None:
    """The sets of rules that are installed."""
    host = ipaddress.ip_address(hosts.server)
    with proxy(lab, ports=[80], dst=["192.0.2.0/24", "2001:db8:f::/48"]) as (rules, _):
        assert answer(lab, hosts.server, 80) == "server"
        rules.update(AddressSet.DST, add=[host])
        assert answer(lab, hosts.server, 80) == "proxy"
        rules.update(AddressSet.BYPASS, add=[hosts.server])
        assert answer(lab, hosts.server, 80) == "server"
        rules.update(AddressSet.BYPASS, remove=[host])
        rules.update(AddressSet.DST, add=["192.0.2.0/30"], remove=[host])
        assert answer(lab, hosts.server, 80) == "server"
        with pytest.raises(FileNotFoundError):
            rules.update(AddressSet.DST, remove=["10.9.8.0/24"])
        with pytest.raises(tproxy.Error) as refused:
            rules.update(7)
        assert refused.value.errno == errno.EINVAL


def test_learn_addresses_leave_after_their_time(lab: Lab, hosts: Hosts) -> None:
    """Learned addresses add to the prefixes of the configuration, and replace keeps them."""
    host = ipaddress.ip_address(hosts.server)

    def eventually(who: str) -> bool:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            # The listener resets a connection whose bypass ends while it is open.
            with suppress(ConnectionResetError):
                if answer(lab, hosts.server, 80) == who:
                    return True
        return False

    with proxy(lab, ports=[80], dst=[]) as (rules, listener):
        assert answer(lab, hosts.server, 80) == "server"
        rules.learn(AddressSet.DST, [host], 100_000)
        assert answer(lab, hosts.server, 80) == "proxy"
        rules.replace(listeners=[listener], ports=[80, 81], dst=[])
        assert answer(lab, hosts.server, 80) == "proxy"
        rules.learn(AddressSet.BYPASS, [hosts.server], 1)
        assert eventually("proxy")
        rules.learn(AddressSet.DST, [hosts.server], 1)
        assert eventually("server")
        for which, addresses, ttl in (
            (AddressSet.SRC, [host], 1),
            (AddressSet.DST, ["192.0.2.0/24"], 1),
            (AddressSet.DST, [host], 0),
            (7, [host], 1),
        ):
            with pytest.raises(tproxy.Error) as refused:
                rules.learn(which, addresses, ttl)
            assert refused.value.errno == errno.EINVAL
        with pytest.raises(ValueError, match="ttl"):
            rules.learn(AddressSet.DST, [host], -1)


def test_install_rules_with_empty_list_intercepts_nothing(lab: Lab, hosts: Hosts) -> None:
    """None is the same as no list; prefixes can be added to an empty one."""
    unrestricted = {"ports": None, "dst": None, "src": None, "bypass": None, "interfaces": None}
    with proxy(lab, **unrestricted):
        assert answer(lab, hosts.server, 80) == "proxy"
    for name in ("ports", "dst", "src", "interfaces"):
        with proxy(lab, **{name: []}):
            assert answer(lab, hosts.server, 80) == "server"
    for which, name, prefix in ((AddressSet.DST, "dst", hosts.server), (AddressSet.SRC, "src", hosts.client)):
        with proxy(lab, bypass=[], **{name: ()}) as (rules, _):
            rules.update(which, add=[prefix])
            assert answer(lab, hosts.server, 80) == "proxy"
            rules.update(which, remove=[prefix])
            assert answer(lab, hosts.server, 80) == "server"


def test_replace_rules_changes_ports(lab: Lab, hosts: Hosts) -> None:
    with proxy(lab, ports=[81]) as (rules, listener):
        assert answer(lab, hosts.server, 80) == "server"
        lab.proxy.run(lambda: rules.replace(listeners=[listener], ports=[80]))
        assert answer(lab, hosts.server, 80) == "proxy"
        assert answer(lab, hosts.server, 81) == "server"
        with pytest.raises(tproxy.Error):
            lab.proxy.run(lambda: rules.replace(listeners=[listener], name="another"))
        assert answer(lab, hosts.server, 80) == "proxy"


def test_rules_stats_count_dropped_and_direct_packets(lab: Lab) -> None:
    """No listener, no traffic; and straight to the listener is dropped."""
    listener = lab.proxy.run(lambda: tproxy.listen("[::]:3129"))
    with lab.proxy.run(lambda: tproxy.install_rules(listeners=[listener], ports=[80])) as rules:
        with pytest.raises(OSError, match="timed out"):
            lab.client.run(lambda: socket.create_connection((V4.proxy, 3129), limit(0.3)))
        assert rules.stats().direct_packets >= 1
        listener.close()
        with pytest.raises(OSError, match="timed out"):
            lab.client.run(lambda: socket.create_connection((V4.server, 80), limit(0.3)))
        assert rules.stats().dropped_packets >= 1


def test_read_stats_by_name_reads_rules_of_any_process(lab: Lab) -> None:
    """Another process can read the counters. A name without rules is FileNotFoundError."""
    with proxy(lab, ports=[80], name="mine") as (rules, _):
        before = lab.proxy.run(lambda: tproxy.read_stats("mine"))
        assert before.intercepted_packets == 0
        assert answer(lab, V4.server, 80) == "proxy"
        seen = lab.proxy.run(lambda: tproxy.read_stats("mine"))
        assert isinstance(seen, tproxy.RulesStats)
        assert seen.intercepted_packets > 0
        command = "import tproxy; print(tproxy.read_stats('mine').intercepted_packets > 0)"
        assert lab.proxy.command(sys.executable, "-c", command) == "True\n"
        assert rules.stats().intercepted_packets >= seen.intercepted_packets
        with pytest.raises(FileNotFoundError, match="no rules of this name") as absent:
            lab.proxy.run(tproxy.read_stats)
        assert isinstance(absent.value, tproxy.Error)
        with pytest.raises(tproxy.Error) as refused:
            lab.proxy.run(lambda: tproxy.read_stats("no such/name"))
        assert refused.value.errno == errno.EINVAL
        with pytest.raises(ValueError, match="NUL"):
            tproxy.read_stats("a\0b")
    with lab.proxy.run(lambda: tproxy.install_rules(flags=RulesFlag.DIVERT_ONLY)):
        assert lab.proxy.run(tproxy.read_stats) == (0,) * 8
    with pytest.raises(FileNotFoundError):
        lab.proxy.run(lambda: tproxy.read_stats("mine"))


def test_rules_end_with_the_block(net: Net) -> None:
    before = net.state()
    with net.run(lambda: tproxy.listen("[::]:3129")) as listener:
        with net.run(lambda: tproxy.install_rules(listeners=[listener.fileno()], ports=[80])) as rules:
            assert net.state() != before
            with pytest.raises(tproxy.Error) as taken:
                net.run(lambda: tproxy.install_rules(listeners=[listener], ports=[81]))
            assert taken.value.errno == errno.EBUSY
            with net.run(lambda: tproxy.install_rules(name="two", listeners=[listener], ports=[81])):
                pass
        assert net.state() == before
        rules.remove()
        for call in (
            rules.stats,
            lambda: rules.update(AddressSet.DST),
            lambda: rules.learn(AddressSet.DST, [], 1),
            lambda: rules.replace(listeners=[listener]),
        ):
            with pytest.raises(ValueError, match="removed"):
                call()


def test_rules_not_removed_warn_and_are_removed(net: Net) -> None:
    """A ResourceWarning is issued, and the rules are removed."""
    before = net.state()

    def install_and_forget() -> None:
        tproxy.install_rules(flags=RulesFlag.DIVERT_ONLY)

    with pytest.warns(ResourceWarning, match="nobody removed"):
        net.run(install_and_forget)
        gc.collect()
    assert net.state() == before


def test_rules_in_forked_child_are_left_alone(net: Net) -> None:
    with net.run(lambda: tproxy.install_rules(flags=RulesFlag.DIVERT_ONLY)) as rules:
        there = net.state()
        with warnings.catch_warnings():
            # fork() warns that this process has threads.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            try:
                with rules:
                    pass
                rules.__del__()
            finally:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert net.state() == there


def test_install_rules_persist_stay_until_purged(net: Net) -> None:
    """The rules outlive their handle until they are purged."""
    before = net.state()
    with net.run(lambda: tproxy.listen("[::]:3129")) as listener:

        def install_and_end() -> None:
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    tproxy.install_rules(listeners=[listener], ports=[80], flags=RulesFlag.PERSIST, name="kept")
                    gc.collect()
                    status = 0
                finally:
                    os._exit(status)
            assert os.waitpid(child, 0)[1] == 0

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            net.run(install_and_end)
        assert net.state() != before
        # The kernel releases the table of a dead process some time later.
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                net.run(lambda: tproxy.purge_rules("kept"))
                break
            except tproxy.Error as error:
                assert error.errno == errno.EBUSY
                assert time.monotonic() < deadline
                time.sleep(0.02)
        net.run(tproxy.purge_rules)
        assert net.state() == before


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"ports": [0]}, ValueError),
        ({"ports": [(90, 80)]}, ValueError),
        ({"ports": [65536]}, ValueError),
        ({"ports": [range(1, 10, 2)]}, ValueError),
        ({"ports": [range(5, 5)]}, ValueError),
        ({"ports": [(1, 2, 3)]}, ValueError),
        ({"dst": ["10.0.0.0/33"]}, ValueError),
        ({"dst": "10.0.0.0/8"}, TypeError),
        ({"dst": ["example.org"]}, ValueError),
        ({"interfaces": "eth0"}, TypeError),
        ({"macs": ["02:00:00:00:00"]}, ValueError),
        ({"macs": ["0200.0000.0001"]}, ValueError),
        ({"macs": "02:00:00:00:00:01"}, TypeError),
        ({"bypass_macs": [b"12345"]}, ValueError),
        ({"uids": [-1]}, ValueError),
        ({"gids": [(2, 1)]}, ValueError),
        ({"bypass_uids": [0xFFFFFFFF]}, ValueError),
        ({"reject_ports": [(Protocol.UDP, 0)]}, ValueError),
        ({"cgroups": "user.slice"}, TypeError),
        ({"bypass_mark": 1 << 32}, ValueError),
        ({"interfaces": ["eth\0"]}, ValueError),
        ({"name": "a\0b"}, ValueError),
        ({"mark": 1 << 32}, ValueError),
        ({"flags": -1}, ValueError),
        ({"port": [80]}, TypeError),
        ({"listen_addr": "nowhere"}, ValueError),
    ],
)
def test_install_rules_with_bad_config_raises(net: Net, config: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        net.run(lambda: tproxy.install_rules(**config))  # type: ignore[arg-type]


def test_install_rules_and_purge_rules_refused_raise_error_of_errno(net: Net) -> None:
    with pytest.raises(tproxy.Error, match="no listeners") as refused:
        net.run(lambda: tproxy.install_rules(ports=[80]))
    assert refused.value.errno == errno.EINVAL
    with net.run(lambda: socket.create_server(("127.0.0.1", 0))) as ordinary:
        with pytest.raises(tproxy.Error, match="transparent") as refused:
            net.run(lambda: tproxy.install_rules(listeners=[ordinary]))
        assert refused.value.errno == errno.EINVAL
    with pytest.raises(tproxy.Error) as refused:
        net.run(lambda: tproxy.install_rules(flags=1 << 31))
    assert refused.value.errno == errno.EINVAL
    with pytest.raises(tproxy.Error) as refused:
        net.run(lambda: tproxy.purge_rules("no such/name"))
    assert refused.value.errno == errno.EINVAL


def test_install_rules_with_listen_addr_and_numbers_passes_them(net: Net) -> None:
    """The numbers arrive in the fields of the struct."""
    with net.run(
        lambda: tproxy.install_rules(
            listen_addr=("::1", 3129),
            protocols=Protocol.TCP | Protocol.UDP,
            families=Family.IPV6,
            backend=Backend.NFT,
            mark=0x40,
            mark_mask=0xC0,
            table=4711,
            priority=1234,
            ports=[53],
        )
    ):
        rules = net.command("ip", "-6", "rule")
        assert "1234:" in rules
        assert "0x40/0xc0" in rules
        assert "4711" in rules
        assert "0x40/0xc0" not in net.command("ip", "-4", "rule")


def test_install_rules_with_iptables_makes_chains(net: Net) -> None:
    """The programs of iptables run in the namespace of the calling thread."""

    def inside() -> None:
        with tproxy.listen("[::]:3129") as listener:
            with tproxy.install_rules(listeners=[listener], ports=[80], backend=Backend.IPTABLES) as rules:
                assert "TPROXY" in net.command("iptables-save")
                assert rules.stats().intercepted_packets == 0

    net.run(inside)
    assert "TPROXY" not in net.command("iptables-save")


def test_render_rules_gives_script() -> None:
    """A script of either format has the ports, prefixes and names. It needs no privilege."""
    config = tproxy.RulesConfig(
        listen_addr="[::]:3129", ports=[80, (8000, 8100)], dst=["10.0.0.0/8"], interfaces=["eth3"]
    )
    nft = tproxy.render_rules(**config)
    assert nft.startswith("#!/bin/sh")
    for words in ("nft", "ip ", "80", "8000-8100", "10.0.0.0", "eth3", "3129"):
        assert words in nft
    iptables = tproxy.render_rules(Format.IPTABLES, **config)
    assert "iptables-restore" in iptables
    assert "3129" in iptables
    with pytest.raises(tproxy.Error) as refused:
        tproxy.render_rules(9, **config)
    assert refused.value.errno == errno.EINVAL


def test_render_rules_script_intercepts(lab: Lab, hosts: Hosts) -> None:
    listener = lab.proxy.run(lambda: tproxy.listen("[::]:3129"))
    script = tproxy.render_rules(listeners=[listener], ports=[80])
    lab.proxy.command("sh", "-e", "-s", text=script)
    with listener:
        connecting = lab.client.start(lambda: socket.create_connection((hosts.server, 80), PATIENCE).close())
        listener.settimeout(PATIENCE)
        with listener.accept()[0] as stream:
            assert tproxy.orig_dst(stream)[1] == 80
        connecting.result()


def test_rules_removed_while_other_threads_ask_raise(net: Net) -> None:
    """No thread crashes; a call after the removal raises ValueError."""
    for _ in range(5):
        rules = net.run(lambda: tproxy.install_rules(flags=RulesFlag.DIVERT_ONLY))
        at_work = threading.Barrier(4)

        def ask(rules: tproxy.Rules = rules, at_work: threading.Barrier = at_work) -> None:
            rules.stats()
            at_work.wait(PATIENCE)
            with pytest.raises(ValueError, match="removed"):
                while True:
                    rules.stats()

        asking = [net.start(ask) for _ in range(3)]
        at_work.wait(PATIENCE)
        time.sleep(0.02)
        rules.remove()
        for thread in asking:
            thread.result()
