"""What is raised when a call of the library fails."""

from __future__ import annotations

import builtins
import ctypes
import os

from . import _ctypes as c


class Error(OSError):
    """A call of the library failed: ``errno``, and in ``strerror`` the library's sentence.

    The sentence says which step failed, why, and a fix where one is known.
    An error whose errno has a class of its own in Python is of that class too:
    ``except PermissionError`` catches a missing capability.
    """

    def __new__(cls, *args: object) -> Error:
        if cls is Error and args and isinstance(args[0], int):
            cls = _CLASSES.get(type(OSError(args[0], "")), Error)
        return super().__new__(cls, *args)


# As errno values are given classes by OSError itself (PEP 3151).


class BlockingIOError(Error, builtins.BlockingIOError):
    """EAGAIN, EALREADY, EINPROGRESS."""


class BrokenPipeError(Error, builtins.BrokenPipeError):
    """EPIPE."""


class ChildProcessError(Error, builtins.ChildProcessError):
    """ECHILD."""


class ConnectionAbortedError(Error, builtins.ConnectionAbortedError):
    """ECONNABORTED."""


class ConnectionRefusedError(Error, builtins.ConnectionRefusedError):
    """ECONNREFUSED."""


class ConnectionResetError(Error, builtins.ConnectionResetError):
    """ECONNRESET."""


class FileExistsError(Error, builtins.FileExistsError):
    """EEXIST: somebody else has what was asked for."""


class FileNotFoundError(Error, builtins.FileNotFoundError):
    """ENOENT: a connection that was not intercepted, a prefix that is not there."""


class InterruptedError(Error, builtins.InterruptedError):
    """EINTR."""


class IsADirectoryError(Error, builtins.IsADirectoryError):
    """EISDIR."""


class NotADirectoryError(Error, builtins.NotADirectoryError):
    """ENOTDIR."""


class PermissionError(Error, builtins.PermissionError):
    """EPERM, EACCES: a capability is missing."""


class ProcessLookupError(Error, builtins.ProcessLookupError):
    """ESRCH."""


class TimeoutError(Error, builtins.TimeoutError):
    """ETIMEDOUT."""


_CLASSES = {cls.__mro__[2]: cls for cls in Error.__subclasses__()}


def last_error() -> Error:
    """The error of this thread's call that just failed."""
    sentence = c.tp_last_error()
    return Error(ctypes.get_errno(), sentence.decode("utf-8", "replace"))


def kernel_error(errno: int, step: str) -> Error:
    """An error of a system call that Python made, or that has no sentence."""
    return Error(errno, f"{step}: {os.strerror(errno)}")


def checked(result: int) -> int:
    """The result of a call that gives -1 when it fails."""
    if result < 0:
        raise last_error()
    return result
