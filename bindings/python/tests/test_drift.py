"""The ctypes layer agrees with the header as the C compiler reads it."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from net import limit

from tproxy import _ctypes as c

HEADER = Path(__file__).parents[3] / "include" / "tproxy.h"
# Comments contain names too.
TEXT = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)

CONSTANTS = re.findall(r"^#define (TP_\w+) ", TEXT, re.MULTILINE)
STRUCTS = re.findall(r"^struct (tp_\w+) \{(.*?)^\};", TEXT, re.MULTILINE | re.DOTALL)
FUNCTIONS = re.findall(r"^([a-z][\w ]*?[ *])(tp_\w+)\(([^;]*?)\);", TEXT, re.MULTILINE)


def fields(body: str) -> list[str]:
    return re.findall(r"(\w+)(?:\[\d+\])?;", body)


def compiled(directory: Path, *statements: str) -> list[str]:
    """Compiles a C program with these statements; gives the lines that it prints."""
    source = directory / "probe.c"
    includes = ["#include <stdio.h>", "#include <stddef.h>", f'#include "{HEADER}"']
    source.write_text("\n".join([*includes, "int main(void) {", *statements, "return 0; }"]))
    subprocess.run(
        ["cc", "-std=c11", "-Wall", "-Werror", "-o", directory / "probe", source], check=True, timeout=limit(60)
    )
    output = subprocess.run([directory / "probe"], check=True, capture_output=True, text=True, timeout=limit(60)).stdout
    return output.splitlines()


def raw_function(name: str) -> Any:
    """The declaration of a function, which has a '_' after it where a struct has the name."""
    return getattr(c, name + "_") if name in dict(STRUCTS) else getattr(c, name)


def test_header_patterns_find_known_names() -> None:
    """The patterns above find names that the header has."""
    assert {"TP_NONBLOCK", "TP_FORMAT_IPTABLES"} <= set(CONSTANTS)
    assert fields(dict(STRUCTS)["tp_port_range"]) == ["first", "last", "protocols"]
    assert fields(dict(STRUCTS)["tp_prefix"]) == ["family", "len", "reserved", "addr"]
    exported = (HEADER.parents[1] / "tests/c/symbols.txt").read_text().split()
    assert sorted(name for _, name, _ in FUNCTIONS) == exported


def test_ctypes_constants_equal_header(tmp_path: Path) -> None:
    values = compiled(tmp_path, *(f'printf("%lld\\n", (long long)({name}));' for name in CONSTANTS))
    ours = {name: value for name, value in vars(c).items() if name.startswith("TP_")}
    assert ours == dict(zip(CONSTANTS, map(int, values)))


def test_ctypes_structs_equal_header(tmp_path: Path) -> None:
    """Every size, offset and width; and no struct or member too few or too many."""
    names = {name: fields(body) for name, body in STRUCTS}
    names["sockaddr_storage"] = ["ss_family"]
    statements = []
    for struct, members in names.items():
        statements.append(f'printf("{struct} %zu %zu\\n", sizeof(struct {struct}), _Alignof(struct {struct}));')
        for member in members:
            place = f"offsetof(struct {struct}, {member}), sizeof(((struct {struct} *)0)->{member})"
            statements.append(f'printf("{struct}.{member} %zu %zu\\n", {place});')
    ours = []
    for struct, members in names.items():
        cls = getattr(c, struct)
        ours.append(f"{struct} {ctypes.sizeof(cls)} {ctypes.alignment(cls)}")
        ours += [f"{struct}.{member} {getattr(cls, member).offset} {getattr(cls, member).size}" for member in members]
    assert ours == compiled(tmp_path, *statements)
    declared: dict[str, Any] = {
        name: value
        for name, value in vars(c).items()
        if isinstance(value, type) and issubclass(value, ctypes.Structure) and name.startswith("tp_")
    }
    assert sorted(declared) == sorted(name for name, _ in STRUCTS)
    for name, cls in declared.items():
        assert [field[0] for field in cls._fields_] == names[name], name


# The ctypes type for each type of a struct member in the header; arrays appear as pointers.
MEMBERS: dict[str, Any] = {
    "unsigned char": ctypes.c_uint8,
    "unsigned char *": ctypes.c_uint8,
    "unsigned short": ctypes.c_uint16,
    "int": ctypes.c_int,
    "unsigned int": ctypes.c_uint32,
    "unsigned long": ctypes.c_size_t,
    "long": ctypes.c_int64,
    "void *": ctypes.c_void_p,
    "const char *": ctypes.c_char_p,
    "const char *const *": ctypes.POINTER(ctypes.c_char_p),
    "const int *": ctypes.POINTER(ctypes.c_int),
    "const struct sockaddr *": ctypes.POINTER(c.sockaddr_storage),
    "const struct tp_port_range *": ctypes.POINTER(c.tp_port_range),
    "const struct tp_prefix *": ctypes.POINTER(c.tp_prefix),
    "const struct tp_id_range *": ctypes.POINTER(c.tp_id_range),
    "const struct tp_mac *": ctypes.POINTER(c.tp_mac),
    "struct sockaddr_storage": c.sockaddr_storage,
    "struct tp_rules_stats": c.tp_rules_stats,
}


def test_ctypes_members_equal_header(tmp_path: Path) -> None:
    """The types of the members: another sign or another pointee would have the same size."""
    generic = ", ".join(f'{kind}: "{kind}"' for kind in MEMBERS)
    places = [(struct, member) for struct, body in STRUCTS for member in fields(body)]
    kinds = compiled(tmp_path, *(f"puts(_Generic(((struct {s} *)0)->{m}, {generic}));" for s, m in places))
    assert len(kinds) == len(places)
    for (struct, member), kind in zip(places, kinds):
        ours = dict(getattr(c, struct)._fields_)[member]
        ours = ours._type_ if issubclass(ours, ctypes.Array) else ours
        assert ours is MEMBERS[kind], f"{struct}.{member} is {kind}, and not {ours}"


def test_ctypes_callback_equals_header(tmp_path: Path) -> None:
    prototype = "void (*)(const struct tp_finding *, void *)"
    assert compiled(tmp_path, f'puts(_Generic((tp_finding_fn)0, {prototype}: "same", default: "other"));') == ["same"]
    assert c.tp_finding_fn._restype_ is None
    assert list(c.tp_finding_fn._argtypes_) == [ctypes.POINTER(c.tp_finding), ctypes.c_void_p]


def test_ctypes_names_equal_header() -> None:
    functions = {name for name, value in vars(c).items() if isinstance(value, ctypes._CFuncPtr)}  # type: ignore[attr-defined]
    in_c = {name + "_" if name in dict(STRUCTS) else name for _, name, _ in FUNCTIONS}
    assert functions == in_c


# The ctypes type for each type that _Generic can name.
SCALARS = {
    "int": ctypes.c_int,
    "unsigned int": ctypes.c_uint32,
    "long": ctypes.c_ssize_t,
    "unsigned long": ctypes.c_size_t,
}


def c_type(text: str) -> str:
    """An argument's type, without its name."""
    return re.sub(
        r"\b(const|struct)\b", r"\1", re.sub(r"(\w+)\s*$", "", text) if not text.endswith("*") else text
    ).strip()


