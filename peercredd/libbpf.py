"""The few calls of libbpf that peercredd makes, typed; each raises KernelError where it fails.

libbpf comes with BCC (Debian's libbpfcc depends on it), so nothing more need be
installed; loading it costs the server less than a megabyte.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

# PyDLL keeps the interpreter lock: these calls take a microsecond or so, and
# giving the lock back and forth would cost more than the call.
_libbpf: ctypes.PyDLL | None = None

BPF_ANY = 0
BPF_NOEXIST = 1
BPF_F_RDONLY = 1 << 3
BPF_PROG_TYPE_TRACING = 26
_BPF_LINK_TYPE_TRACING = 2
_BPF_STATS_RUN_TIME = 0
_LOG_BYTES = 16 << 20
_LICENSE = b"Dual MIT/GPL"


class KernelError(OSError):
    """The kernel, or what is needed to use it, does not do its part; the text says what."""


class Rejected(KernelError):  # noqa: N818 - by the kernel's verifier
    """A program was not loaded. `log` is what the verifier said about it."""

    def __init__(self, number: int, log: str) -> None:
        super().__init__(number, os.strerror(number))
        self.log = log


class MapShape(NamedTuple):
    """All that a map is made from, but its name (struct bpf_map_info)."""

    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    key_type: int
    """Of the key in the BTF that comes with it; 0 where it does not say."""
    value_type: int


def library() -> ctypes.PyDLL:
    """Libbpf itself.

    Raises:
        KernelError: it is not installed.
    """
    global _libbpf
    if _libbpf is None:
        try:
            _libbpf = ctypes.PyDLL("libbpf.so.1", use_errno=True)
        except OSError as error:
            raise KernelError(
                errno.ENOENT, f"libbpf.so.1 cannot be loaded ({error}); install the package libbpf1"
            ) from error
    return _libbpf


def check(result: int, what: str) -> int:
    """The result of a call that is negative on failure.

    Raises:
        KernelError: it was negative.
    """
    if result < 0:
        raise _failure(ctypes.get_errno() or -result, what)
    return result


def _failure(number: int, what: str) -> KernelError:
    return KernelError(number, f"{what}: {os.strerror(number)}")


class _ObjGetOpts(ctypes.Structure):
    _fields_ = (("sz", ctypes.c_size_t), ("file_flags", ctypes.c_uint32))


class _MapInfo(ctypes.Structure):
    # struct bpf_map_info of include/uapi/linux/bpf.h, as far as it is read here.
    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("key_size", ctypes.c_uint32),
        ("value_size", ctypes.c_uint32),
        ("max_entries", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("left_out", ctypes.c_uint32 * 10),
        ("types_id", ctypes.c_uint32),
        ("key_type", ctypes.c_uint32),
        ("value_type", ctypes.c_uint32),
    )


class _TypesInfo(ctypes.Structure):
    # struct bpf_btf_info.
    _fields_ = (("data", ctypes.c_uint64), ("size", ctypes.c_uint32), ("id", ctypes.c_uint32))


class _MapOptions(ctypes.Structure):
    # struct bpf_map_create_opts of libbpf's bpf.h, as far as it is set here.
    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("types", ctypes.c_uint32),
        ("key_type", ctypes.c_uint32),
        ("value_type", ctypes.c_uint32),
        ("left_out", ctypes.c_uint32 * 2),
        ("flags", ctypes.c_uint32),
    )


class _LoadOptions(ctypes.Structure):
    # struct bpf_prog_load_opts of libbpf's bpf.h, as far as it is set here.
    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("attempts", ctypes.c_int),
        ("attach_type", ctypes.c_uint32),
        ("left_out", ctypes.c_uint32 * 4),
        ("function", ctypes.c_uint32),
        ("left_out_too", ctypes.c_uint32 * 2),
        ("pointers_left_out", ctypes.c_uint64 * 5),
        ("log_level", ctypes.c_uint32),
        ("log_size", ctypes.c_uint32),
        ("log", ctypes.c_char_p),
    )


class _LinkInfo(ctypes.Structure):
    # struct bpf_link_info with the cgroup member of its union.
    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("program_id", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
        ("cgroup_id", ctypes.c_uint64),
        ("attach_type", ctypes.c_uint32),
    )


class _ProgramInfo(ctypes.Structure):
    # struct bpf_prog_info; what is not read here is left out.
    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("left_out", ctypes.c_uint64 * 23),
        ("run_time_ns", ctypes.c_uint64),
        ("run_count", ctypes.c_uint64),
        ("recursion_misses", ctypes.c_uint64),
    )


def pin(file_descriptor: int, path: Path) -> None:
    """Pin a map, program or link at `path` in a bpffs."""
    check(library().bpf_obj_pin(file_descriptor, bytes(path)), f"pin {path}")


def get_pinned(path: Path, *, read_only: bool = False) -> int:
    """A file descriptor of the object pinned at `path`; the caller closes it.

    A link can only be had with `read_only` false (kernel/bpf/inode.c).
    """
    options = _ObjGetOpts(ctypes.sizeof(_ObjGetOpts), BPF_F_RDONLY if read_only else 0)
    return check(library().bpf_obj_get_opts(bytes(path), ctypes.byref(options)), f"open pin {path}")


def shape_of(file_descriptor: int) -> tuple[MapShape, int]:
    """What a map was made from, and the id of the types that it was made with; 0 if none."""
    info = _map_info(file_descriptor)
    return MapShape(
        info.type,
        info.key_size,
        info.value_size,
        info.max_entries,
        info.flags,
        info.key_type,
        info.value_type,
    ), int(info.types_id)


def types_of(identity: int) -> bytes:
    """The BTF of that id."""
    descriptor = check(library().bpf_btf_get_fd_by_id(ctypes.c_uint32(identity)), "open types")
    try:
        info = _TypesInfo()
        for _ in range(2):  # the second time there is room for them
            data = ctypes.create_string_buffer(info.size)
            info.data = ctypes.addressof(data)
            _read_info(descriptor, info, "types")
    finally:
        os.close(descriptor)
    return data.raw


def load_types(data: bytes) -> int:
    """A descriptor of BTF that is handed to the kernel."""
    return check(library().bpf_btf_load(data, ctypes.c_size_t(len(data)), None), "load types")


def create_map(name: str, shape: MapShape, types: int) -> int:
    """A descriptor of a new map, whose keys and values `types` describes."""
    options = _MapOptions(
        sz=ctypes.sizeof(_MapOptions),
        types=types if shape.value_type else 0,
        key_type=shape.key_type,
        value_type=shape.value_type,
        flags=shape.flags,
    )
    made = library().bpf_map_create(
        shape.type,
        name.encode(),
        ctypes.c_uint32(shape.key_size),
        ctypes.c_uint32(shape.value_size),
        ctypes.c_uint32(shape.max_entries),
        ctypes.byref(options),
    )
    return check(made, f"make the map {name}")


def find_function(name: str, attach_type: int) -> int:
    """The number by which a tracing program asks for a kernel function."""
    found = library().libbpf_find_vmlinux_btf_id(name.encode(), attach_type)
    return check(found, f"find {name}()")


def load_program(
    name: str, instructions: bytes, program_type: int, attach_type: int, function: int = 0
) -> int:
    """A descriptor of a program that the kernel has verified.

    Raises:
        Rejected: it has objections.
    """

    def load(log: ctypes.Array[ctypes.c_char] | None) -> int:
        options = _LoadOptions(
            sz=ctypes.sizeof(_LoadOptions),
            attach_type=attach_type,
            function=function,
            log_level=1 if log else 0,
            log_size=len(log) if log else 0,
            log=ctypes.cast(log, ctypes.c_char_p) if log else None,
        )
        loaded: int = library().bpf_prog_load(
            program_type,
            name.encode(),
            _LICENSE,
            instructions,
            ctypes.c_size_t(len(instructions) // 8),
            ctypes.byref(options),
        )
        return loaded

    if (descriptor := load(None)) >= 0:
        return descriptor
    log = ctypes.create_string_buffer(_LOG_BYTES)
    if (descriptor := load(log)) >= 0:
        return descriptor
    raise Rejected(ctypes.get_errno() or -descriptor, log.value.decode(errors="backslashreplace"))


def attach_to_cgroup(program: int, cgroup: int, attach_type: int) -> int:
    """Attach a program to a cgroup beside whatever is there; a link's file descriptor.

    The attachment lives as long as the descriptor or a pin of it does.
    """
    return check(
        library().bpf_link_create(program, cgroup, attach_type, None), "attach to the cgroup"
    )


def attach_to_function(program: int, function: str) -> int:
    """Attach a tracing program to the kernel function it was loaded for; a link's descriptor."""
    return check(library().bpf_raw_tracepoint_open(None, program), f"attach to {function}()")


