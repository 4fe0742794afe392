"""What was compiled is kept for the next start, where nobody else can change it."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from harness.users import ALICE
from peercredd.compiled import KERNEL_FUNCTIONS, Cache, Compiled, Instructions
from peercredd.libbpf import MapShape

KEY = "a" * 64
SHAPE = MapShape(
    type=1, key_size=4, value_size=8, max_entries=16, flags=1, key_type=3, value_type=5
)
RETURN = struct.pack("=BBhi", 0x95, 0, 0, 0)


def load_64_bits(kind: int, register: int, number: int) -> bytes:
    """Two instructions; `number` is a map's descriptor if `kind` is 1."""
    return struct.pack("=BBhi", 0x18, kind << 4 | register, 0, number) + bytes(8)


PROGRAM = load_64_bits(1, 1, 7) + load_64_bits(0, 2, 7) + load_64_bits(1, 3, 9) + RETURN
COMPILED = Compiled(
    b"\x9f\xeb types \0",
    {"pending": SHAPE, "drops": SHAPE},
    {"establish": Instructions.of(PROGRAM, {7: "pending", 9: "drops"})},
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "var" / "cache"


def test_a_program_is_the_same_again_with_the_maps_that_it_came_with() -> None:
    assert COMPILED.programs["establish"].bound({"pending": 7, "drops": 9}) == PROGRAM


def test_a_program_gets_other_maps_where_it_refers_to_a_map_and_nowhere_else() -> None:
    bound = COMPILED.programs["establish"].bound({"pending": 21, "drops": 22})

    assert bound == (
        load_64_bits(1, 1, 21) + load_64_bits(0, 2, 7) + load_64_bits(1, 3, 22) + RETURN
    )


def test_a_number_that_looks_like_an_instruction_is_none() -> None:
    number = struct.pack("=BBhi", 0, 0, 0, 0x1118)
    program = struct.pack("=BBhi", 0x18, 1, 0, 0x1118) + number + RETURN

    assert Instructions.of(program, {}) == Instructions(program, ())


def call(kind: int, number: int) -> bytes:
    return struct.pack("=BBhi", 0x85, kind << 4, 0, number)


def test_a_number_behind_those_of_all_helpers_is_a_function_of_the_kernel() -> None:
    helper, local = call(0, 175), call(1, KERNEL_FUNCTIONS + 7)
    program = helper + call(0, KERNEL_FUNCTIONS + 4711) + local + RETURN

    assert Instructions.of(program, {}).code == helper + call(2, 4711) + local + RETURN


def test_what_is_kept_is_found_again_by_its_key_alone(folder: Path) -> None:
    Cache(folder).put(KEY, COMPILED)

    later = Cache(folder)
    assert later.get(KEY) == COMPILED
    assert later.get("b" * 64) is None
    assert later.problem == ""


def test_only_its_owner_can_read_it(folder: Path) -> None:
    Cache(folder).put(KEY, COMPILED)

    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / KEY).stat().st_mode & 0o777 == 0o600


def test_under_another_key_it_is_not_what_was_asked_for(folder: Path) -> None:
    Cache(folder).put(KEY, COMPILED)
    (folder / KEY).rename(folder / ("b" * 64))

    assert Cache(folder).get("b" * 64) is None


@pytest.mark.parametrize("at", range(0, 700, 50))
def test_one_bit_that_changed_is_noticed(folder: Path, at: int) -> None:
    Cache(folder).put(KEY, COMPILED)
    content = bytearray((folder / KEY).read_bytes())
    content[at % len(content)] ^= 1
    (folder / KEY).write_bytes(content)

    assert Cache(folder).get(KEY) is None


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe", b"{}\n{}", b"0" * 64 + b"\n[]"])
def test_garbage_is_replaced(folder: Path, content: bytes) -> None:
    cache = Cache(folder)
    cache.put(KEY, COMPILED)
    (folder / KEY).write_bytes(content)

    assert cache.get(KEY) is None
    cache.put(KEY, COMPILED)
    assert cache.get(KEY) == COMPILED


def test_a_folder_that_others_can_write_to_is_neither_read_nor_written(folder: Path) -> None:
    Cache(folder).put(KEY, COMPILED)
    folder.chmod(0o770)
    before = sorted(folder.iterdir())

    cache = Cache(folder)
    assert cache.get(KEY) is None
    cache.put("b" * 64, COMPILED)
    assert cache.problem == f"{folder} can be written to by others"
    assert sorted(folder.iterdir()) == before


def test_a_link_to_a_folder_is_none(folder: Path, tmp_path: Path) -> None:
    Cache(folder).put(KEY, COMPILED)
    link = tmp_path / "link"
    link.symlink_to(folder)

    cache = Cache(link)
    assert cache.get(KEY) is None
    assert cache.problem == f"{link} is not a folder of the user that loads programs"


@pytest.mark.root
def test_a_folder_of_somebody_else_is_neither_read_nor_written(folder: Path) -> None:
    Cache(folder).put(KEY, COMPILED)
    os.chown(folder, ALICE, ALICE)

    cache = Cache(folder)
    assert cache.get(KEY) is None
    assert cache.problem == f"{folder} is not a folder of the user that loads programs"


def test_where_nothing_can_be_kept_it_is_said_why(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    cache = Cache(tmp_path / "file" / "cache")
    assert cache.get(KEY) is None
    cache.put(KEY, COMPILED)
    assert cache.problem == f"{tmp_path}/file/cache: Not a directory"


def test_what_was_asked_for_last_stays_and_older_ones_go(folder: Path) -> None:
    cache = Cache(folder)
    for number in range(8):
        cache.put(f"{number:064}", COMPILED)
        os.utime(folder / f"{number:064}", ns=(number, number))
    assert cache.get(f"{0:064}")

    cache.put(KEY, COMPILED)
    kept = {path.name for path in folder.iterdir()}
    assert kept == {KEY, *(f"{number:064}" for number in (0, *range(2, 8)))}
