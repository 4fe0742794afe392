"""BPF maps of a test's own, like those of a capture but without one."""

from __future__ import annotations

import ctypes

from peercredd.libbpf import Map, check, library

HASH = 1
ARRAY = 2
_NO_PREALLOC = 1 << 0


class _CreateOptions(ctypes.Structure):
    # struct bpf_map_create_opts of bpf/bpf.h, up to its map_flags.
    _fields_ = (
        ("size", ctypes.c_size_t),
        ("type_ids", ctypes.c_uint32 * 4),
        ("inner_map", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
    )


def create(kind: int, key_size: int, value_size: int, max_entries: int) -> Map:
    """A new map; a hash table takes memory as it fills, as those of a capture do."""
    options = _CreateOptions(
        size=ctypes.sizeof(_CreateOptions), map_flags=_NO_PREALLOC if kind == HASH else 0
    )
    return Map(
        check(
            library().bpf_map_create(
                kind, b"test", key_size, value_size, max_entries, ctypes.byref(options)
            ),
            "create a map",
        )
    )