def replace_program(link: int, program: int) -> None:
    """Let a cgroup's link run another program from now on: each event meets one of the two."""
    check(library().bpf_link_update(link, program, None), "replace an attached program")


def detach_link(link: int) -> None:
    """Undo an attachment now, whoever else holds the link.

    That of a tracing program cannot be: it ends with the link's last holder.
    """
    if _link_info(link).type != _BPF_LINK_TYPE_TRACING:
        check(library().bpf_link_detach(link), "detach from the cgroup")


def link_cgroup_id(link: int) -> int | None:
    """Id of the cgroup that a link's program is attached to; 0 once it is detached.

    None for a tracing program: it has no such place, and stays as long as its link.
    """
    info = _link_info(link)
    return None if info.type == _BPF_LINK_TYPE_TRACING else int(info.cgroup_id)


def program_of(link: int) -> int:
    """A file descriptor of the program that a link attaches."""
    identity = ctypes.c_uint32(_link_info(link).program_id)
    return check(library().bpf_prog_get_fd_by_id(identity), "open an attached program")


def run_count(program: int) -> int:
    """How often a program has run while the kernel was counting."""
    return int(_program_info(program)[0].run_count)


def missed_count(program: int) -> int | None:
    """How often the kernel skipped a program because it was running on that CPU already.

    None for a program that it never skips, and where it does not tell (before 5.12,
    9ed9e9ba2337).
    """
    info, size = _program_info(program)
    if info.type != BPF_PROG_TYPE_TRACING or size < ctypes.sizeof(info):
        return None
    return int(info.recursion_misses)


