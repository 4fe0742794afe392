"""SO_PEERCRED on TCP where it is asked for: the program behind getsockopt(), attached to cgroups.

What is asked for stands in the configuration, and, for what is enabled at run time, in a
file. What is attached is pinned: one link for each cgroup, and of each link one pin for
everyone who asks for it, as nobody but the daemon knows its configuration::

    PIN_DIR/capture/so_peercred/config-INODE     the daemon's configuration
    PIN_DIR/capture/so_peercred/INODE            the file
    PIN_DIR/capture/so_peercred/transient-INODE  until the cgroup goes, or the capture ends

A link without a pin ends with the process that made it, so whoever is killed leaves nothing
that is not seen here. `OptIn.reconcile` makes the pins what is asked for.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final, Literal, NamedTuple

from peercredd import hooks, pins, targets
from peercredd.libbpf import KernelError, detach_link, get_pinned, link_cgroup_id, pin
from peercredd.targets import NotKnownNow, Place, TargetError

Holder = Literal["config", "enabled", "transient"]

_PREFIXES: Final[Mapping[Holder, str]] = {
    "config": "config-",
    "enabled": "",
    "transient": "transient-",
}


class OptInError(Exception):
    """What was asked for cannot be done. One line: why, and what mends it."""


class Row(NamedTuple):
    """A target, or a cgroup to which the program is attached."""

    target: str
    source: Holder | Literal["leftover"]
    """`leftover`: attached, and not enabled any more; the next reconcile ends it."""
    cgroup: str
    """The directory; empty where it is not known."""
    attached: bool
    waiting: bool
    """For the cgroup to be made."""
    detail: str
    """Why it is not attached; empty where it is."""


class _Pinned(NamedTuple):
    """A pin, and what its name says."""

    path: Path
    holder: Holder
    cgroup: int
    """Inode number."""


class OptIn:
    """What is asked for, and what is attached, of the capture in one pin directory.

    Every method raises OptInError where the kernel, or the file of what is enabled, lets
    it not do its work.
    """

    def __init__(
        self,
        pin_dir: Path,
        state: Path,
        configured: Sequence[str],
        covered: Path,
        why_impossible: str,
    ) -> None:
        """Attach nothing yet.

        Args:
            pin_dir: the pin directory of the capture.
            state: the file of what is enabled at run time.
            configured: the targets that the configuration names.
            covered: the cgroup directory that bounds the capture.
            why_impossible: why this kernel does not take the program; empty if it does.
        """
        self._pin_dir = pin_dir
        self._state = state
        self._configured = tuple(dict.fromkeys(configured))
        self._covered = covered
        self._why_impossible = why_impossible
        self._located: Mapping[str, Place | TargetError] = {}
        self._failures: Mapping[str, str] = {}

    def targets(self) -> dict[str, Holder]:
        """All that is asked for now, and where."""
        asked: dict[str, Holder] = {}
        asked.update(dict.fromkeys(self._configured, "config"))
        for target in read_state(self._state):
            asked.setdefault(target, "enabled")
        return asked

    def locate(self) -> list[Path]:
        """Find out where all targets are, or will be; asks systemd for units that went or moved.

        Returns:
            The paths at which a change asks for `locate` and `reconcile` once more.
        """
        located: dict[str, Place | TargetError] = {}
        for target in self.targets():
            known = self._located.get(target)
            if isinstance(known, Place) and targets.is_cgroup(known.directory):
                located[target] = known
                continue
            try:
                located[target] = targets.locate(target, self._covered)
            except NotKnownNow as error:
                located[target] = known if isinstance(known, Place) else error
            except TargetError as error:
                located[target] = error
        self._located = located
        directories = [
            place.directory
            for target, place in located.items()
            if isinstance(place, Place) and target != targets.ALL
        ]
        return [self._state, *directories]

    def is_up_to_date(self) -> bool:
        """Whether `locate` has looked at what is asked for now."""
        return self.targets().keys() == self._located.keys()

    def misconfigured(self) -> str | None:
        """What is wrong with the first target of the configuration that can never work here."""
        if self._configured and self._why_impossible:
            return self._impossible()
        errors = (self._located[target] for target in self._configured)
        return next((f"so_peercred.cgroups: {e}" for e in errors if isinstance(e, Exception)), None)

    def reconcile(self) -> None:
        """Attach to the cgroups that were located, detach from all others.

        What cannot be attached is left out; `rows` says why. That is for the daemon: others
        may know another configuration.
        """
        with self._capture() as capture:
            self._failures = self._reconcile(capture, "config") | self._reconcile(
                capture, "enabled"
            )

    def rows(self) -> list[Row]:
        """What is asked for and what is attached, where `locate` has last found it.

        Whether it is attached is asked of the kernel now. Raises nothing.
        """
        capture = pins.capture(self._pin_dir)
        pinned = list(_pinned(capture)) if capture else []
        attached = {each.cgroup for each in pinned if _is_in_place(each)}
        rows, shown = [], set()
        try:
            asked = self.targets()
        except OptInError as error:
            rows.append(Row(str(self._state), "enabled", "", False, False, str(error)))
            asked = dict.fromkeys(self._configured, "config")
        for target, holder in asked.items():
            rows.append(row := self._row(target, holder, attached, running=capture is not None))
            if row.attached:
                shown.add((holder, _inode(Path(row.cgroup))))
        for each in pinned:
            if each.cgroup not in attached or (each.holder, each.cgroup) in shown:
                continue
            try:
                directory = targets.cgroup_of(each.cgroup, self._covered)
            except OSError:
                directory = Path(f"cgroup {each.cgroup}")
            # One that is just going is no more in its place, and may not say so yet.
            if directory:
                source = "leftover" if each.holder == "enabled" else each.holder
                rows.append(Row(str(directory), source, str(directory), True, False, ""))
        return rows

    def enable(self, target: str) -> Path:
        """Ask for a target from now on, and attach to it, or do nothing at all.

        Returns:
            The cgroup that it is attached to.
        """
        if target in self._configured:
            raise OptInError(f"{target}: enabled by the configuration already; nothing to do")
        self._require_capture()
        directory = self._existing(target)
        with (
            self._changing_state() as enabled,
            # Attached first, as the kernel may refuse it; pinned last, as a pin lasts.
            self._capture() as capture,
            self._attached(capture, directory) as link,
        ):
            if target in enabled:
                # Whoever asked for it may have been killed while no daemon ran.
                if not _pin(link, capture, "enabled"):
                    raise OptInError(f"{target}: enabled already; nothing to do")
                return directory
            write_state(self._state, [*enabled, target])
            try:
                _pin(link, capture, "enabled")
            except OptInError:
                write_state(self._state, enabled)
                raise
        return directory

    def disable(self, target: str) -> None:
        """Ask for a target no more, and detach from it unless another one means the same cgroup."""
        with self._changing_state() as enabled:
            if target not in enabled:
                if target in self._configured:
                    raise OptInError(
                        f"{target}: enabled by the configuration; take it out of "
                        "so_peercred.cgroups and restart the daemon"
                    )
                raise OptInError(
                    f"{target}: not enabled; `peercredd so-peercred list` shows what is"
                )
            write_state(self._state, [each for each in enabled if each != target])
        if pins.capture(self._pin_dir):
            self.locate()
            with self._capture() as capture:
                self._reconcile(capture, "enabled")

    def enable_transient(self, directory: Path) -> None:
        """Attach to a cgroup until it goes or the capture ends, or until `disable_transient`."""
        self._require_capture()
        existing = self._existing(str(directory))
        with self._capture() as capture, self._attached(capture, existing) as link:
            if not _pin(link, capture, "transient"):
                raise OptInError(f"{directory}: enabled already; nothing to do")

    def disable_transient(self, directory: Path) -> None:
        """Undo `enable_transient`."""
        number = _inode(directory)
        with self._capture() as capture:
            for each in _pinned(capture):
                if each.holder == "transient" and each.cgroup == number:
                    _remove(each, capture)
                    return
        raise OptInError(
            f"{directory}: not enabled until the cgroup goes; `peercredd so-peercred list` "
            "shows what is"
        )

    def _row(self, target: str, holder: Holder, attached: set[int], *, running: bool) -> Row:
        place = self._located.get(target)
        if place is None:
            return Row(target, holder, "", False, True, "asked for just now")
        if isinstance(place, TargetError):
            return Row(target, holder, "", False, False, str(place))
        number = _inode(place.directory)
        waiting, detail = False, ""
        if not running:
            detail = self._no_capture()
        elif self._why_impossible:
            detail = self._impossible()
        elif number is None:
            waiting, detail = True, place.absence.partition("; ")[0]
        elif number not in attached:
            detail = self._failures.get(target, "not attached; the daemon's log says why")
        return Row(target, holder, str(place.directory), number in attached, waiting, detail)

    def _reconcile(self, capture: Path, holder: Holder) -> dict[str, str]:
        """Do what `reconcile` does for one holder; returns what is wrong, by target."""
        asked = [target for target, source in self.targets().items() if source == holder]
        located = {target: self._located[target] for target in asked if target in self._located}
        # Where not all is known, what is attached may be just what is asked for.
        complete = len(located) == len(asked) and not any(
            isinstance(place, NotKnownNow) for place in located.values()
        )
        desired: dict[int, list[str]] = {}
        for target, place in located.items():
            if isinstance(place, Place) and (number := _inode(place.directory)):
                desired.setdefault(number, []).append(target)
        there = set()
        for each in list(_pinned(capture)):
            if not _is_in_place(each):
                _remove(each, capture)
            elif each.holder == holder:
                if each.cgroup in desired or not complete:
                    there.add(each.cgroup)
                else:
                    _remove(each, capture)
        failures: dict[str, str] = {}
        for number in desired.keys() - there:
            place = located[desired[number][0]]
            assert isinstance(place, Place)
            try:
                with self._attached(capture, place.directory) as link:
                    _pin(link, capture, holder)
            except OptInError as error:
                failures.update(dict.fromkeys(desired[number], str(error)))
        return failures

    def _existing(self, target: str) -> Path:
        """Where a target is; raises OptInError if it is not there."""
        try:
            place = targets.locate(target, self._covered)
        except TargetError as error:
            raise OptInError(str(error)) from error
        if not targets.is_cgroup(place.directory):
            raise OptInError(f"{target}: {place.absence}")
        return place.directory

    @contextmanager
    def _attached(self, capture: Path, directory: Path) -> Iterator[int]:
        """A link of the program to a cgroup; unless it is pinned meanwhile, it ends."""
        with ExitStack() as resources:
            # The kernel attaches no program twice to one cgroup; two pins may share a link.
            for each in _pinned(capture):
                if each.cgroup == _inode(directory) and _is_in_place(each):
                    yield resources.enter_context(_opened(get_pinned(each.path)))
                    return
            if self._why_impossible:
                raise OptInError(self._impossible())
            try:
                program = get_pinned(capture / pins.PROGRAMS / hooks.SO_PEERCRED.name)
                resources.enter_context(_opened(program))
                cgroup = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                resources.enter_context(_opened(cgroup))
                link = hooks.SO_PEERCRED.attach(program, cgroup)
            except OSError as error:
                if error.errno != errno.EPERM:
                    raise OptInError(f"{directory}: {error.strerror}; try again") from error
                raise OptInError(
                    f"{directory}: another BPF program is attached to getsockopt there, or in a "
                    "cgroup above, that allows none beside it; have its owner attach it with "
                    "BPF_F_ALLOW_MULTI (`bpftool cgroup tree` names it)"
                ) from error
            yield resources.enter_context(_opened(link))

    @contextmanager
    def _capture(self) -> Iterator[Path]:
        """The running capture, whose links nobody else changes meanwhile."""
        capture = self._require_capture()
        with _locked(capture):
            yield capture

    def _require_capture(self) -> Path:
        capture = pins.capture(self._pin_dir)
        if capture is None:
            raise OptInError(self._no_capture())
        return capture

    @contextmanager
    def _changing_state(self) -> Iterator[list[str]]:
        """What is enabled; nobody else changes it meanwhile."""
        folder = self._state.parent
        try:
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        except OSError as error:
            raise OptInError(
                f"{folder} cannot be made: {error.strerror}; choose another --so-peercred-state"
            ) from error
        with _locked_file(self._state.with_name(f"{self._state.name}.lock")):
            yield read_state(self._state)

    def _no_capture(self) -> str:
        return f"no capture runs in {self._pin_dir}; start the daemon, or name its --pin-dir"

    def _impossible(self) -> str:
        return (
            f"this kernel does not do SO_PEERCRED on TCP: {self._why_impossible}; run another "
            "kernel, or ask the daemon in place of the kernel"
        )


def read_state(path: Path) -> list[str]:
    """The targets that are enabled at run time.

    Raises:
        OptInError: that cannot be told.
    """
    mend = "remove it and enable again what you want, or choose another --so-peercred-state"
    try:
        # Whatever else it is, opening it must not wait.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)) as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise ValueError
            document = json.load(stream)
        enabled = [*document["targets"]]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OptInError(f"{path} cannot be read: {error.strerror}; mend that") from error
    except (ValueError, TypeError, KeyError, RecursionError):
        raise OptInError(f'{path} is not {{"targets": [...]}}; {mend}') from None
    if all(isinstance(each, str) and targets.is_valid(each) for each in enabled):
        return enabled
    raise OptInError(f"{path} lists what is not {targets.ALLOWED}; {mend}")


def write_state(path: Path, enabled: Sequence[str]) -> None:
    """Replace the list of what is enabled, for which the caller has the lock.

    Whoever reads it, and be it after a crash, sees the old one or the new one.

    Raises:
        OptInError: it cannot be written.
    """
    new = path.with_name(f"{path.name}.new")
    try:
        with open(new, "w") as stream:
            json.dump({"targets": list(enabled)}, stream, indent=2)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        new.rename(path)
        with _opened(os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)) as folder:
            os.fsync(folder)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise OptInError(
            f"{path} cannot be written: {error.strerror}; mend that, or choose another "
            "--so-peercred-state"
        ) from error


def _pinned(capture: Path) -> Iterator[_Pinned]:
    with suppress(FileNotFoundError):
        for path in sorted((capture / pins.SO_PEERCRED).iterdir()):
            prefix, dash, number = path.name.rpartition("-")
            for holder, named in _PREFIXES.items():
                if named == prefix + dash and number.isdecimal():
                    yield _Pinned(path, holder, int(number))


def _pin(link: int, capture: Path, holder: Holder) -> bool:
    """Give a link a name that lasts; False if it has that name already."""
    path = capture / pins.SO_PEERCRED / f"{_PREFIXES[holder]}{link_cgroup_id(link)}"
    if path.exists():
        return False
    try:
        pin(link, path)
    except KernelError as error:
        raise OptInError(f"{error.strerror}; try again") from error
    return True


def _is_in_place(each: _Pinned) -> bool:
    """Whether a pin's link is attached to the cgroup that it is named after."""
    with suppress(KernelError), _opened(get_pinned(each.path)) as link:
        return link_cgroup_id(link) == each.cgroup
    return False


