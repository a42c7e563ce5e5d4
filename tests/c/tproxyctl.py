"""Checks the output and exit status of every command of tproxyctl, as text and as JSON, in a network namespace (run.sh)."""
import atexit
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys

from hosts import limit

stage = sys.argv[1]
PROGRAM = stage + "/bin/tproxyctl"
RULES = ["--listen", "[::]:3129", "--port", "80,8000-8010"]
IP_TRANSPARENT = 19


def run(*args, status=0, env=None):
    done = subprocess.run([PROGRAM, *args], capture_output=True, text=True, timeout=limit(20), env=env)
    assert done.returncode == status, (args, done)
    return done


def out(*args, **more):
    return run(*args, **more).stdout


def tables():
    return subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout


def start(*args):
    """Starts `install` and waits for its first line."""
    child = subprocess.Popen([PROGRAM, "install", *RULES, *args], stdout=subprocess.PIPE, text=True)
    # A failed test must not leave the process behind.
    atexit.register(child.kill)
    return child, child.stdout.readline()


def end(child, number):
    child.send_signal(number)
    rest = child.stdout.read()
    assert child.wait(limit(20)) == 0, number
    return rest


def usage():
    text = out("--help")
    for command in ("check", "self-test", "install", "render", "purge", "stats"):
        assert re.search(rf"^  {command}\b", text, re.M), command
    assert re.fullmatch(r"tproxyctl \d+\.\d+\.\d+\n", out("--version"))
    for args in ([], ["nonsense"], ["--nonsense"], ["check", "more"], ["purge", "a", "b"], ["install", "--port", "0x"],
                 ["install", "--port", "70000"], ["install", "--port", ","], ["install", "--dst", "192.0.2.0/33"],
                 ["install", "--listen", "x:1"], ["render", "--format", "c"], ["stats", "--watch=0"]):
        done = run(*args, status=2)
        assert done.stdout == "" and "tproxyctl" in done.stderr, (args, done)


def check():
    assert re.search(r"^0 failures, 0 warnings$", out("check"), re.M)
    everything = json.loads(out("--json", "check", "--all"))
    some = json.loads(out("check", "--json"))
    assert all(set(one) == {"severity", "id", "message", "impact", "fix"} for one in everything)
    assert {one["severity"] for one in everything} == {"ok", "note"}
    assert [one for one in everything if one["severity"] != "ok"] == some
    subprocess.run(["ip", "rule", "del", "pref", "32766"], check=True)
    text = out("check", status=1)
    assert "failure  rule.main_missing: IPv4: no routing rule selects the table main\n" in text, text
    assert "         fix: ip -4 rule add pref 32766 lookup main\n" in text and "1 failure, 0 warnings\n" in text
    found = [one for one in json.loads(out("--json", "check", status=1)) if one["severity"] == "failure"]
    assert [one["id"] for one in found] == ["rule.main_missing"]
    subprocess.run(found[0]["fix"], shell=True, check=True)
    assert "0 failures" in out("check")


def colors():
    assert "\033[" not in out("check") and "\033[36mnote" in out("check", "--color=always")

    def on_terminal(*args, **env):
        master, slave = pty.openpty()
        done = subprocess.run([PROGRAM, *args], stdout=slave, env={**os.environ, **env}, check=True, timeout=limit(20))
        os.close(slave)
        text = os.read(master, 65536).decode()
        os.close(master)
        assert done.returncode == 0
        return text

    assert "\033[36mnote" in on_terminal("check")
    assert "\033[" not in on_terminal("check", NO_COLOR="1")
    assert "\033[" not in on_terminal("check", "--color=never")
    assert "\033[" not in on_terminal("check", "--json")


def install():
    listener = socket.socket(socket.AF_INET6)
    listener.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
    listener.bind(("::", 3129))
    listener.listen()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        child, said = start()
        assert said == "tproxy: installed until a signal\n" and "libtproxy-tproxy" in tables()
        assert "elements = { 80, 8000-8010 }" in subprocess.run(
            ["nft", "list", "set", "inet", "libtproxy-tproxy", "ports"], capture_output=True, text=True, check=True).stdout
        assert end(child, number) == "tproxy: removed\n" and tables() == ""
    child, said = start("--json", "--name", "other")
    assert json.loads(said) == {"name": "other", "state": "installed"} and "libtproxy-other" in tables()
    ok = [one for one in json.loads(out("--json", "--all", "check")) if one["id"] == "instance"]
    assert ok[0]["message"].startswith(f"other: by nf_tables, of process {child.pid}, "), ok
    taken = run("install", *RULES, "--name", "other", status=3)
    assert str(child.pid) in taken.stderr and taken.stdout == ""
    error = json.loads(out("--json", "install", *RULES, "--name", "other", status=3))
    assert error["errno"] == 16 and str(child.pid) in error["message"]
    assert str(child.pid) in run("purge", "other", status=3).stderr
    child.kill()
    child.wait()
    assert tables() == ""
    # Without a listener, check reports a failure.
    listener.close()
    child, _ = start()
    found = [one["id"] for one in json.loads(out("--json", "check", status=1)) if one["severity"] == "failure"]
    assert found == ["listener.gone", "listener.gone"] or found == ["listener.gone"], found
    end(child, signal.SIGTERM)


def persist():
    child, said = start("--persist")
    assert "the rules remain" in said
    assert "tproxyctl purge" in end(child, signal.SIGTERM) and "libtproxy-tproxy" in tables()
    assert out("purge", "--json") == '{"state": "purged"}\n' and tables() == ""
    assert out("purge", "never") == ""


