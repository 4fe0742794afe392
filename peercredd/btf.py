"""Where members are inside the running kernel's structs, read from its own BTF.

The BPF programs are compiled without kernel headers; the offsets found here are
given to the compiler as macros. A member is asked for by name, never by kernel
version.
"""

from __future__ import annotations

import ctypes
import errno
from typing import NamedTuple

from peercredd.libbpf import KernelError, check, library

# Of the enum in include/uapi/linux/btf.h.
_KIND_POINTER, _KIND_STRUCT, _KIND_UNION, _KIND_FUNCTION = 2, 4, 5, 12
# Kinds that only name or qualify another type: typedef, volatile, const,
# restrict and type tag.
_TRANSPARENT = {8, 9, 10, 11, 18}


class Member(NamedTuple):
    """Where a member is."""

    offset: int
    """Bytes from the start of the outermost struct, rounded down for a bitfield."""
    bit: int
    """First bit within that byte."""


class MemberMissing(KernelError):  # noqa: N818 - a fact, not always an error
    """This kernel's struct has no such member."""


class Prototype(NamedTuple):
    """What a kernel function takes and gives, in C."""

    parameters: tuple[tuple[str, str], ...]
    """Type and name of each, in their order."""
    result: str


class FunctionMissing(KernelError):  # noqa: N818 - a fact, not always an error
    """This kernel has no such function, or none that can be traced."""


class _Type(ctypes.Structure):
    _fields_ = (
        ("name_offset", ctypes.c_uint32),
        ("info", ctypes.c_uint32),
        ("size_or_type", ctypes.c_uint32),
    )

    @property
    def kind(self) -> int:
        return int(self.info) >> 24 & 0x1F


class _Member(ctypes.Structure):
    _fields_ = (
        ("name_offset", ctypes.c_uint32),
        ("type", ctypes.c_uint32),
        ("offset", ctypes.c_uint32),
    )


class _Parameter(ctypes.Structure):
    _fields_ = (("name_offset", ctypes.c_uint32), ("type", ctypes.c_uint32))


class KernelTypes:
    """The types of the running kernel."""

    def __init__(self) -> None:
        """Read /sys/kernel/btf/vmlinux.

        Raises:
            KernelError: the kernel has no BTF.
        """
        self._bpf = library()
        self._bpf.btf__load_vmlinux_btf.restype = ctypes.c_void_p
        self._bpf.btf__type_by_id.restype = ctypes.POINTER(_Type)
        self._bpf.btf__name_by_offset.restype = ctypes.c_char_p
        self._btf = ctypes.c_void_p(self._bpf.btf__load_vmlinux_btf())
        if not self._btf:
            raise KernelError(
                ctypes.get_errno() or errno.ENOENT,
                "the kernel's types cannot be read from /sys/kernel/btf/vmlinux; "
                "peercredd needs a kernel built with CONFIG_DEBUG_INFO_BTF=y",
            )

    def size(self, struct: str) -> int:
        """Size of a struct in bytes.

        Raises:
            MemberMissing: this kernel has no such struct.
        """
        return int(self._type(self._struct(struct)).size_or_type)

    def member(self, path: str) -> Member:
        """Where ``struct.member.member`` is; anonymous members are seen through.

        Raises:
            MemberMissing: this kernel has no such struct or member.
        """
        struct, *names = path.split(".")
        type_id, bits = self._struct(struct), 0
        for name in names:
            found = self._find(type_id, name)
            if found is None:
                raise MemberMissing(errno.ENOENT, f"this kernel has no {path}")
            bits += found[0]
            type_id = found[1]
        return Member(bits // 8, bits % 8)

    def function(self, name: str) -> int:
        """The number of a kernel function.

        Raises:
            FunctionMissing: this kernel has none of that name, or the compiler has
                inlined it wherever it is called.
        """
        found = self._bpf.btf__find_by_name_kind(self._btf, name.encode(), _KIND_FUNCTION)
        if found == -errno.ENOENT:
            raise FunctionMissing(
                errno.ENOENT, f"this kernel has no function {name}, or has inlined it"
            )
        return check(found, f"find {name}")

    def prototype(self, function: str) -> Prototype:
        """The parameters and the result of a kernel function; raises FunctionMissing."""
        signature = self._type(self._type(self.function(function)).size_or_type)
        first = ctypes.addressof(signature) + ctypes.sizeof(_Type)
        parameters = (_Parameter * (int(signature.info) & 0xFFFF)).from_address(first)
        return Prototype(
            tuple((self._in_c(each.type), self._name(each.name_offset)) for each in parameters),
            self._in_c(int(signature.size_or_type)),
        )

    def _in_c(self, type_id: int) -> str:
        """A type as C writes it: pointers, structs and what has a name of its own."""
        kind = self._type(type_id)
        if kind.kind == _KIND_POINTER:
            inner = self._in_c(int(kind.size_or_type))
            return f"{inner}*" if inner.endswith("*") else f"{inner} *"
        name = self._name(kind.name_offset)
        return f"struct {name}" if kind.kind == _KIND_STRUCT else name or "void"

    def _name(self, offset: int) -> str:
        name: bytes = self._bpf.btf__name_by_offset(self._btf, offset)
        return name.decode()

    def _struct(self, name: str) -> int:
        result = self._bpf.btf__find_by_name_kind(self._btf, name.encode(), _KIND_STRUCT)
        if result == -errno.ENOENT:
            raise MemberMissing(errno.ENOENT, f"this kernel has no struct {name}")
        return check(result, f"find struct {name}")

    def _type(self, type_id: int) -> _Type:
        kind: _Type = self._bpf.btf__type_by_id(self._btf, type_id).contents
        return kind

    def _find(self, type_id: int, name: str) -> tuple[int, int] | None:
        """Bit offset and type of a member."""
        kind = self._type(type_id)
        while kind.kind in _TRANSPARENT:
            type_id = int(kind.size_or_type)
            kind = self._type(type_id)
        if kind.kind not in (_KIND_STRUCT, _KIND_UNION):
            return None
        count = int(kind.info) & 0xFFFF
        has_bitfields = int(kind.info) >> 31
        first = ctypes.addressof(kind) + ctypes.sizeof(_Type)
        for member in (_Member * count).from_address(first):
            offset = int(member.offset) & 0xFFFFFF if has_bitfields else int(member.offset)
            if member.name_offset:
                if self._name(member.name_offset) == name:
                    return offset, int(member.type)
            elif inner := self._find(int(member.type), name):
                return offset + inner[0], inner[1]
        return None
