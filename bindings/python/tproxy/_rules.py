"""The kernel's rules that bring packets to the program."""

from __future__ import annotations

import ctypes
import os
import threading
import warnings
from collections.abc import Callable, Iterable
from ctypes import byref
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, cast

from . import _ctypes as c
from ._address import Address, PortRange, Prefix, encode, ports, prefixes
from ._errors import checked
from ._flags import AddressSet, Backend, Family, Format, Protocol, RulesFlag
from ._sockets import HasFileno, descriptor, uint32

if TYPE_CHECKING:
    from typing_extensions import Unpack


class RulesConfig(TypedDict, total=False):
    """What to intercept, for whom: the keywords of :func:`install_rules` and its kin. All may be left out.

    ``None`` is the same as leaving a keyword out. A list that is left out restricts nothing; an empty ``ports``,
    ``dst``, ``src`` or ``interfaces`` selects nothing.

    ====================  ============================================================================
    ``name``              the instance's; "tproxy". One network can have several
    ``listeners``         the listening sockets that get what is intercepted
    ``listen_addr``       in their place, the address of a listener in another process
    ``flags``             :class:`RulesFlag`
    ``backend``           :class:`Backend`; nf_tables, or else iptables
    ``protocols``         :class:`Protocol`; what the listeners are, else TCP
    ``families``          :class:`Family`; those of the listeners, else both
    ``mark, mark_mask``   the packet mark for "to a local socket", and its bits; 0x2000/0x3000
    ``table, priority``   of routing; some that are free
    ``ports``             destination ports to intercept: 80, (8000, 8100), range(...); every port
    ``dst``               destinations to intercept; every one but this host's own
    ``src``               sources to intercept; every one
    ``bypass``            destinations never to intercept
    ``interfaces``        by which forwarded traffic comes in; every one
    ====================  ============================================================================
    """

    name: str | None
    listeners: Iterable[HasFileno | int]
    listen_addr: Address | None
    flags: RulesFlag | int
    backend: Backend | int
    protocols: Protocol | int
    families: Family | int
    mark: int
    mark_mask: int
    table: int
    priority: int
    ports: Iterable[PortRange] | None
    dst: Iterable[Prefix] | None
    src: Iterable[Prefix] | None
    bypass: Iterable[Prefix] | None
    interfaces: Iterable[str] | None


_NUMBERS = ("flags", "backend", "protocols", "families", "mark", "mark_mask", "table", "priority")


def _text(what: str, text: str) -> bytes:
    """C would see the part before a NUL alone."""
    if "\0" in text:
        raise ValueError(f"{what}: {text!r} has a NUL in it")
    return text.encode()


def _name(name: str | None) -> bytes | None:
    return None if name is None else _text("name", name)


def _names(names: Iterable[str]) -> ctypes.Array[ctypes.c_char_p]:
    """An array of the names of interfaces."""
    if isinstance(names, str):
        raise TypeError(f"interfaces: {names!r}: a list of names is needed, not one")
    encoded = [_text("interfaces", name) for name in names]
    return (ctypes.c_char_p * len(encoded))(*encoded)


def config_struct(given: RulesConfig) -> c.tp_rules_config:
    """What is asked for as C has it. The arrays live as long as the struct."""
    unknown = given.keys() - RulesConfig.__annotations__.keys()
    if unknown:
        raise TypeError(
            f"rules have no {', '.join(sorted(unknown))}; there are {', '.join(RulesConfig.__annotations__)}"
        )
    config = c.tp_rules_config()
    numbers = cast("dict[str, int]", given)
    for what in _NUMBERS:
        setattr(config, what, uint32(what, numbers.get(what, 0)))
    name, listen_addr = given.get("name"), given.get("listen_addr")
    config.name = _name(name)
    if listen_addr is not None:
        place, config.listen_addrlen = encode(listen_addr)
        config.listen_addr = ctypes.pointer(place)
    descriptors = [descriptor(sock) for sock in given.get("listeners", ())]
    lists: dict[str, Callable[[Any], ctypes.Array[Any]]] = {
        "ports": ports,
        "dst": prefixes,
        "src": prefixes,
        "bypass": prefixes,
        "interfaces": _names,
    }
    arrays: dict[str, ctypes.Array[Any]] = {"listeners": (ctypes.c_int * len(descriptors))(*descriptors)}
    for what, array_of in lists.items():
        # NULL restricts nothing. The pointer to an array of length 0 is not NULL, and selects nothing.
        if (items := cast("dict[str, Any]", given).get(what)) is not None:
            arrays[what] = array_of(items)
    for what, array in arrays.items():
        setattr(config, what, array)
        setattr(config, "n_" + what, len(array))
    return config


class RulesStats(NamedTuple):
    """What rules have done since they were installed: packets, and their bytes from the IP header on."""

    #: Given to a listener.
    intercepted_packets: int
    intercepted_bytes: int
    #: Given to a transparent socket that they belong to.
    diverted_packets: int
    diverted_bytes: int
    #: Dropped, because there was no listener.
    dropped_packets: int
    dropped_bytes: int
    #: Dropped, because they were sent straight to a listener.
    direct_packets: int
    direct_bytes: int


def _stats(stats: c.tp_rules_stats) -> RulesStats:
    return RulesStats(*(getattr(stats, name) for name in RulesStats._fields))


