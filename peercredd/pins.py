"""The pin directory: what keeps a capture running while no process holds it.

::

    PIN_DIR/staging-ID/    a loader at work; an orphan if it died
    PIN_DIR/taking-over-ID/  the same, since what it has attached may be what captures
    PIN_DIR/capture/       maps/NAME and links/PROGRAM of the running capture,
                           programs/NAME that may be attached besides, and
                           so_peercred/CGROUP, the links of one that is

A capture appears by one rename(2), complete. Whoever changes anything here holds
the directory's lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from peercredd.libbpf import KernelError, detach_link, get_pinned

BPFFS_MOUNT = Path("/sys/fs/bpf")
CAPTURE = "capture"
MAPS = "maps"
LINKS = "links"
PROGRAMS = "programs"
SO_PEERCRED = "so_peercred"
PARTS = (SO_PEERCRED, LINKS, PROGRAMS, MAPS)
_STAGING = "staging-"
_TAKING_OVER = "taking-over-"
_LOCK_SECONDS = 60.0
_LOCK_RETRY_SECONDS = 0.01


class Held(Exception):  # noqa: N818 - names a state
    """Another process holds the pin directory."""

    def __init__(self, pin_dir: Path, pid: int | None) -> None:
        self.pid = pid
        holder = f"process {pid}" if pid else "another process"
        super().__init__(
            f"{pin_dir} is held by {holder}; stop that daemon, or choose another --pin-dir"
        )


@contextmanager
def hold(pin_dir: Path) -> Iterator[None]:
    """Own the pin directory, which is made if need be, until the block ends.

    The lock goes with the process, however it dies.

    Raises:
        Held: another process owns it.
        KernelError: it cannot be made.
    """
    _make(pin_dir)
    while True:
        directory = os.open(pin_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Held(pin_dir, _holder(directory)) from None
            if _is_still(directory, pin_dir):
                yield
                return
        finally:
            os.close(directory)
        # Its last owner removed it between open and lock.
        _make(pin_dir)


def lock(descriptor: int, path: Path) -> None:
    """Take the flock(2) of an open file or folder; it goes with the descriptor.

    Raises:
        KernelError: another process keeps it for a minute.
    """
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise KernelError(
                    errno.EAGAIN,
                    f"{path} is locked by another process; let that go on or end it (`lslocks` "
                    "names it), and try again",
                ) from error
            time.sleep(_LOCK_RETRY_SECONDS)  # flock(2) knows no timeout
        else:
            return


def remove(pin_dir: Path, *, keep_capture: bool = False) -> bool:
    """Detach and unpin whatever is in a pin directory, and remove it.

    With `keep_capture` only what a crashed loader left goes, unless that captures, and the
    directory if nothing else is in it. The caller holds the directory.

    Returns:
        Whether there was anything to remove.
    """
    removed = clean(pin_dir, keep_capture=keep_capture)
    if pin_dir.is_dir() and not any(pin_dir.iterdir()):
        pin_dir.rmdir()
    return removed


def clean(pin_dir: Path, *, keep_capture: bool = False) -> bool:
    """Do as `remove` does, but leave the directory itself."""
    return _dismantle_all(
        pin_dir, (_STAGING,) if keep_capture else (_STAGING, _TAKING_OVER, CAPTURE)
    )


def clean_after_takeover(pin_dir: Path) -> None:
    """Remove what is left of takeovers, now that the capture has all that captures."""
    _dismantle_all(pin_dir, (_STAGING, _TAKING_OVER))


def stage(pin_dir: Path) -> Path:
    """A new folder to build a capture in."""
    folder = pin_dir / f"{_STAGING}{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir(mode=0o700)
    for part in PARTS:
        (folder / part).mkdir(mode=0o700)
    return folder


def begin_takeover(staged: Path) -> Path:
    """Keep a staged folder from now on, whatever becomes of its loader; returns its new place."""
    return staged.rename(staged.parent / staged.name.replace(_STAGING, _TAKING_OVER))


def publish(staged: Path) -> None:
    """Make a staged capture the running one, at once."""
    staged.rename(staged.parent / CAPTURE)


def capture(pin_dir: Path) -> Path | None:
    """The folder of the running capture, if there is one."""
    folder = pin_dir / CAPTURE
    return folder if folder.is_dir() else None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep out who attaches for SO_PEERCRED on TCP, or wait for its end.

    Raises:
        KernelError: that takes a minute.
    """
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        lock(directory, folder)
        yield
    finally:
        os.close(directory)