def stats():
    assert "there are no rules of this name" in run("stats", status=3).stderr
    child, _ = start("--local-output")
    # No listener exists: the packet is dropped.
    probe = socket.socket()
    probe.setblocking(False)
    subprocess.run(["ip", "route", "add", "default", "dev", "lo"], check=True)
    probe.connect_ex(("203.0.113.1", 80))
    # A closed socket does not retransmit its first packet.
    probe.close()
    counted = json.loads(out("stats", "--json"))
    assert list(counted) == ["intercepted", "diverted", "dropped", "direct"]
    assert counted["dropped"]["packets"] == 1 and counted["dropped"]["bytes"] == 60, counted
    assert re.search(r"^dropped +1 packets +60 bytes$", out("stats", "tproxy"), re.M)
    watch = subprocess.Popen([PROGRAM, "stats", "--watch", "--json"], stdout=subprocess.PIPE, text=True)
    for _ in range(2):
        assert json.loads(watch.stdout.readline())["dropped"]["packets"] >= 1
    assert end(watch, signal.SIGINT) == ""
    end(child, signal.SIGTERM)


def render():
    script = out("render", *RULES)
    assert script.startswith("#!/bin/sh\n") and "tproxy to :3129" in script
    assert json.loads(out("--json", "render", *RULES))["script"] == script
    other = out("render", *RULES, "--format", "iptables", "--dst", "192.0.2.0/24", "--mark", "0x4/0x4", "--table", "99")
    for words in ("iptables-restore", "-d 192.0.2.0/24", "--on-port 3129", "0x4/0x4", "table 99"):
        assert words in other, (words, other)
    assert "no listeners" in run("render", status=3).stderr
    for args, words in ((["--udp"], "meta l4proto udp"), (["-4"], "meta nfproto ipv4"), (["--notrack"], "notrack"),
                        (["--redirect"], "redirect to :3129"), (["--interface", "eth7"], '"eth7"'),
                        (["--src", "2001:db8::/32"], "2001:db8::"), (["--bypass", "192.0.2.9"], "192.0.2.9"),
                        (["--local-output"], "output"), (["--priority", "300"], "pref 300")):
        assert words in out("render", *RULES, *args), args


def self_test():
    text = out("self-test", *RULES, "--udp", "--tcp", "--all")
    lines = re.findall(r"^ok +self_test\.(\w+): (IPv[46]) .*: delivered, and the reply was received$", text, re.M)
    assert lines == [("connection", "IPv4"), ("datagram", "IPv4"), ("connection", "IPv6"), ("datagram", "IPv6")], text
    assert out("self-test", *RULES, "--tcp", "--udp") == "0 failures, 0 warnings\n" and tables() == ""
    lost = ["--json", "self-test", "--listen", "127.0.0.1:3129", "--redirect", "--local-output"]
    found = [one for one in json.loads(out(*lost, status=1)) if one["severity"] == "failure"]
    assert [one["id"] for one in found] == ["self_test.connection"] and "last seen at hook prerouting" in found[0]["message"]
    assert json.loads(out("--json", "self-test", status=3))["errno"] == 22
    bare = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-all", "--", PROGRAM, "self-test", *RULES]
    done = subprocess.run(bare, capture_output=True, text=True)
    assert done.returncode == 3 and "CAP_SYS_ADMIN" in done.stderr, done


def zsh_completed(lines):
    """Completes command lines by Tab in zsh; Ctrl-X shows the completed line."""
    child, terminal = pty.fork()
    if child == 0:
        os.execvpe("zsh", ["zsh", "-f", "-i"], {**os.environ, "TERM": "xterm"})

    def heard(mark):
        text = ""
        while mark not in text:
            assert select.select([terminal], [], [], limit(20))[0], (mark, text)
            text += os.read(terminal, 65536).decode()
        return text

    # The terminal echoes the input: the marks are split in it.
    setup = (f"fpath=({stage}/share/zsh/site-functions $fpath); autoload -Uz compinit; compinit -u -D; unsetopt beep;"
             " show() { print -r -- \"<<<\"$BUFFER\">>>\"; BUFFER= }; zle -N show; bindkey '^X' show; print REA''DY\n")
    os.write(terminal, setup.encode())
    heard("READY")
    found = []
    for line in lines:
        os.write(terminal, f"tproxyctl {line}\t\x18".encode())
        found.append(re.search(r"<<<tproxyctl (.*?)>>>", heard(">>>"))[1])
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(terminal)
    return found


def completion():
    script = (f"source {stage}/share/bash-completion/completions/tproxyctl; COMP_WORDS=(tproxyctl \"$@\");"
              " COMP_CWORD=$#; _tproxyctl; echo ${COMPREPLY[*]}")

    def completed(*words):
        return subprocess.run(["bash", "-c", script, "bash", *words], capture_output=True, text=True, check=True).stdout.split()

    assert completed("st") == ["stats"] and completed("stats", "--w") == ["--watch"]
    assert completed("render", "--format", "") == ["nft", "iptables"]
    assert completed("check", "--color", "=") == ["auto", "always", "never"] and completed("check", "--color", "=", "al") == ["always"]
    offered = set(completed("install", "-")) | set(completed("render", "-")) | set(completed("check", "-")) | set(completed("stats", "-"))
    options = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]*|-[46])\b", out("--help")))
    assert options <= offered, options - offered
    assert zsh_completed(["st", "check --al", "--json ch", "render --format i", "stats --wa", "install --interface l"]) == [
        "stats ", "check --all ", "--json check ", "render --format iptables ", "stats --watch ", "install --interface lo "]
    zsh = open(f"{stage}/share/zsh/site-functions/_tproxyctl").read()
    manual = open(f"{stage}/share/man/man8/tproxyctl.8").read().replace("\\-", "-")
    assert all(option in zsh and option in manual for option in options)


for test in (usage, check, self_test, colors, render, install, persist, stats, completion):
    test()
    print("ok", test.__name__)