class Rules:
    """Installed rules; :func:`install_rules` makes them. A context manager, at whose end they are removed.

    Any thread may use it. Whoever drops the last reference without
    :meth:`remove` gets a ResourceWarning, and the rules are removed; but not
    those with ``RulesFlag.PERSIST``.

    A child by ``fork`` (``multiprocessing`` with that start method) has a copy.
    While the parent lives, the methods of the copy raise OSError (EBUSY), and
    :meth:`remove`, the end of a ``with`` block and the end of the copy leave the
    rules alone. Workers call :meth:`forget`, so that the rules end with the parent.
    """

    def __init__(self, handle: int | None, persist: bool) -> None:
        self._handle = handle
        self._persist = persist
        self._owner = os.getpid()
        # While C is at work without the GIL, another thread must not free the handle.
        self._thread_lock = threading.Lock()
        self._lock_owner = self._owner

    @property
    def _lock(self) -> threading.Lock:
        if self._lock_owner != os.getpid():
            # A thread of the parent may have had it at the fork, and is not here to release it. The library has a lock
            # of its own, which knows.
            self._thread_lock, self._lock_owner = threading.Lock(), os.getpid()
        return self._thread_lock

    def _installed(self) -> int:
        if self._handle is None:
            raise ValueError("the rules are removed")
        return self._handle

    def update(self, which: AddressSet | int, *, add: Iterable[Prefix] = (), remove: Iterable[Prefix] = ()) -> None:
        """Adds prefixes to a set and removes others, in one transaction, while the rules work.

        ``AddressSet.DST`` and ``SRC`` can be changed if the rules were given
        a list of them, empty or not, ``BYPASS`` always. FileNotFoundError: one to be removed is not there.
        """
        added, removed = prefixes(add), prefixes(remove)
        with self._lock:
            checked(
                c.tp_update_rules(self._installed(), uint32("set", which), added, len(added), removed, len(removed))
            )

    def replace(self, **config: Unpack[RulesConfig]) -> None:
        """Replaces what the rules ask for, in one transaction: all of it, as :func:`install_rules` has it."""
        struct = config_struct(config)
        with self._lock:
            checked(c.tp_replace_rules(self._installed(), byref(struct), ctypes.sizeof(struct)))

    def stats(self) -> RulesStats:
        """What they have done so far."""
        stats = c.tp_rules_stats()
        with self._lock:
            checked(c.tp_rules_stats_(self._installed(), byref(stats), ctypes.sizeof(stats)))
        return _stats(stats)

    def remove(self) -> None:
        """Removes them. To remove them twice is fine."""
        with self._lock:
            handle, self._handle = self._handle, None
            checked(c.tp_remove_rules(handle))

    def forget(self) -> None:
        """Gives up a forked child's copy: closes its descriptors and removes nothing. To forget twice is fine."""
        with self._lock:
            handle, self._handle = self._handle, None
            c.tp_forget_rules(handle)

    def __enter__(self) -> Rules:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._owner == os.getpid():
            self.remove()

    def __del__(self) -> None:
        if self._handle is None or self._persist or self._owner != os.getpid():
            return
        warnings.warn(f"rules that nobody removed: {self!r}", ResourceWarning, source=self, stacklevel=2)
        self.remove()


def install_rules(**config: Unpack[RulesConfig]) -> Rules:
    """Makes the kernel bring connections to the listeners; the keywords are those of :class:`RulesConfig`.

    ::

        with tproxy.listen("[::]:3129") as listener:
            with tproxy.install_rules(listeners=[listener], ports=[80, (8000, 8100)], dst=["10.0.0.0/8"]) as rules:
                ...

    The rules belong to the process, and end with it. All or nothing: if it
    fails, nothing is left. PermissionError: no CAP_NET_ADMIN over this network.
    FileExistsError, or an errno of EBUSY: somebody else has what was asked for.
    """
    struct = config_struct(config)
    handle = ctypes.c_void_p()
    checked(c.tp_install_rules(byref(struct), ctypes.sizeof(struct), byref(handle)))
    return Rules(handle.value, bool(struct.flags & c.TP_RULES_PERSIST))


def render_rules(format: Format | int = Format.NFT, **config: Unpack[RulesConfig]) -> str:  # noqa: A002
    """The shell script that would do what :func:`install_rules` does. Does nothing else, and needs no privilege."""
    struct = config_struct(config)
    arguments = (byref(struct), ctypes.sizeof(struct), uint32("format", format))
    size = ctypes.c_size_t()
    checked(c.tp_render_rules(*arguments, None, byref(size)))
    text = ctypes.create_string_buffer(size.value)
    checked(c.tp_render_rules(*arguments, text, byref(size)))
    return text.value.decode()


def read_stats(name: str | None = None) -> RulesStats:
    """What the rules of an instance have done, whatever process they belong to.

    name: the instance's; ``None``: "tproxy". FileNotFoundError: there are no
    rules of this name. PermissionError: no CAP_NET_ADMIN over this network.
    """
    stats = c.tp_rules_stats()
    checked(c.tp_read_stats(_name(name), byref(stats), ctypes.sizeof(stats)))
    return _stats(stats)


def purge_rules(name: str | None = None) -> None:
    """Removes what a dead or persistent instance left, or all of them; never what a living process has."""
    checked(c.tp_purge_rules(_name(name)))