@contextmanager
def counting_runs() -> Iterator[None]:
    """Have the kernel count the runs of all programs meanwhile."""
    descriptor = check(library().bpf_enable_stats(_BPF_STATS_RUN_TIME), "count runs of programs")
    try:
        yield
    finally:
        os.close(descriptor)


def can_trace() -> bool:
    """Whether this kernel takes tracing programs at all, as far as trying shows."""
    return bool(library().libbpf_probe_bpf_prog_type(BPF_PROG_TYPE_TRACING, None) == 1)


def _read_info(file_descriptor: int, info: ctypes.Structure, what: str) -> int:
    """Let the kernel fill in what it knows of an object; how many bytes of that it knows."""
    size = ctypes.c_uint32(ctypes.sizeof(info))
    check(
        library().bpf_obj_get_info_by_fd(file_descriptor, ctypes.byref(info), ctypes.byref(size)),
        f"read {what}",
    )
    return size.value


def _map_info(file_descriptor: int) -> _MapInfo:
    info = _MapInfo()
    _read_info(file_descriptor, info, "a map's shape")
    return info


def _link_info(link: int) -> _LinkInfo:
    info = _LinkInfo()
    _read_info(link, info, "the state of an attachment")
    return info


def _program_info(program: int) -> tuple[_ProgramInfo, int]:
    """What the kernel says of a program, and how many bytes of that it knows."""
    info = _ProgramInfo()
    return info, _read_info(program, info, "the state of a program")


# libbpf returns the error as well; having errno kept would be a tenth of a lookup.
_WithoutErrno = ctypes.PYFUNCTYPE(ctypes.c_int)