def test_ctypes_prototypes_equal_header(tmp_path: Path) -> None:
    """Results and arguments, by the kind and width that the compiler reports."""
    generic = ", ".join([*(f'{scalar}: "{scalar}"' for scalar in SCALARS), 'default: "pointer"'])
    statements, expected = [], []
    for result, name, arguments in FUNCTIONS:
        function = raw_function(name)
        listed = [] if arguments.strip() == "void" else [c_type(" ".join(a.split())) for a in arguments.split(",")]
        assert len(function.argtypes) == len(listed), name
        for text, ours in zip([" ".join(result.split()), *listed], [function.restype, *function.argtypes]):
            value = "puts" if text == "void" else f"{text} v = 0; (void)v; puts"
            kind = '"void"' if text == "void" else f"_Generic(v, {generic})"
            statements.append(f"{{ {value}({kind}); }}")
            expected.append((name, text, ours))
    for (name, text, ours), kind in zip(expected, compiled(tmp_path, *statements)):
        if kind == "void":
            assert ours is None, name
        elif kind == "pointer":
            check_pointer(text, ours)
        else:
            assert ours is SCALARS[kind], f"{name}: {text} is {kind}, and not {ours}"


def check_pointer(text: str, ours: Any) -> None:
    """A pointer to a known type is declared as such; bytes, addresses and handles are c_void_p."""
    pointee = text.replace("const ", "").replace("struct ", "").replace(" ", "")
    exact: dict[str, Any] = {
        "char*": (ctypes.c_char_p, ctypes.c_void_p),
        "size_t*": (ctypes.POINTER(ctypes.c_size_t),),
        "socklen_t*": (ctypes.POINTER(c.socklen_t),),
        "tp_rules**": (ctypes.POINTER(ctypes.c_void_p),),
        "tp_replier**": (ctypes.POINTER(ctypes.c_void_p),),
    }
    for opaque in ("void*", "sockaddr*", "msghdr*", "tp_rules*", "tp_replier*"):
        exact[opaque] = (ctypes.c_void_p,)
    exact["tp_finding_fn"] = (c.tp_finding_fn,)
    exact["tp_instance_fn"] = (c.tp_instance_fn,)
    for struct, _ in STRUCTS:
        exact[struct + "*"] = (ctypes.POINTER(getattr(c, struct)),)
    assert ours in exact[pointee], f"{text} is not {ours}"


def test_ctypes_comparison_rejects_difference(tmp_path: Path) -> None:
    """The comparison itself notices a wrong width."""
    with pytest.raises(AssertionError):
        check_pointer("struct tp_prefix *", ctypes.POINTER(c.tp_port_range))
    assert compiled(tmp_path, 'puts(_Generic((uint32_t)0, unsigned int: "u32", default: "other"));') == ["u32"]
