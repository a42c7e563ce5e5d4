"""What keeps this host, or this kernel, from intercepting traffic, as the library finds it."""

from __future__ import annotations

import ctypes
from ctypes import byref
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from . import _ctypes as c
from ._errors import checked
from ._rules import RulesConfig, config_struct

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Severity(IntEnum):
    """How bad a finding is."""

    OK = c.TP_SEVERITY_OK
    NOTE = c.TP_SEVERITY_NOTE
    WARNING = c.TP_SEVERITY_WARNING
    FAILURE = c.TP_SEVERITY_FAILURE


class Finding(NamedTuple):
    """One thing that was looked at."""

    severity: Severity
    #: Stable, for programs: "sysctl.src_valid_mark".
    id: str
    #: What was found.
    message: str
    #: What that does to traffic.
    impact: str
    #: The command that fixes it.
    fix: str


def check() -> list[Finding]:
    """Asks the library for its findings; nothing is changed, and little privilege is needed.

    It looks at what is there: this process, its network, everybody's rules.
    """
    return _findings(c.tp_check)


def self_test(**config: Unpack[RulesConfig]) -> list[Finding]:
    """Tries whether rules work on this kernel, by a connection and a datagram of each family that go through them.

    The keywords are those of :func:`install_rules`. All of it happens in a
    network that exists only during the call, with listeners made there;
    nothing of the host is changed. It takes milliseconds, at most three
    seconds. PermissionError: it needs CAP_SYS_ADMIN too, which ``unshare -r``
    gives to anybody.
    """
    struct = config_struct(config)
    return _findings(c.tp_self_test, byref(struct), ctypes.sizeof(struct))


def _findings(function: Any, *arguments: Any) -> list[Finding]:
    """What a function of the library reports."""
    findings: list[tuple[int, list[bytes | None]]] = []

    # An exception in here would be printed and forgotten: it takes what there is, and no more. The texts are the
    # library's, and gone after this call; ctypes copies them.
    def report(finding: ctypes._Pointer[c.tp_finding], _: object) -> None:
        it = finding.contents
        findings.append((it.severity, [it.id, it.message, it.impact, it.fix]))

    checked(function(*arguments, c.tp_finding_fn(report), None))
    return [
        Finding(Severity(severity), *((text or b"").decode("utf-8", "replace") for text in texts))
        for severity, texts in findings
    ]