class Map:
    """A BPF map by its file descriptor, keys and values as bytes.

    Every method raises KernelError on what is not an answer.
    """

    def __init__(self, file_descriptor: int) -> None:
        """Take over `file_descriptor`."""
        self.file_descriptor = file_descriptor
        info = _map_info(file_descriptor)
        self.key_size = int(info.key_size)
        self.value_size = int(info.value_size)
        self.max_entries = int(info.max_entries)
        self._value_type = ctypes.c_char * self.value_size
        self._lookup = _WithoutErrno(("bpf_map_lookup_elem", library()))

    @classmethod
    def open(cls, path: Path, *, writable: bool = False) -> Map:
        """The map pinned at `path`."""
        return cls(get_pinned(path, read_only=not writable))

    def close(self) -> None:
        """Give the file descriptor back."""
        os.close(self.file_descriptor)

    def lookup(self, key: bytes) -> bytes | None:
        """The value of `key`, or None."""
        value = self._value_type()
        result: int = self._lookup(self.file_descriptor, key, value)
        if result == 0:
            return value.raw
        if result != -errno.ENOENT:
            raise _failure(-result, "look up a key")
        return None

    def update(self, key: bytes, value: bytes, *, exclusive: bool = False) -> bool:
        """Write an entry. With `exclusive`, False if the key is there already."""
        flags = BPF_NOEXIST if exclusive else BPF_ANY
        result: int = library().bpf_map_update_elem(
            self.file_descriptor, key, value, ctypes.c_uint64(flags)
        )
        if result < 0 and ctypes.get_errno() == errno.EEXIST:
            return False
        check(result, "write a map entry")
        return True

    def delete(self, key: bytes) -> bool:
        """Remove an entry; False if there was none."""
        result: int = library().bpf_map_delete_elem(self.file_descriptor, key)
        if result == 0:
            return True
        self._absent(result, "delete a map entry")
        return False

    def take(self, key: bytes) -> bytes | None:
        """Remove an entry and return the value that it had, in one step."""
        value = self._value_type()
        result: int = library().bpf_map_lookup_and_delete_elem(self.file_descriptor, key, value)
        if result == 0:
            return value.raw
        self._absent(result, "take a map entry")
        return None

    def keys(self) -> Iterator[bytes]:
        """The keys of all entries that are there throughout; others may appear or not."""
        for keys, _, count in self._batches(256):
            yield from _slices(keys, self.key_size, count)

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """All entries that are there throughout; others may appear or not."""
        for keys, values, count in self._batches(256):
            yield from zip(
                _slices(keys, self.key_size, count),
                _slices(values, self.value_size, count),
                strict=True,
            )

    def pages(self, size: int) -> Iterator[Iterator[bytes]]:
        """The values of all entries that are there throughout, about so many at a time."""
        for _, values, count in self._batches(size):
            yield _slices(values, self.value_size, count)

    def count(self) -> int:
        """Number of entries, counted: the kernel keeps no figure."""
        return sum(count for _, _, count in self._batches(1024))

    def _batches(self, size: int) -> Iterator[tuple[bytes, bytes, int]]:
        """Keys, values and their number, at most about `size` at a time.

        A hash table is read bucket by bucket, so no entry comes twice
        (__htab_map_lookup_and_delete_batch in kernel/bpf/hashtab.c).
        """
        lookup_batch = library().bpf_map_lookup_batch
        position = None
        while True:
            next_position = ctypes.create_string_buffer(max(self.key_size, 4))
            keys = ctypes.create_string_buffer(self.key_size * size)
            values = ctypes.create_string_buffer(self.value_size * size)
            count = ctypes.c_uint32(size)
            result = lookup_batch(
                self.file_descriptor,
                position,
                next_position,
                keys,
                values,
                ctypes.byref(count),
                None,
            )
            failure = ctypes.get_errno() if result < 0 else 0
            if failure == errno.ENOSPC:  # a bucket holds more
                size *= 2
                continue
            if failure not in (0, errno.ENOENT):
                check(result, "read a map")
            batch = keys.raw, values.raw, count.value
            # Who reads slowly keeps one copy of it.
            del keys, values
            yield batch
            if failure == errno.ENOENT:
                return
            position = next_position

    def of_each_cpu(self, key: bytes) -> list[bytes]:
        """The values of `key` in a per-CPU map; of CPUs that may come, too."""
        size = (self.value_size + 7) & ~7  # as bpf_map_value_size() in kernel/bpf/syscall.c
        values = ctypes.create_string_buffer(size * library().libbpf_num_possible_cpus())
        if result := self._lookup(self.file_descriptor, key, values):
            raise _failure(-result, "read a map")
        return [
            values.raw[start : start + self.value_size] for start in range(0, len(values), size)
        ]

    def _absent(self, result: int, what: str) -> None:
        if ctypes.get_errno() != errno.ENOENT:
            check(result, what)


_Sample = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class RingBuffer:
    """What BPF programs write into a ring buffer, in their order; one reader at a time."""

    LIMIT = 128
    """Who writes on and on must not keep the reader for ever, nor for long."""

    def __init__(self, file_descriptor: int) -> None:
        """Map the buffer of a descriptor, which stays the caller's.

        Raises:
            KernelError: it cannot be mapped.
        """
        self._samples: list[bytes] = []
        self._callback = _Sample(self._take)
        bpf = library()
        bpf.ring_buffer__new.restype = ctypes.c_void_p
        self._buffer = ctypes.c_void_p(
            bpf.ring_buffer__new(file_descriptor, self._callback, None, None)
        )
        if not self._buffer:
            check(-1, "map a ring buffer")
        self._epoll = int(bpf.ring_buffer__epoll_fd(self._buffer))

    def fileno(self) -> int:
        """A descriptor that is readable when there is something to read."""
        return self._epoll

    def read(self) -> list[bytes]:
        """What has been written since the last time, at most `LIMIT` samples of it.

        Raises:
            KernelError: the buffer cannot be read.
        """
        result = library().ring_buffer__consume(self._buffer)
        samples, self._samples = self._samples, []
        if len(samples) < self.LIMIT:
            check(result, "read a ring buffer")
        return samples

    def close(self) -> None:
        """Unmap it."""
        library().ring_buffer__free(self._buffer)

    def _take(self, _: int | None, data: int, size: int) -> int:
        self._samples.append(ctypes.string_at(data, size))
        return 0 if len(self._samples) < self.LIMIT else -errno.ECANCELED


def _slices(data: bytes, size: int, count: int) -> Iterator[bytes]:
    for offset in range(0, size * count, size):
        yield data[offset : offset + size]
