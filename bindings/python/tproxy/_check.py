"""What keeps this host from intercepting traffic, as the library finds it."""

from __future__ import annotations

import ctypes
import errno
from enum import IntEnum
from typing import NamedTuple

from . import _ctypes as c
from ._errors import Error, checked


class Severity(IntEnum):
    """How bad a finding is."""

    OK = 0
    NOTE = 1
    WARNING = 2
    FAILURE = 3


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


class tp_finding(ctypes.Structure):
    _fields_ = [("severity", ctypes.c_uint32)] + [(name, ctypes.c_char_p) for name in Finding._fields[1:]]


_REPORT = ctypes.CFUNCTYPE(None, ctypes.POINTER(tp_finding), ctypes.c_void_p)


def check() -> list[Finding]:
    """Asks the library for its findings. A library that cannot check gives an errno of EOPNOTSUPP."""
    try:
        tp_check = c.library.tp_check
    except AttributeError:
        version = c.tp_version().decode()
        raise Error(errno.EOPNOTSUPP, f"libtproxy {version} has no tp_check: install a newer one") from None
    tp_check.restype, tp_check.argtypes = ctypes.c_int, (_REPORT, ctypes.c_void_p)
    findings: list[Finding] = []

    def report(finding: ctypes._Pointer[tp_finding], _: object) -> None:
        # The texts are the library's, and may be gone after this call.
        it = finding.contents
        texts = [(getattr(it, name) or b"").decode("utf-8", "replace") for name in Finding._fields[1:]]
        findings.append(Finding(Severity(it.severity), *texts))

    checked(tp_check(_REPORT(report), None))
    return findings
