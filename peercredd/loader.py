"""The short-lived process that compiles, attaches and pins a capture.

``python -m peercredd.loader JSON PID`` with pin_dir, cache_dir, cgroup, hooks,
max_connections, max_pending and max_percent_per_user; its parent, of that pid, holds the
pin directory.
Exit status 0: the pins are in place, and standard output has one JSON object; 1: one line
on standard error says why not, and nothing is left attached. ``--dry-run HOOK_SET`` has the kernel
verify the programs; those of `trace` are attached for an instant, to see whether they
can be. With ``--log``, all that the compiler and the verifier said comes first.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import signal
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

from peercredd import (
    about,
    capture,
    hooks,
    lean,
    namespaces,
    older,
    pins,
    preemption,
    takeover,
    trial,
)
from peercredd.compiled import Cache
from peercredd.compiler import Refused
from peercredd.libbpf import KernelError, Map, attach_to_function, pin

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> int:
    """Run the loader; returns its exit status."""
    # Half a capture is worse than none: if the daemon dies, so does its loader.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if arguments[1].isdecimal() and os.getppid() != int(arguments[1]):
        return 1  # it died before the line above
    try:
        if arguments[0] == "--dry-run":
            outcome = dry_run(arguments[1])
        else:
            outcome = start(json.loads(arguments[0]))
    except OSError as error:
        if "--log" in arguments and isinstance(error, Refused):
            print(error.log, file=sys.stderr)
        where = f"{error.filename}: " if error.filename else ""
        print(f"{where}{error.strerror}", file=sys.stderr)
        return 1
    print(json.dumps(outcome))
    return 0


def dry_run(hook_set: str) -> dict[str, Any]:
    """See whether a hook set would work here.

    Raises:
        KernelError: it would not.
    """
    namespaces.own_cookie()
    loaded = capture.load(hook_set, max_connections=1024, max_pending=1024)
    if hook_set == "trace":
        # The links end with this process.
        for program, descriptor in loaded.programs.items():
            attach_to_function(descriptor, program.name)
        trial.run(loaded.programs)
    return {"missing_fields": loaded.missing_fields}


def start(settings: dict[str, Any]) -> dict[str, Any]:
    """Go on with the running capture if that can be what `settings` ask for, else begin one.

    Raises:
        OSError: it could not be loaded or attached, or older connections not be listed.
    """
    pin_dir = Path(settings["pin_dir"])
    cgroup = Path(settings["cgroup"])
    cache = Cache(Path(settings.pop("cache_dir")))
    fingerprint = _fingerprint(settings, cgroup)
    why_not = ""
    if running := pins.capture(pin_dir):
        try:
            if said := _adoptable(running, fingerprint, cgroup):
                how = "found running"
            else:
                said = takeover.take_over(running, settings, cgroup, fingerprint, cache)
                how = "taken over"
        except takeover.NotPossible as reason:
            why_not = str(reason)
        except OSError:
            pins.clean(pin_dir, keep_capture=True)
            raise
        else:
            pins.clean_after_takeover(pin_dir)
            return {"capture": how, "about": said, "cache_problem": cache.problem}
    pins.clean(pin_dir)

    try:
        loaded, staged, hook_sets = _first_that_works(settings, cgroup, pin_dir, cache)
        learnt = older.learn(Map(loaded.maps["older"]))
        said = {
            "fingerprint": fingerprint,
            **hook_sets,
            **capture.about(loaded, settings),
            "cgroup": str(cgroup),
            "cgroup_id": cgroup.stat().st_ino,
            "started_ns": time.clock_gettime_ns(time.CLOCK_BOOTTIME),
        }
        about.write(loaded.maps["about"], said)
        pins.publish(staged)
    except BaseException:
        pins.clean(pin_dir)
        raise
    return {
        "capture": "begun",
        "about": said,
        "older": learnt,
        "lost": why_not,
        "cache_problem": cache.problem,
        "compiled": "before" if loaded.from_cache else "now",
    }


def _first_that_works(
    settings: dict[str, Any], cgroup: Path, pin_dir: Path, cache: Cache
) -> tuple[capture.Capture, Path, dict[str, Any]]:
    """A capture, where it is staged, and what to say of the choice."""
    asked = settings["hooks"]
    failed: dict[str, str] = {}
    if asked == "auto" and (objection := preemption.why_not_to_trace()):
        failed["trace"] = objection
    for hook_set in hooks.HOOK_SETS:
        if asked not in ("auto", hook_set) or hook_set in failed:
            continue
        try:
            loaded = capture.load(
                hook_set,
                settings["max_connections"],
                settings["max_pending"],
                cgroup,
                settings["max_percent_per_user"],
                cache=cache,
            )
            staged = pins.stage(pin_dir)
            for name, descriptor in loaded.maps.items():
                pin(descriptor, staged / pins.MAPS / name)
            if loaded.so_peercred is not None:
                pin(loaded.so_peercred, staged / pins.PROGRAMS / hooks.SO_PEERCRED.name)
            attach(loaded, cgroup, staged)
        except KernelError as error:
            pins.clean(pin_dir)
            if asked != "auto":
                raise
            failed[hook_set] = textwrap.shorten(str(error.strerror), capture.REASON_LENGTH)
        else:
            why = "is preferred" if asked == "auto" else "was asked for"
            unused = hooks.unused(hook_set, f"{hook_set} {why} (--hooks {asked})") | failed
            said = {"asked": asked, "hook_set": hook_set, "unused_hook_sets": unused}
            return loaded, staged, said
    reasons = "; ".join(f"{hook_set}: {reason}" for hook_set, reason in failed.items())
    raise KernelError(errno.ENOSYS, f"no hook set works here: {reasons}")


def attach(loaded: capture.Capture, cgroup: Path, staged: Path) -> None:
    """Attach every program, beside what others attached, and pin the links.

    Raises:
        OSError: there is no such cgroup, or the kernel refuses; or it does not run
            a program where it should.
    """
    directory = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for program, descriptor in loaded.programs.items():
            link = program.attach(descriptor, directory)
            pin(link, staged / pins.LINKS / program.name)
            os.close(link)
    finally:
        os.close(directory)
    trial.run(loaded.programs)


def _adoptable(running: Path, fingerprint: str, cgroup: Path) -> dict[str, Any] | None:
    """What is said of the running capture, if that is just the one which is asked for."""
    try:
        said = about.read(running / pins.MAPS)
        if said["fingerprint"] == fingerprint and takeover.is_in_place(
            running, said["programs"], cgroup
        ):
            return said
    except (KernelError, ValueError, KeyError):
        pass
    return None


def _fingerprint(settings: dict[str, Any], cgroup: Path) -> str:
    """Of all that makes one capture differ from another."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(str(cgroup.stat().st_ino).encode())
    # This module is among them: it writes what the store reads of a capture.
    for source in (Path(__file__), *sorted(capture.source_folder().rglob("*.[ch]"))):
        digest.update(source.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    lean.leave_out()
    sys.exit(main(sys.argv[1:]))
