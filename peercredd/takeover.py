"""A new version goes on with the maps of the capture that runs, and no record is lost.

That is possible where the maps' layout and what bounds the capture are the same. The programs
are replaced while connections are made. Each event meets one program of a cgroup, the old or the
new. Tracing programs cannot be replaced: the new ones are attached beside the old and do nothing
until the map `generation` says theirs. An event under way at that instant may be missed, and what
it would have recorded is then not found.

A loader that is killed in the middle leaves old and new programs, each moment having one, and no
fingerprint: so the next one takes over once more.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from peercredd import about, capture, hooks, pins, trial
from peercredd.compiled import Cache
from peercredd.libbpf import (
    KernelError,
    Map,
    detach_link,
    get_pinned,
    link_cgroup_id,
    pin,
    replace_program,
)

_GENERATION_KEY = bytes(4)


class NotPossible(Exception):  # noqa: N818 - names a state
    """The running capture cannot be gone on with. One line: why."""


def is_in_place(running: Path, programs: Iterable[str], cgroup: Path) -> bool:
    """Whether a capture's programs are all attached, where it is bounded.

    Raises:
        KernelError: the pin of one is missing.
    """
    inode = cgroup.stat().st_ino
    for name in programs:
        with _pinned_link(running / pins.LINKS / name) as link:
            if link_cgroup_id(link) not in (None, inode):
                return False
    return True


def take_over(
    running: Path, settings: Mapping[str, Any], cgroup: Path, fingerprint: str, cache: Cache
) -> dict[str, Any]:
    """Make a running capture what `settings` ask for.

    Returns:
        What is said of it from now on.

    Raises:
        NotPossible: it cannot be; nothing was changed.
        OSError: the kernel refuses something; what is captured goes on to be.
    """
    said = _what_is_said(running, settings, cgroup)
    maps = running / pins.MAPS
    generation = _unused_generation(maps)
    try:
        loaded = capture.load(
            said["hook_set"],
            settings["max_connections"],
            settings["max_pending"],
            cgroup,
            settings["max_percent_per_user"],
            capture.Running(maps, generation),
            cache=cache,
        )
    except KernelError as error:
        if settings["hooks"] != "auto":
            raise
        raise NotPossible(str(error.strerror)) from error
    with pins.locked(running):
        staged = pins.stage(running.parent)
        kept = _attach_beside(loaded, cgroup, running, staged)
        trial.run(loaded.programs)

        staged = pins.begin_takeover(staged)
        about.write(loaded.maps["about"], {**said, "fingerprint": ""})
        for path, program in kept.items():
            with _pinned_link(path) as link:
                replace_program(link, program)
        Map(loaded.maps["generation"]).update(
            _GENERATION_KEY, generation.to_bytes(4, sys.byteorder)
        )
        names = [program.name for program in loaded.programs]
        for name in names:
            with suppress(FileNotFoundError):  # there is no new link of what was kept
                (staged / pins.LINKS / name).rename(running / pins.LINKS / name)
        for path in list((running / pins.LINKS).iterdir()):
            if path.name not in names:
                _end(path)
        _replace_so_peercred(loaded.so_peercred, running, staged)
        said |= capture.about(loaded, settings)
        said |= _why_that_hook_set(said, settings["hooks"])
        said["fingerprint"] = fingerprint
        about.write(loaded.maps["about"], said)
    return said


def _what_is_said(running: Path, settings: Mapping[str, Any], cgroup: Path) -> dict[str, Any]:
    """What the running capture's loader said, if that can be gone on with; NotPossible else."""
    maps = running / pins.MAPS
    try:
        said = about.read(maps)
        if said["layout"] != capture.layout(settings["max_connections"], settings["max_pending"]):
            raise NotPossible("its tables are of another size or layout")
        if settings["hooks"] not in ("auto", said["hook_set"]):
            raise NotPossible(f"its hook set is {said['hook_set']}")
        if said["cgroup_id"] != cgroup.stat().st_ino:
            raise NotPossible(f"it was bounded to another cgroup, then {said['cgroup']}")
        in_place = is_in_place(running, said["programs"], cgroup)
    except KeyError as error:
        raise NotPossible("it is of a version that nothing can go on from") from error
    except (KernelError, ValueError) as error:
        raise NotPossible("some of its pins are missing") from error
    if not in_place:
        raise NotPossible("some of its programs are not attached any more")
    if any(not (maps / name).exists() for name in capture.MAPS):
        raise NotPossible("some of its maps are missing")
    return said


def _why_that_hook_set(said: Mapping[str, Any], asked: str) -> dict[str, Any]:
    """What is said of it, where it was chosen for an earlier start."""
    if said.get("asked") == asked:
        return {}
    hook_set = said["hook_set"]
    why = f"{hook_set} was asked for (--hooks {asked})"
    if asked == "auto":
        why = (
            f"the capture that was found running has {hook_set}, and its records are kept; for "
            "another choice run 'peercredd unload' before the next start"
        )
    return {"asked": asked, "unused_hook_sets": hooks.unused(hook_set, why)}


def _unused_generation(maps: Path) -> int:
    """A number that no program has. The next one may be of programs that a killed loader left."""
    active = Map.open(maps / "generation").lookup(_GENERATION_KEY)
    while (unused := os.urandom(4)) == active:
        pass
    return int.from_bytes(unused, sys.byteorder)


def _attach_beside(
    loaded: capture.Capture, cgroup: Path, running: Path, staged: Path
) -> dict[Path, int]:
    """Attach what cannot take the place of an older program.

    Returns:
        The pinned links that stay, and the program that each is to run.
    """
    kept = {}
    directory = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for program, descriptor in loaded.programs.items():
            path = running / pins.LINKS / program.name
            if isinstance(program, hooks.Program) and path.exists():
                kept[path] = descriptor
                continue
            link = program.attach(descriptor, directory)
            pin(link, staged / pins.LINKS / program.name)
            os.close(link)
    finally:
        os.close(directory)
    return kept


def _replace_so_peercred(program: int | None, running: Path, staged: Path) -> None:
    """Do so with what answers getsockopt(), wherever that is attached."""
    pinned = running / pins.PROGRAMS / hooks.SO_PEERCRED.name
    if program is None:
        pinned.unlink(missing_ok=True)
    else:
        pin(program, staged / pins.PROGRAMS / pinned.name)
        (staged / pins.PROGRAMS / pinned.name).rename(pinned)
    for path in list((running / pins.SO_PEERCRED).iterdir()):
        if program is None:
            _end(path)
            continue
        with _pinned_link(path) as link:
            if link_cgroup_id(link):  # else its cgroup is gone
                replace_program(link, program)


def _end(path: Path) -> None:
    """Detach and unpin a link."""
    with _pinned_link(path) as link:
        detach_link(link)
    path.unlink()


@contextmanager
def _pinned_link(path: Path) -> Iterator[int]:
    link = get_pinned(path)
    try:
        yield link
    finally:
        os.close(link)
