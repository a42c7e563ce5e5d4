"""Findings of the library about this host and kernel."""

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
    """Severity of a finding."""

    OK = c.TP_SEVERITY_OK
    NOTE = c.TP_SEVERITY_NOTE
    WARNING = c.TP_SEVERITY_WARNING
    FAILURE = c.TP_SEVERITY_FAILURE


class Finding(NamedTuple):
    """Result of one check."""

    severity: Severity
    #: Stable identifier for programs: "sysctl.src_valid_mark".
    id: str
    #: Human-readable description.
    message: str
    #: Effect on traffic.
    impact: str
    #: Command that fixes it, or an empty text.
    fix: str


def check() -> list[Finding]:
    """Diagnoses this host. Changes nothing, and needs no privilege.

    Inspects this process, its network namespace, and the rules of all programs.
    """
    return _findings(c.tp_check)


def self_test(**config: Unpack[RulesConfig]) -> list[Finding]:
    """Tests rules on this kernel: sends a connection and a datagram of each family through them.

    The keywords are those of :func:`install_rules`. The test runs in a temporary
    network namespace with its own listeners, and does not change the host.
    Usually takes milliseconds, and a few seconds if a probe is lost.
    PermissionError: CAP_SYS_ADMIN is missing, which ``unshare -r`` gives to any
    user.
    """
    struct = config_struct(config)
    return _findings(c.tp_self_test, byref(struct), ctypes.sizeof(struct))


def _findings(function: Any, *arguments: Any) -> list[Finding]:
    """Collects the findings that a function of the library reports."""
    findings: list[tuple[int, list[bytes | None]]] = []

    # ctypes would only print an exception of this callback. The texts are valid only during the callback; ctypes
    # copies them.
    def report(finding: ctypes._Pointer[c.tp_finding], _: object) -> None:
        it = finding.contents
        findings.append((it.severity, [it.id, it.message, it.impact, it.fix]))

    checked(function(*arguments, c.tp_finding_fn(report), None))
    return [
        Finding(Severity(severity), *((text or b"").decode("utf-8", "replace") for text in texts))
        for severity, texts in findings
    ]
