"""Finds the shared library and loads it."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

#: Soname of the library. A library of another major version has another
#: soname, and may have different structs with the same names.
SONAME = "libtproxy.so.0"
MAJOR = 0

#: File name of the library in the package directory of a wheel.
BESIDE = Path(__file__).with_name(SONAME)


def _candidates() -> Iterator[tuple[str, str | None]]:
    """Returns the candidates in order: a description, and the path or name to load."""
    # `python -I` and `-E` ignore the user's environment.
    trusted = not sys.flags.ignore_environment
    chosen = os.environ.get("LIBTPROXY") if trusted else None
    yield "$LIBTPROXY", chosen
    # If the user selects a library, no other library is tried.
    if chosen:
        return
    yield "beside the package", str(BESIDE) if BESIDE.exists() else None
    yield "the loader", SONAME
    # find_library runs a compiler found by PATH.
    yield "find_library", ctypes.util.find_library("tproxy") if trusted else None


def load() -> ctypes.CDLL:
    """Loads the library. Raises :class:`ImportError` with all candidates and their errors."""
    tried = []
    for place, name in _candidates():
        if not name:
            tried.append(f"{place}: {'not set' if place.startswith('$') else 'nothing'}")
            continue
        try:
            library = ctypes.CDLL(name, use_errno=True)
        except OSError as error:
            tried.append(f"{place}: {error}")
            continue
        _check_version(name, library)
        return library
    raise ImportError(
        "libtproxy was not found:\n  "
        + "\n  ".join(tried)
        + "\nInstall it (`make install` in its source, then ldconfig), or set LIBTPROXY to the path of libtproxy.so"
    )


def _check_version(name: str, library: ctypes.CDLL) -> None:
    try:
        tp_version = library.tp_version
    except AttributeError:
        raise ImportError(f"{name} is not libtproxy: it has no tp_version") from None
    tp_version.restype = ctypes.c_char_p
    version = str(tp_version().decode())
    major = version.partition(".")[0]
    if major != str(MAJOR):
        raise ImportError(
            f"{name} is libtproxy {version}, whose interface is another (libtproxy.so.{major}); "
            f"this package needs {SONAME}: install that, or a package of version {major}"
        )
