"""``python -m tproxy``: checks this host, prints rules as a script, and removes rules of dead programs."""

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


def _colored(severity: Severity, text: str) -> str:
    return f"\033[{_COLOURS[severity]}m{text}\033[0m"


def _table(findings: Sequence[Finding], colors: bool, width: int) -> list[str]:
    """Prints a line for each finding; for warnings and failures also the effect and the fix."""
    first = max((len(finding.severity.name) for finding in findings), default=0)
    second = max((len(finding.id) for finding in findings), default=0)
    lines = []
    for finding in findings:
        name = finding.severity.name.lower().ljust(first)
        name = _colored(finding.severity, name) if colors else name
        lines.append(f"{name}  {finding.id.ljust(second)}  {finding.message}")
        if finding.severity > Severity.OK:
            margin = " " * (first + 2)
            lines += textwrap.wrap(finding.impact, width, initial_indent=margin, subsequent_indent=margin)
            # A command is not wrapped, so that it can be copied.
            lines += [f"{margin}fix: {line}" for line in finding.fix.splitlines()]
    return lines


def _check(arguments: argparse.Namespace) -> int:
    findings = tproxy.check()
    if arguments.json:
        listed = [{**finding._asdict(), "severity": finding.severity.name.lower()} for finding in findings]
        print(json.dumps(listed, indent=2))
    else:
        # https://no-color.org
        colors = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print("\n".join(_table(findings, colors, 100)))
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
        # An empty list would select nothing.
        "ports": arguments.port or None,
        "dst": arguments.dst or None,
        "src": arguments.src or None,
        "bypass": arguments.bypass or None,
        "interfaces": arguments.interface or None,
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

    check = commands.add_parser(
        "check", help="report causes that break transparent proxying, and the commands that fix them"
    )
    check.add_argument("--json", action="store_true", help="print JSON")
    check.set_defaults(run=_check)

    render = commands.add_parser("render", help="print the script that installs the rules; changes nothing")
    render.add_argument("--listen", metavar="ADDRESS:PORT", help="the listener: [::]:3129 serves both families")
    render.add_argument("--name", help="name of the instance (default: tproxy)")
    for option, what, kind, choices, words in (
        ("--port", "PORT[-PORT]", _port_range, None, "destination port to intercept (default: all)"),
        ("--dst", "PREFIX", str, None, "destination to intercept (default: all)"),
        ("--src", "PREFIX", str, None, "source to intercept (default: all)"),
        ("--bypass", "PREFIX", str, None, "destination that is never intercepted"),
        ("--interface", "NAME", str, None, "interface on which traffic arrives (default: all)"),
        ("--protocol", None, _enum_name, [p.name for p in Protocol], "protocol of the listener (default: tcp)"),
        ("--flag", None, _enum_name, [f.name for f in RulesFlag], "flag of the rules"),
    ):
        render.add_argument(
            option,
            metavar=what,
            type=kind,
            choices=choices,
            action="append",
            default=[],
            help=words + "; may be repeated",
        )
    render.add_argument(
        "--format", type=_enum_name, choices=[f.name for f in Format], default="NFT", help="nft, iptables"
    )
    render.set_defaults(run=_render)

    purge = commands.add_parser("purge", help="remove the rules of a dead or persistent instance")
    purge.add_argument("name", nargs="?", help="name of the instance; default: all of them")
    purge.set_defaults(run=_purge)

    version = commands.add_parser("version", help="print the version and the path of the library")
    version.set_defaults(run=_version)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status. 0: success. 1: a call failed, or failures were found. 2: invalid arguments."""
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