def _dismantle_all(pin_dir: Path, names: tuple[str, ...]) -> bool:
    """Those whose names begin so; returns whether there was one."""
    folders = list(pin_dir.iterdir()) if pin_dir.is_dir() else []
    found = [folder for folder in folders if folder.name.startswith(names)]
    for folder in found:
        _dismantle(folder)
    return bool(found)


def _dismantle(folder: Path) -> None:
    with locked(folder):
        _take_apart(folder)


def _take_apart(folder: Path) -> None:
    # Detach first: while one program is gone and others stay, records could be
    # made that nothing retires, and read; so the maps go last.
    for part in PARTS:
        for pinned in sorted((folder / part).glob("*")):
            if part in (SO_PEERCRED, LINKS):
                _detach(pinned)
            pinned.unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            (folder / part).rmdir()
    with suppress(FileNotFoundError):
        folder.rmdir()


def _detach(pinned: Path) -> None:
    with suppress(KernelError):
        descriptor = get_pinned(pinned)
        try:
            detach_link(descriptor)
        finally:
            os.close(descriptor)


def _make(pin_dir: Path) -> None:
    if pin_dir.is_relative_to(BPFFS_MOUNT):
        _mount_bpffs()
    try:
        existing = next(folder for folder in (pin_dir, *pin_dir.parents) if folder.exists())
        on_bpffs = _is_bpffs(existing)
        if on_bpffs:
            pin_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise KernelError(
            error.errno or errno.EIO,
            f"{pin_dir} cannot be made: {error.strerror}; choose another --pin-dir, without dots: "
            "a BPF file system has no such names",
        ) from error
    if not on_bpffs:
        raise KernelError(
            errno.EINVAL,
            f"{pin_dir} is not on a BPF file system; choose a --pin-dir below {BPFFS_MOUNT}",
        )


def _mount_bpffs() -> None:
    if _is_bpffs(BPFFS_MOUNT):
        return
    try:
        directory = os.open(BPFFS_MOUNT, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise KernelError(
            error.errno or errno.EIO,
            f"{BPFFS_MOUNT}: {error.strerror}; peercredd needs /sys and a kernel with "
            "CONFIG_BPF_SYSCALL",
        ) from error
    try:
        # Two daemons that start at once must not mount one over the other.
        fcntl.flock(directory, fcntl.LOCK_EX)
        if _is_bpffs(BPFFS_MOUNT):
            return
        mounted = subprocess.run(
            ["mount", "-t", "bpf", "-o", "mode=0700", "bpf", str(BPFFS_MOUNT)],
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        os.close(directory)
    if mounted.returncode:
        raise KernelError(
            errno.EPERM,
            f"no BPF file system could be mounted at {BPFFS_MOUNT} "
            f"({mounted.stderr.strip() or mounted.returncode}); run as root, or mount it: "
            f"mount -t bpf bpf {BPFFS_MOUNT}",
        )


def _is_bpffs(path: Path) -> bool:
    mounts = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    try:
        device = path.stat().st_dev
    except OSError:
        return False
    number = f"{os.major(device)}:{os.minor(device)}"
    return any(
        fields[2] == number and " - bpf " in line
        for line in mounts.splitlines()
        if (fields := line.split())
    )


def _is_still(directory: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(directory), path.stat())
    return False


def _holder(directory: int) -> int | None:
    """The pid in /proc/locks of whoever holds flock(2) on an open directory."""
    status = os.fstat(directory)
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if fields[1] == "FLOCK" and fields[5] == place:
            return int(fields[4])
    return None
