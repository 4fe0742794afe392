"""What the compiler makes of the BPF sources, free of the process and of the maps it made it with.

So it can be kept: compiling takes the most of a start. Whatever is kept, the kernel
verifies it anew each time.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import stat
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from peercredd.libbpf import MapShape, create_map, get_pinned, load_types

_KEPT = 8
"""Programs of an earlier kernel or version are of use to somebody who goes back."""

_LOAD_64_BITS = 0x18  # BPF_LD | BPF_DW | BPF_IMM, of two instructions
_MAP_DESCRIPTOR = 1  # BPF_PSEUDO_MAP_FD, in the upper half of the registers
_CALL = 0x85  # BPF_JMP | BPF_CALL
_KERNEL_FUNCTION = 2  # BPF_PSEUDO_KFUNC_CALL, likewise
_SIZE = 8

KERNEL_FUNCTIONS = 1 << 24
"""Behind the numbers of all helpers, which is what the compiler can call: this plus a number of the
kernel's BTF stands for that function (kfunc)."""


class Instructions(NamedTuple):
    """A program; where it refers to a map there is 0."""

    code: bytes
    maps: tuple[tuple[int, str], ...]
    """Offset in `code` of each reference, and the map's name."""

    @classmethod
    def of(cls, code: bytes, names: Mapping[int, str]) -> Instructions:
        """Take the maps' descriptors, of which `names` tells the names, out of a program.

        Calls from `KERNEL_FUNCTIONS` on become such of kernel functions.
        """
        found = []
        free = bytearray(code)
        offset = 0
        while offset < len(code):
            operation, registers = code[offset], code[offset + 1]
            if operation == _LOAD_64_BITS and registers >> 4 == _MAP_DESCRIPTOR:
                (descriptor,) = struct.unpack_from("=i", code, offset + 4)
                struct.pack_into("=i", free, offset + 4, 0)
                found.append((offset, names[descriptor]))
            elif operation == _CALL and not registers >> 4:
                (called,) = struct.unpack_from("=i", code, offset + 4)
                if called >= KERNEL_FUNCTIONS:
                    free[offset + 1] = _KERNEL_FUNCTION << 4
                    struct.pack_into("=i", free, offset + 4, called - KERNEL_FUNCTIONS)
            offset += 2 * _SIZE if operation == _LOAD_64_BITS else _SIZE
        return cls(bytes(free), tuple(found))

    def bound(self, maps: Mapping[str, int]) -> bytes:
        """The program with these descriptors in it."""
        code = bytearray(self.code)
        for offset, name in self.maps:
            struct.pack_into("=i", code, offset + 4, maps[name])
        return bytes(code)


class Compiled(NamedTuple):
    """All of a hook set."""

    types: bytes
    """BTF, of keys and values."""
    maps: dict[str, MapShape]
    programs: dict[str, Instructions]

    def make_maps(self, sizes: Mapping[str, int], pinned: Path | None) -> dict[str, int]:
        """Descriptors of all maps: new ones, but for those that are pinned in a folder.

        Args:
            sizes: how many entries there are to be, of those that are not of one size.
            pinned: the folder.

        Raises:
            KernelError: the kernel makes none.
        """
        types = load_types(self.types)
        try:
            return {
                name: get_pinned(pinned / name)
                if pinned and (pinned / name).exists()
                else create_map(
                    name, shape._replace(max_entries=sizes.get(name, shape.max_entries)), types
                )
                for name, shape in self.maps.items()
            }
        finally:
            os.close(types)


class Cache:
    """A folder of root's in which what was compiled is kept, by all that it was compiled from.

    What is missing, damaged, or could have been written by others, is compiled again. Why nothing
    is kept says `problem`, in one line; it is empty where all is well.
    """

    def __init__(self, folder: Path) -> None:
        """Use a folder, which is made if need be."""
        self._folder = folder
        self.problem = ""

    def get(self, key: str) -> Compiled | None:
        """What was put there under this key, if it is all there."""
        try:
            self._examine()
            path = self._folder / key
            digest, _, text = path.read_text().partition("\n")
            if digest != _digest(key, text):
                return None
            kept = _from_json(json.loads(text))
            os.utime(path)
        except (OSError, ValueError, LookupError, TypeError):
            return None
        return kept

    def put(self, key: str, compiled: Compiled) -> None:
        """Keep it; what was not asked for for longest goes."""
        text = json.dumps(_to_json(compiled))
        unfinished = self._folder / f".{os.getpid()}"
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._examine()
            with open(
                os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w"
            ) as file:
                file.write(f"{_digest(key, text)}\n{text}")
            unfinished.rename(self._folder / key)
            by_age = sorted(self._folder.iterdir(), key=lambda each: each.stat().st_mtime_ns)
            for path in by_age[:-_KEPT]:
                path.unlink()
        except OSError as error:
            self.problem = self.problem or f"{self._folder}: {error.strerror}"
            with suppress(OSError):
                unfinished.unlink()

    def _examine(self) -> None:
        status = self._folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            why = "is not a folder of the user that loads programs"
        elif status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            why = "can be written to by others"
        else:
            return
        self.problem = f"{self._folder} {why}"
        raise PermissionError(errno.EPERM, why)


def _digest(key: str, text: str) -> str:
    return hashlib.sha256(f"{key}\n{text}".encode()).hexdigest()


def _to_json(compiled: Compiled) -> dict[str, Any]:
    return {
        "types": base64.b64encode(compiled.types).decode(),
        "maps": compiled.maps,
        "programs": {
            name: [base64.b64encode(program.code).decode(), program.maps]
            for name, program in compiled.programs.items()
        },
    }


def _from_json(kept: Any) -> Compiled:
    return Compiled(
        base64.b64decode(kept["types"]),
        {name: MapShape(*shape) for name, shape in kept["maps"].items()},
        {
            name: Instructions(
                base64.b64decode(code), tuple((offset, table) for offset, table in maps)
            )
            for name, (code, maps) in kept["programs"].items()
        },
    )
