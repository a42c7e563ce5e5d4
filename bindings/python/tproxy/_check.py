"""What keeps this host from intercepting traffic, as the library finds it."""

from __future__ import annotations

import ctypes
from enum import IntEnum
from typing import NamedTuple

from . import _ctypes as c
from ._errors import checked


class Severity(IntEnum):
    """How bad a finding is."""

    OK = c.TP_OK
    NOTE = c.TP_NOTE
    WARNING = c.TP_WARNING
    FAILURE = c.TP_FAILURE


class Finding(NamedTuple):
    """One thing that was looked at."""

    severity: Severity
    #: Stable, for programs: "sysctl.src_valid_mark".
    id: str
    #: What was found.
    found: str
    #: What that does to traffic.
    effect: str
    #: The command that cures it.
    cure: str


def check() -> list[Finding]:
    """Asks the library for its findings; nothing is changed, and little privilege is needed."""
    findings: list[Finding] = []

    def report(finding: ctypes._Pointer[c.tp_finding], _: object) -> None:
        # The texts are the library's, and may be gone after this call.
        it = finding.contents
        texts = [(getattr(it, name) or b"").decode("utf-8", "replace") for name in Finding._fields[1:]]
        findings.append(Finding(Severity(it.severity), *texts))

    checked(c.tp_check(c.tp_finding_fn(report), None))
    return findings
