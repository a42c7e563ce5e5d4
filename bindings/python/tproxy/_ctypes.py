"""The C interface as ctypes has it: one declaration for each constant, struct and function of tproxy.h.

Names are the header's. Nothing here is for programs: the manual of these calls
is the header, and the rest of the package is what they are in Python. A test
compares all of it with what the C compiler says.
"""

from __future__ import annotations

import ctypes
from ctypes import (
    POINTER,
    c_char_p,
    c_int,
    c_int32,
    c_size_t,
    c_ssize_t,
    c_uint,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
)
from typing import Any

from . import _library

TP_VERSION_MAJOR = 0
TP_VERSION_MINOR = 1
TP_VERSION_PATCH = 0

TP_NONBLOCK = 1
TP_LISTEN_REUSEPORT = 2
TP_CONNECT_KEEP_PORT = 4
TP_CONNECT_DGRAM = 8
TP_CONNECT_DATA_FOLLOWS = 16
TP_LISTEN_V6ONLY = 32
TP_CONNECT_SAME_PORT = 64
TP_ACCEPT_TPROXY = 128

TP_DGRAM_TRUNC = 1
TP_DGRAM_CTRUNC = 2
TP_DGRAM_NO_ORIG_DST = 4
TP_BATCH_MAX = 64
TP_REPLIER_RAW = 256

TP_RULES_DIVERT_ONLY = 1
TP_RULES_REDIRECT = 2
TP_RULES_LOCAL_OUTPUT = 4
TP_RULES_FAIL_OPEN = 8
TP_RULES_ALLOW_DIRECT = 16
TP_RULES_NOTRACK = 32
TP_RULES_PERSIST = 64
TP_RULES_NEW_ONLY = 128
TP_RULES_LOCAL_SERVERS = 256

TP_BACKEND_AUTO = 0
TP_BACKEND_NFT = 1
TP_BACKEND_IPTABLES = 2

TP_PROTO_TCP = 1
TP_PROTO_UDP = 2
TP_FAMILY_IPV4 = 1
TP_FAMILY_IPV6 = 2

TP_SEVERITY_OK = 0
TP_SEVERITY_NOTE = 1
TP_SEVERITY_WARNING = 2
TP_SEVERITY_FAILURE = 3

TP_SET_DST = 1
TP_SET_SRC = 2
TP_SET_BYPASS = 3

TP_VERIFY_REPAIR = 1

TP_FORMAT_NFT = 1
TP_FORMAT_IPTABLES = 2

socklen_t = c_uint32


class sockaddr_storage(ctypes.Structure):
    """Room for any address: the family, then what belongs to it."""

    _fields_ = [("ss_family", c_uint16), ("data", c_uint8 * 118), ("align", ctypes.c_ulong)]


class tp_datagram(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("capacity", c_size_t),
        ("len", c_size_t),
        ("segment_len", c_uint32),
        ("flags", c_uint32),
        ("error", c_int32),
        ("client", sockaddr_storage),
        ("orig_dst", sockaddr_storage),
    ]


class tp_replier_config(ctypes.Structure):
    _fields_ = [("flags", c_uint32), ("max_sockets", c_uint32), ("idle_ms", c_uint32), ("reserved", c_uint32)]


class tp_replier_stats(ctypes.Structure):
    _fields_ = [
        ("sockets", c_uint64),
        ("hits", c_uint64),
        ("misses", c_uint64),
        ("raw", c_uint64),
        ("evictions", c_uint64),
        ("errors", c_uint64),
        ("sent", c_uint64),
    ]


class tp_port_range(ctypes.Structure):
    _fields_ = [("first", c_uint16), ("last", c_uint16), ("protocols", c_uint32)]


class tp_id_range(ctypes.Structure):
    _fields_ = [("first", c_uint32), ("last", c_uint32)]


class tp_mac(ctypes.Structure):
    _fields_ = [("addr", c_uint8 * 6)]


class tp_prefix(ctypes.Structure):
    _fields_ = [("family", c_uint8), ("len", c_uint8), ("reserved", c_uint8 * 2), ("addr", c_uint8 * 16)]


