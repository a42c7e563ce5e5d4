"""Kernel rules that deliver packets to the program."""

from __future__ import annotations

import ctypes
import os
import threading
import warnings
from collections.abc import Callable, Iterable
from ctypes import byref
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, cast

from . import _ctypes as c
from ._address import Address, IdRange, Prefix, ProtocolPorts, SockAddr, decode, encode, ids, macs, ports, prefixes
from ._errors import checked
from ._flags import AddressSet, Backend, Family, Format, Protocol, RulesFlag
from ._sockets import HasFileno, descriptor, uint32

if TYPE_CHECKING:
    from typing_extensions import Unpack


class RulesConfig(TypedDict, total=False):
    """Keywords of :func:`install_rules` and related functions. All are optional.

    ``None`` is the same as an omitted keyword. An omitted list restricts nothing; an empty ``ports``,
    ``dst``, ``src`` or ``interfaces`` selects nothing.

    ====================  ============================================================================
    ``name``              name of the instance; default: "tproxy"
    ``listeners``         listening sockets that receive intercepted traffic
    ``listen_addr``       address of a listener in another process, instead of listeners
    ``flags``             :class:`RulesFlag`
    ``backend``           :class:`Backend`; default: nf_tables if possible, otherwise iptables
    ``protocols``         :class:`Protocol`; default: those of the listeners, or TCP
    ``families``          :class:`Family`; default: those of the listeners, or both
    ``mark, mark_mask``   packet mark that routes to a local socket, and its mask
    ``table, priority``   routing table, and first rule priority; default: free ones
    ``ports``             destination ports: 80, (8000, 8100), range(...); default: all
    ``dst``               destinations; default: all except this host's own addresses
    ``src``               sources; default: all
    ``bypass``            destinations that are never intercepted
    ``interfaces``        interfaces on which forwarded traffic arrives; default: all
    ``bypass_ports``      destination ports that are never intercepted
    ``reject_ports``      destination ports that are refused: with a reset or an ICMP error
    ``bypass_src``        sources that are never intercepted
    ``bypass_interfaces`` interfaces whose traffic is never intercepted
    ``macs``              Ethernet sources of forwarded traffic; default: all
    ``bypass_macs``       Ethernet sources whose traffic is never intercepted
    ``uids, gids``        users and groups, of the traffic of this host; default: all
    ``bypass_uids``       users whose traffic is never intercepted
    ``bypass_gids``       groups whose traffic is never intercepted
    ``cgroups``           control groups (cgroup v2), of the traffic of this host; default: all
    ``bypass_cgroups``    control groups whose traffic is never intercepted
    ``bypass_mark``       SO_MARK of packets of this host that are never intercepted
    ``bypass_mark_mask``  mask of the bits of that mark that count; default: all
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
    ports: Iterable[ProtocolPorts] | None
    dst: Iterable[Prefix] | None
    src: Iterable[Prefix] | None
    bypass: Iterable[Prefix] | None
    interfaces: Iterable[str] | None
    bypass_ports: Iterable[ProtocolPorts] | None
    reject_ports: Iterable[ProtocolPorts] | None
    bypass_src: Iterable[Prefix] | None
    bypass_interfaces: Iterable[str] | None
    macs: Iterable[str | bytes] | None
    bypass_macs: Iterable[str | bytes] | None
    uids: Iterable[IdRange] | None
    bypass_uids: Iterable[IdRange] | None
    gids: Iterable[IdRange] | None
    bypass_gids: Iterable[IdRange] | None
    cgroups: Iterable[str] | None
    bypass_cgroups: Iterable[str] | None
    bypass_mark: int
    bypass_mark_mask: int


_NUMBERS = (
    *("flags", "backend", "protocols", "families", "mark", "mark_mask", "table", "priority"),
    *("bypass_mark", "bypass_mark_mask"),
)


def _text(what: str, text: str) -> bytes:
    """Encodes a name. C would read only the part before a NUL."""
    if "\0" in text:
        raise ValueError(f"{what}: {text!r} has a NUL in it")
    return text.encode()


def _name(name: str | None) -> bytes | None:
    return None if name is None else _text("name", name)


def _names(names: Iterable[str]) -> ctypes.Array[ctypes.c_char_p]:
    """Returns an array of names."""
    if isinstance(names, str):
        raise TypeError(f"{names!r}: a list of names is needed, not one")
    encoded = [_text("name", name) for name in names]
    return (ctypes.c_char_p * len(encoded))(*encoded)


def config_struct(given: RulesConfig) -> c.tp_rules_config:
    """Returns the configuration as a C struct, which keeps its arrays alive."""
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
        "bypass_ports": ports,
        "reject_ports": ports,
        "bypass_src": prefixes,
        "bypass_interfaces": _names,
        "macs": macs,
        "bypass_macs": macs,
        "uids": ids,
        "bypass_uids": ids,
        "gids": ids,
        "bypass_gids": ids,
        "cgroups": _names,
        "bypass_cgroups": _names,
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
    """Counters of rules since they were installed: packets, and bytes including the IP header."""

    #: Delivered to a listener.
    intercepted_packets: int
    intercepted_bytes: int
    #: Delivered to an existing transparent socket.
    diverted_packets: int
    diverted_bytes: int
    #: Dropped because no listener existed.
    dropped_packets: int
    dropped_bytes: int
    #: Dropped because they were addressed directly to a listener.
    direct_packets: int
    direct_bytes: int


def _stats(stats: c.tp_rules_stats) -> RulesStats:
    return RulesStats(*(getattr(stats, name) for name in RulesStats._fields))


class Rules:
    """Installed rules, returned by :func:`install_rules`. A context manager that removes them at its end.

    Any thread may use it. If the last reference is dropped without
    :meth:`remove`, a ResourceWarning is issued and the rules are removed, except
    those with ``RulesFlag.PERSIST``.

    A forked child (``multiprocessing`` with the start method fork) has a copy.
    While the parent runs, the methods of the copy raise OSError (EBUSY), and
    :meth:`remove`, the end of a ``with`` block and the end of the copy remove
    nothing. Workers call :meth:`forget`, so that the rules end with the parent.
    """

    def __init__(self, handle: int | None, persist: bool) -> None:
        self._handle = handle
        self._persist = persist
        self._owner = os.getpid()
        # C calls release the GIL: another thread must not free the handle during a call.
        self._thread_lock = threading.Lock()
        self._lock_owner = self._owner

    @property
    def _lock(self) -> threading.Lock:
        if self._lock_owner != os.getpid():
            # A thread of the parent may have held the lock at the fork, and does not exist in this process. The
            # library has its own lock, which detects that.
            self._thread_lock, self._lock_owner = threading.Lock(), os.getpid()
        return self._thread_lock

    def _installed(self) -> int:
        if self._handle is None:
            raise ValueError("the rules are removed")
        return self._handle

    def update(self, which: AddressSet | int, *, add: Iterable[Prefix] = (), remove: Iterable[Prefix] = ()) -> None:
        """Adds prefixes to a set and removes others, in one transaction, while traffic flows.

        ``AddressSet.DST`` and ``SRC`` can be changed if the rules were given
        a list of them, empty or not, ``BYPASS`` always. FileNotFoundError: a prefix to remove is not in the set.
        """
        added, removed = prefixes(add), prefixes(remove)
        with self._lock:
            checked(
                c.tp_update_rules(self._installed(), uint32("set", which), added, len(added), removed, len(removed))
            )

    def learn(self, which: AddressSet | int, addresses: Iterable[Prefix], ttl: int) -> None:
        """Adds addresses to a set for ``ttl`` seconds, after which they leave it. A learned address gets the new time.

        ``AddressSet.DST``, if the rules were given a list of destinations, empty or not, or ``BYPASS``. Learned
        addresses are kept by :meth:`replace`. OSError: errno ENOSPC: more than 1,000,000 of a family; EOPNOTSUPP: the
        rules are iptables rules.
        """
        learned = prefixes(addresses)
        with self._lock:
            checked(
                c.tp_learn_addresses(self._installed(), uint32("set", which), learned, len(learned), uint32("ttl", ttl))
            )

    def replace(self, **config: Unpack[RulesConfig]) -> None:
        """Replaces the whole configuration, in one transaction. The keywords are those of :func:`install_rules`."""
        struct = config_struct(config)
        with self._lock:
            checked(c.tp_replace_rules(self._installed(), byref(struct), ctypes.sizeof(struct)))

    def verify(self, *, repair: bool = False) -> None:
        """Verifies that the rules still work. With ``repair``, puts missing or overtaken routing back first.

        FileNotFoundError: the table is gone. errno ESTALE: routing is missing,
        or a routing rule of another program may take intercepted packets first,
        or IPv6 was disabled on lo when the rules were installed. errno
        ENOTCONN: no socket receives what the rules intercept.
        """
        with self._lock:
            checked(c.tp_verify_rules(self._installed(), c.TP_VERIFY_REPAIR if repair else 0))

    def stats(self) -> RulesStats:
        """Returns the counters."""
        stats = c.tp_rules_stats()
        with self._lock:
            checked(c.tp_rules_stats_(self._installed(), byref(stats), ctypes.sizeof(stats)))
        return _stats(stats)

    def remove(self) -> None:
        """Removes the rules. May be called more than once."""
        with self._lock:
            handle, self._handle = self._handle, None
            checked(c.tp_remove_rules(handle))

    def forget(self) -> None:
        """Frees a forked child's copy: closes its descriptors and removes nothing. May be called more than once."""
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
    """Installs rules that deliver traffic to the listeners. The keywords are those of :class:`RulesConfig`.

    ::

        with tproxy.listen("[::]:3129") as listener:
            with tproxy.install_rules(listeners=[listener], ports=[80, (8000, 8100)], dst=["10.0.0.0/8"]) as rules:
                ...

    The rules belong to the process, and the kernel removes them when it ends. A
    call that fails leaves nothing behind. PermissionError: CAP_NET_ADMIN is
    missing in the user namespace that owns this network namespace.
    FileExistsError, or errno EBUSY: another instance or program uses the
    requested name, table or priority.
    """
    struct = config_struct(config)
    handle = ctypes.c_void_p()
    checked(c.tp_install_rules(byref(struct), ctypes.sizeof(struct), byref(handle)))
    return Rules(handle.value, bool(struct.flags & c.TP_RULES_PERSIST))


