"""``python -m tproxy``: what keeps this host from intercepting, rules as a script, and what dead programs left."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Sequence

import tproxy
from tproxy import Finding, Format, Protocol, RulesConfig, RulesFlag, Severity

_COLOURS = {Severity.OK: "32", Severity.NOTE: "36", Severity.WARNING: "33", Severity.FAILURE: "31;1"}


def _coloured(severity: Severity, text: str) -> str:
    return f"\033[{_COLOURS[severity]}m{text}\033[0m"


def _table(findings: Sequence[Finding], colours: bool, width: int) -> list[str]:
    """A line for each finding; below those that matter, what they do and what fixes them."""
    first = max((len(finding.severity.name) for finding in findings), default=0)
    second = max((len(finding.id) for finding in findings), default=0)
    lines = []
    for finding in findings:
        name = finding.severity.name.lower().ljust(first)
        name = _coloured(finding.severity, name) if colours else name
        lines.append(f"{name}  {finding.id.ljust(second)}  {finding.message}")
        if finding.severity > Severity.OK:
            margin = " " * (first + 2)
            lines += textwrap.wrap(finding.impact, width, initial_indent=margin, subsequent_indent=margin)
            # A command is copied, and so not broken.
            lines += [f"{margin}fix: {line}" for line in finding.fix.splitlines()]
    return lines


def _check(arguments: argparse.Namespace) -> int:
    findings = tproxy.check()
    if arguments.json:
        listed = [{**finding._asdict(), "severity": finding.severity.name.lower()} for finding in findings]
        print(json.dumps(listed, indent=2))
    else:
        # https://no-color.org
        colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print("\n".join(_table(findings, colours, 100)))
    return 1 if any(finding.severity == Severity.FAILURE for finding in findings) else 0


def _port_range(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    return int(first), int(last or first)


def _render(arguments: argparse.Namespace) -> int:
    flags = RulesFlag(0)
    for name in arguments.flag:
        flags |= RulesFlag[name]
    protocols = Protocol(0)
    for name in arguments.protocol:
        protocols |= Protocol[name]
    config: RulesConfig = {
        "name": arguments.name,
        "listen_addr": arguments.listen,
        "flags": flags,
        "protocols": protocols,
        "ports": arguments.port,
        "dst": arguments.dst,
        "src": arguments.src,
        "bypass": arguments.bypass,
        "interfaces": arguments.interface,
    }
    print(tproxy.render_rules(Format[arguments.format], **config), end="")
    return 0


def _purge(arguments: argparse.Namespace) -> int:
    tproxy.purge_rules(arguments.name)
    return 0


def _version(_: argparse.Namespace) -> int:
    from tproxy import _ctypes

    print(f"libtproxy {tproxy.version()} ({_ctypes.library._name}), Python {sys.version.split()[0]}")
    return 0


def _enum_name(text: str) -> str:
    return text.upper().replace("-", "_")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tproxy", description="Transparent proxying on Linux.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    check = commands.add_parser("check", help="what keeps this host from intercepting traffic, and what fixes it")
    check.add_argument("--json", action="store_true", help="for programs")
    check.set_defaults(run=_check)

    render = commands.add_parser("render", help="the script that would make the rules; changes nothing")
    render.add_argument("--listen", metavar="ADDRESS:PORT", help="the listener: [::]:3129 serves both families")
    render.add_argument("--name", help="of the instance (tproxy)")
    for option, what, kind, choices, words in (
        ("--port", "PORT[-PORT]", _port_range, None, "to intercept (all)"),
        ("--dst", "PREFIX", str, None, "destination to intercept (all)"),
        ("--src", "PREFIX", str, None, "source to intercept (all)"),
        ("--bypass", "PREFIX", str, None, "destination never to intercept"),
        ("--interface", "NAME", str, None, "by which traffic comes in (all)"),
        ("--protocol", None, _enum_name, [p.name for p in Protocol], "what the listener is (tcp)"),
        ("--flag", None, _enum_name, [f.name for f in RulesFlag], "what else the rules do"),
    ):
        render.add_argument(
            option,
            metavar=what,
            type=kind,
            choices=choices,
            action="append",
            default=[],
            help=words + "; can be repeated",
        )
    render.add_argument(
        "--format", type=_enum_name, choices=[f.name for f in Format], default="NFT", help="nft, iptables"
    )
    render.set_defaults(run=_render)

    purge = commands.add_parser("purge", help="removes what a dead or persistent instance left")
    purge.add_argument("name", nargs="?", help="of the instance; without it, all of them")
    purge.set_defaults(run=_purge)

    version = commands.add_parser("version", help="which library this is, and where it was found")
    version.set_defaults(run=_version)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """0: well. 1: it failed, or a check did. 2: bad arguments."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except ValueError as error:
        parser.error(str(error))
    except tproxy.Error as error:
        print(f"tproxy: {error.strerror}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