class tp_rules_config(ctypes.Structure):
    _fields_ = [
        ("name", c_char_p),
        ("listeners", POINTER(c_int)),
        ("n_listeners", c_size_t),
        ("listen_addr", POINTER(sockaddr_storage)),
        ("listen_addrlen", socklen_t),
        ("flags", c_uint32),
        ("backend", c_uint32),
        ("protocols", c_uint32),
        ("families", c_uint32),
        ("mark", c_uint32),
        ("mark_mask", c_uint32),
        ("table", c_uint32),
        ("priority", c_uint32),
        ("ports", POINTER(tp_port_range)),
        ("n_ports", c_size_t),
        ("dst", POINTER(tp_prefix)),
        ("n_dst", c_size_t),
        ("src", POINTER(tp_prefix)),
        ("n_src", c_size_t),
        ("bypass", POINTER(tp_prefix)),
        ("n_bypass", c_size_t),
        ("interfaces", POINTER(c_char_p)),
        ("n_interfaces", c_size_t),
        ("bypass_ports", POINTER(tp_port_range)),
        ("n_bypass_ports", c_size_t),
        ("bypass_src", POINTER(tp_prefix)),
        ("n_bypass_src", c_size_t),
        ("bypass_interfaces", POINTER(c_char_p)),
        ("n_bypass_interfaces", c_size_t),
        ("macs", POINTER(tp_mac)),
        ("n_macs", c_size_t),
        ("bypass_macs", POINTER(tp_mac)),
        ("n_bypass_macs", c_size_t),
        ("uids", POINTER(tp_id_range)),
        ("n_uids", c_size_t),
        ("bypass_uids", POINTER(tp_id_range)),
        ("n_bypass_uids", c_size_t),
        ("gids", POINTER(tp_id_range)),
        ("n_gids", c_size_t),
        ("bypass_gids", POINTER(tp_id_range)),
        ("n_bypass_gids", c_size_t),
        ("cgroups", POINTER(c_char_p)),
        ("n_cgroups", c_size_t),
        ("bypass_cgroups", POINTER(c_char_p)),
        ("n_bypass_cgroups", c_size_t),
        ("bypass_mark", c_uint32),
        ("bypass_mark_mask", c_uint32),
        ("reject_ports", POINTER(tp_port_range)),
        ("n_reject_ports", c_size_t),
    ]


class tp_finding(ctypes.Structure):
    _fields_ = [
        ("severity", c_uint32),
        ("id", c_char_p),
        ("message", c_char_p),
        ("impact", c_char_p),
        ("fix", c_char_p),
    ]


tp_finding_fn = ctypes.CFUNCTYPE(None, POINTER(tp_finding), c_void_p)


class tp_rules_stats(ctypes.Structure):
    _fields_ = [
        ("intercepted_packets", c_uint64),
        ("intercepted_bytes", c_uint64),
        ("diverted_packets", c_uint64),
        ("diverted_bytes", c_uint64),
        ("dropped_packets", c_uint64),
        ("dropped_bytes", c_uint64),
        ("direct_packets", c_uint64),
        ("direct_bytes", c_uint64),
    ]


class tp_instance(ctypes.Structure):
    _fields_ = [
        ("name", c_char_p),
        ("backend", c_uint32),
        ("flags", c_uint32),
        ("families", c_uint32),
        ("protocols", c_uint32),
        ("mark", c_uint32),
        ("mark_mask", c_uint32),
        ("table", c_uint32),
        ("priority", c_uint32),
        ("owner_pid", ctypes.c_int64),
        ("listen_addr", POINTER(sockaddr_storage)),
        ("listen_addrlen", socklen_t),
        ("stats", tp_rules_stats),
    ]


tp_instance_fn = ctypes.CFUNCTYPE(None, POINTER(tp_instance), c_void_p)


# The loader releases the GIL around every call, and keeps errno for the thread.
library = _library.load()


def _function(name: str, result: Any, *arguments: Any) -> Any:
    try:
        function = getattr(library, name)
    except AttributeError:
        raise ImportError(
            f"{library._name} has no {name}: it is older than this package, which needs a newer one"
        ) from None
    function.restype = result
    function.argtypes = arguments
    return function