def _remove(each: _Pinned, capture: Path) -> None:
    """Unpin, and detach where no other pin holds the same link."""
    if not any(other.cgroup == each.cgroup and other != each for other in _pinned(capture)):
        with suppress(KernelError), _opened(get_pinned(each.path)) as link:
            detach_link(link)
    each.path.unlink(missing_ok=True)


def _inode(directory: Path) -> int | None:
    """Number of the cgroup in a directory; None if none is there."""
    with suppress(OSError):
        if targets.is_cgroup(directory):
            return directory.stat().st_ino
    return None


@contextmanager
def _opened(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _take(descriptor: int, path: Path) -> None:
    try:
        pins.lock(descriptor, path)
    except KernelError as error:
        raise OptInError(str(error.strerror)) from error


@contextmanager
def _locked_file(path: Path) -> Iterator[None]:
    """Keep others who do the same out; it is there for that, and only root can open it.

    Raises:
        OptInError: it cannot be made.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        lock = os.open(path, flags, 0o600)
    except OSError as error:
        raise OptInError(
            f"{path} cannot be made: {error.strerror}; mend that, or choose another "
            "--so-peercred-state"
        ) from error
    with _opened(lock):
        _take(lock, path)
        yield


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep others who do the same out; the lock goes with the process, however it dies.

    Raises:
        OptInError: the folder is gone.
    """
    with ExitStack() as resources:
        try:
            directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            resources.enter_context(_opened(directory))
            _take(directory, folder)
            is_still_there = os.path.samestat(os.fstat(directory), folder.stat())
        except FileNotFoundError:
            is_still_there = False
        if not is_still_there:
            raise OptInError(f"{folder} has just been replaced; try again")
        yield