def render_rules(format: Format | int = Format.NFT, **config: Unpack[RulesConfig]) -> str:  # noqa: A002
    """Returns the shell script that is equivalent to :func:`install_rules`. Needs no privilege."""
    struct = config_struct(config)
    arguments = (byref(struct), ctypes.sizeof(struct), uint32("format", format))
    size = ctypes.c_size_t()
    checked(c.tp_render_rules(*arguments, None, byref(size)))
    text = ctypes.create_string_buffer(size.value)
    checked(c.tp_render_rules(*arguments, text, byref(size)))
    return text.value.decode()


def read_stats(name: str | None = None) -> RulesStats:
    """Returns the counters of an instance, whichever process owns it.

    name: name of the instance; ``None``: "tproxy". FileNotFoundError: no rules
    of this name exist. PermissionError: CAP_NET_ADMIN is missing.
    """
    stats = c.tp_rules_stats()
    checked(c.tp_read_stats(_name(name), byref(stats), ctypes.sizeof(stats)))
    return _stats(stats)


class Instance(NamedTuple):
    """Instance of rules, as :func:`list_rules` returns it."""

    name: str
    backend: Backend
    #: Flags of its configuration.
    flags: RulesFlag
    #: Families and protocols that it serves; 0 if unknown.
    families: Family
    protocols: Protocol
    #: Packet mark that routes to a local socket, and its mask; 0 if unknown.
    mark: int
    mark_mask: int
    #: Routing table and first rule priority; 0 if unknown.
    table: int
    priority: int
    #: Process that owns the rules. 0: none; -1: a process that cannot be seen from here.
    owner_pid: int
    #: Address of its first listener; ``None`` if it has none or it is unknown.
    listen_addr: SockAddr | None
    stats: RulesStats


def list_rules() -> list[Instance]:
    """Returns the instances of rules in this network namespace, whichever process installed them.

    PermissionError: CAP_NET_ADMIN is missing.
    """
    instances: list[Instance] = []

    # ctypes would only print an exception of this callback. The data is valid only during the callback.
    def report(instance: ctypes._Pointer[c.tp_instance], _: object) -> None:
        it = instance.contents
        instances.append(
            Instance(
                (it.name or b"").decode(),
                Backend(it.backend),
                RulesFlag(it.flags),
                Family(it.families),
                Protocol(it.protocols),
                it.mark,
                it.mark_mask,
                it.table,
                it.priority,
                it.owner_pid,
                decode(it.listen_addr.contents) if it.listen_addr else None,
                _stats(it.stats),
            )
        )

    checked(c.tp_list_rules(c.tp_instance_fn(report), None))
    return instances


def purge_rules(name: str | None = None) -> None:
    """Removes the rules of dead or persistent instances: of one, or of all. Never those of a running process."""
    checked(c.tp_purge_rules(_name(name)))