# An address goes by a pointer to its bytes: c_void_p takes any struct, array or place in one.
# So do handles, which nobody looks into.
tp_socket = _function("tp_socket", c_int, c_int, c_int, c_int)
tp_set_transparent = _function("tp_set_transparent", c_int, c_int)
tp_bind_nonlocal = _function("tp_bind_nonlocal", c_int, c_int, c_void_p, socklen_t)
tp_listen = _function("tp_listen", c_int, c_void_p, socklen_t, c_int, c_uint32)
tp_connect_from = _function("tp_connect_from", c_int, c_void_p, socklen_t, c_void_p, socklen_t, c_uint32)
tp_connect_socket = _function("tp_connect_socket", c_int, c_int, c_void_p, socklen_t, c_void_p, socklen_t, c_uint32)
tp_accept = _function("tp_accept", c_int, c_int, c_void_p, POINTER(socklen_t), c_void_p, POINTER(socklen_t), c_uint32)
tp_orig_dst = _function("tp_orig_dst", c_int, c_int, c_void_p, POINTER(socklen_t))
tp_unmap_addr = _function("tp_unmap_addr", c_int, c_void_p, POINTER(socklen_t))

tp_recvfrom = _function(
    "tp_recvfrom",
    c_ssize_t,
    c_int,
    c_void_p,
    c_size_t,
    c_int,
    c_void_p,
    POINTER(socklen_t),
    c_void_p,
    POINTER(socklen_t),
)
tp_msg_orig_dst = _function("tp_msg_orig_dst", c_int, c_void_p, c_void_p, POINTER(socklen_t))
tp_recv_datagrams = _function("tp_recv_datagrams", c_int, c_int, POINTER(tp_datagram), c_uint, c_int)
tp_replier_open = _function("tp_replier_open", c_int, POINTER(tp_replier_config), c_size_t, POINTER(c_void_p))
tp_reply = _function("tp_reply", c_int, c_void_p, POINTER(tp_datagram), c_uint)
tp_replier_stats_ = _function("tp_replier_stats", c_int, c_void_p, POINTER(tp_replier_stats), c_size_t)
tp_replier_close = _function("tp_replier_close", None, c_void_p)

tp_install_rules = _function("tp_install_rules", c_int, POINTER(tp_rules_config), c_size_t, POINTER(c_void_p))
tp_remove_rules = _function("tp_remove_rules", c_int, c_void_p)
tp_forget_rules = _function("tp_forget_rules", None, c_void_p)
tp_replace_rules = _function("tp_replace_rules", c_int, c_void_p, POINTER(tp_rules_config), c_size_t)
tp_verify_rules = _function("tp_verify_rules", c_int, c_void_p, c_uint32)
tp_list_rules = _function("tp_list_rules", c_int, tp_instance_fn, c_void_p)
tp_purge_rules = _function("tp_purge_rules", c_int, c_char_p)
tp_update_rules = _function(
    "tp_update_rules", c_int, c_void_p, c_uint32, POINTER(tp_prefix), c_size_t, POINTER(tp_prefix), c_size_t
)
tp_learn_addresses = _function("tp_learn_addresses", c_int, c_void_p, c_uint32, POINTER(tp_prefix), c_size_t, c_uint32)
# C keeps structs and functions apart; here a function of a struct's name has a '_' after it.
tp_rules_stats_ = _function("tp_rules_stats", c_int, c_void_p, POINTER(tp_rules_stats), c_size_t)
tp_read_stats = _function("tp_read_stats", c_int, c_char_p, POINTER(tp_rules_stats), c_size_t)
tp_render_rules = _function(
    "tp_render_rules", c_int, POINTER(tp_rules_config), c_size_t, c_uint32, c_void_p, POINTER(c_size_t)
)

tp_check = _function("tp_check", c_int, tp_finding_fn, c_void_p)
tp_self_test = _function("tp_self_test", c_int, POINTER(tp_rules_config), c_size_t, tp_finding_fn, c_void_p)

tp_last_error = _function("tp_last_error", c_char_p)
tp_version = _function("tp_version", c_char_p)
