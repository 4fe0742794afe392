"""The short-lived process that compiles, attaches and pins a capture.

``python -m peercredd.loader JSON PID`` with pin_dir, cgroup, max_connections and
max_pending; its parent, of that pid, holds the pin directory. Exit status 0: the
pins are in place, and standard output has one JSON object; 1: one line on standard
error says why not, and nothing is left attached. ``--dry-run`` has the kernel
verify the programs, and attaches nothing.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from peercredd import capture, older, pins
from peercredd.libbpf import KernelError, Map, create_link, get_pinned, link_cgroup_id, pin
from peercredd.records import ABOUT_SIZE

HOOK_SET = "cgroup"
_ABOUT_KEY = bytes(4)
_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> int:
    """Run the loader; returns its exit status."""
    # Half a capture is worse than none: if the daemon dies, so does its loader.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if len(arguments) > 1 and os.getppid() != int(arguments[1]):
        return 1  # it died before the line above
    try:
        if arguments == ["--dry-run"]:
            loaded = capture.load(max_connections=1024, max_pending=1024)
            outcome: dict[str, Any] = {"missing_fields": loaded.missing_fields}
        else:
            outcome = start(json.loads(arguments[0]))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"{where}{error.strerror}", file=sys.stderr)
        return 1
    print(json.dumps(outcome))
    return 0


def start(settings: dict[str, Any]) -> dict[str, Any]:
    """Adopt the running capture if it is what `settings` ask for, else replace it.

    Raises:
        OSError: it could not be loaded or attached, or older connections not be listed.
    """
    pin_dir = Path(settings["pin_dir"])
    cgroup = Path(settings["cgroup"])
    fingerprint = _fingerprint(settings, cgroup)
    pins.clean(pin_dir, keep_capture=True)
    if _is_running(pin_dir, fingerprint, cgroup):
        return {"adopted": True}
    pins.clean(pin_dir)

    loaded = capture.load(settings["max_connections"], settings["max_pending"])
    staged = pins.stage(pin_dir)
    try:
        for name, descriptor in loaded.maps.items():
            pin(descriptor, staged / pins.MAPS / name)
        attach(loaded, cgroup, staged)
        learnt = older.learn(Map(loaded.maps["older"]))
        about = {
            "fingerprint": fingerprint,
            "hook_set": HOOK_SET,
            "cgroup": str(cgroup),
            "started_ns": time.clock_gettime_ns(time.CLOCK_BOOTTIME),
            "missing_fields": loaded.missing_fields,
        }
        Map(loaded.maps["about"]).update(
            _ABOUT_KEY, json.dumps(about).encode().ljust(ABOUT_SIZE, b"\0")
        )
        pins.publish(staged)
    except BaseException:
        pins.clean(pin_dir)
        raise
    return {"adopted": False, "missing_fields": loaded.missing_fields, "older": learnt}


def attach(loaded: capture.Capture, cgroup: Path, staged: Path) -> None:
    """Attach every program to the cgroup, beside what others attached, and pin the links.

    Raises:
        OSError: there is no such cgroup, or the kernel refuses.
    """
    directory = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for program, descriptor in loaded.programs.items():
            link = create_link(descriptor, directory, program.attach_type)
            pin(link, staged / pins.LINKS / program.name)
            os.close(link)
    finally:
        os.close(directory)


def read_about(maps: Path) -> dict[str, Any]:
    """What the loader of a capture said of it.

    Raises:
        KernelError: the map is not there.
        ValueError: it has not been written.
    """
    text = Map.open(maps / "about").lookup(_ABOUT_KEY) or b""
    about: dict[str, Any] = json.loads(text.rstrip(b"\0"))
    return about


def _is_running(pin_dir: Path, fingerprint: str, cgroup: Path) -> bool:
    running = pins.capture(pin_dir)
    if running is None:
        return False
    try:
        if read_about(running / pins.MAPS)["fingerprint"] != fingerprint:
            return False
        attached = [
            link_cgroup_id(get_pinned(running / pins.LINKS / program.name))
            for program in capture.CGROUP_PROGRAMS
        ]
    except (KernelError, ValueError, KeyError):
        return False
    return all(identity == cgroup.stat().st_ino for identity in attached)


def _fingerprint(settings: dict[str, Any], cgroup: Path) -> str:
    """Of all that makes one capture differ from another."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(str(cgroup.stat().st_ino).encode())
    # This module is among them: it writes what the store reads of a capture.
    for source in (Path(__file__), *sorted(capture.source_folder().rglob("*.[ch]"))):
        digest.update(source.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
