"""Exceptions for failed calls of the library."""

from __future__ import annotations

import builtins
import ctypes
import os

from . import _ctypes as c


class Error(OSError):
    """A call of the library failed: ``errno``, and the library's message in ``strerror``.

    The message contains the failed operation, the cause and, if known, a fix.
    If Python has a class for the errno, the exception is also an instance of it:
    ``except PermissionError`` catches a missing capability.
    """

    def __new__(cls, *args: object) -> Error:
        if cls is Error and args and isinstance(args[0], int):
            cls = _CLASSES.get(type(OSError(args[0], "")), Error)
        return super().__new__(cls, *args)


# The classes that OSError itself assigns to errno values (PEP 3151).


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
    """EEXIST: another instance or program uses the requested name, table or priority."""


class FileNotFoundError(Error, builtins.FileNotFoundError):
    """ENOENT: a connection that was not intercepted, or a prefix that is not in the set."""


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
    """Returns the error of this thread's last failed call."""
    sentence = c.tp_last_error()
    return Error(ctypes.get_errno(), sentence.decode("utf-8", "replace"))


def kernel_error(errno: int, step: str) -> Error:
    """Returns the error of a system call that Python made, or that has no message."""
    return Error(errno, f"{step}: {os.strerror(errno)}")


def checked(result: int) -> int:
    """Returns the result of a call. Raises :class:`Error` if it is -1."""
    if result < 0:
        raise last_error()
    return result
