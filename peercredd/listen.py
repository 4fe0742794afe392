"""Where the daemon listens: a unix socket at its path, and a port of loopback.

The socket appears at its path finished, and one daemon at a time has it.

Who binds a path decides too little: gRPC makes the file with whatever mode the
umask leaves, and deletes a live server's socket that was there. So it binds in a
private folder, and the finished socket is moved to its place with rename(2).
"""

from __future__ import annotations

import errno
import fcntl
import functools
import grp
import os
import socket
import stat
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog

_PATH_LIMIT = 107  # sun_path of unix(7) less the closing NUL
_LOOPBACK = (
    (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
    (socket.AF_INET6, "::1", "[::1]"),
)
_UCRED = struct.Struct("=iII")  # struct ucred of unix(7)

log = structlog.get_logger()


class ListenError(Exception):
    """The socket cannot be had. One line: which path, what is wrong, what mends it."""


class UnixSocket:
    """The right to listen at a path, for as long as the ``with`` block runs.

    Inside: bind `private_path`, be ready to serve, `publish()`; another process may be the
    one to bind it, if it gets `folder`. When that one has died, `renew()` and begin again.
    Leaving removes the socket, unless another one has been put in its place.

    Clients find the socket at `path`; a missing folder is made, mode 0755. Members
    of `group` may connect, besides root: owner root, mode 0660. Where there is no
    such group a warning is logged and the mode is 0600.

    Entering, `publish()` and `renew()` raise ListenError.
    """

    private_path: str
    """What to bind. Short however long `path` is."""

    folder: int
    """Descriptor of the private folder, by which `private_path` names it."""

    def __init__(self, path: Path, group: str) -> None:
        self._path = path.absolute()
        self._group = group

    def __enter__(self) -> Self:
        length = len(os.fsencode(self._path))
        if length > _PATH_LIMIT:
            raise ListenError(
                f"{self._path}: {length} bytes long, a unix socket's path has at most "
                f"{_PATH_LIMIT}; choose a shorter one"
            )
        with _explained(self._path), ExitStack() as undo:
            _make_folder(self._path.parent)
            undo.enter_context(_locked(self._path))
            _require_free(self._path)
            self._published: tuple[int, int] | None = None
            self._make_private_folder()
            undo.callback(self._close_folder)
            undo.callback(self._remove_private_folder)
            undo.callback(self._remove)
            self._undo = undo.pop_all()
        return self

    def publish(self) -> None:
        """Move the bound socket to its path; until then nobody can connect to it."""
        with _explained(self._path):
            bound = Path(self.private_path)
            mode, gid = self._access
            os.chown(bound, -1, gid)
            bound.chmod(mode)
            status = bound.stat()
            bound.rename(self._path)
            self._published = status.st_dev, status.st_ino
            self._remove_private_folder()

    def renew(self) -> None:
        """Make another `private_path`. What is published stays until the next `publish()`."""
        with _explained(self._path):
            self._remove_private_folder()
            before = self.folder
            self._make_private_folder()
            os.close(before)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._undo.close()

    def _make_private_folder(self) -> None:
        self._private_folder = self._path.parent / f".peercredd-{os.urandom(8).hex()}"
        self._private_folder.mkdir(mode=0o700)
        # Held to the end: gRPC deletes what it finds at the path it once bound.
        self.folder = os.open(self._private_folder, os.O_PATH | os.O_DIRECTORY)
        self.private_path = f"/proc/self/fd/{self.folder}/socket"

    @functools.cached_property
    def _access(self) -> tuple[int, int]:
        try:
            return 0o660, grp.getgrnam(self._group).gr_gid
        except KeyError:
            log.warning(
                "no such group, so only root may ask; create it and restart",
                group=self._group,
                socket=str(self._path),
            )
            return 0o600, os.getegid()

    def _remove(self) -> None:
        try:
            status = self._path.lstat()
        except FileNotFoundError:
            return
        if (status.st_dev, status.st_ino) == self._published:
            self._path.unlink()

    def _remove_private_folder(self) -> None:
        if self._private_folder.exists():
            (self._private_folder / "socket").unlink(missing_ok=True)
            self._private_folder.rmdir()

    def _close_folder(self) -> None:
        os.close(self.folder)


def free_loopback_addresses(port: int) -> list[str]:
    """Return where that port can be listened on: 127.0.0.1 and ::1, as gRPC writes them.

    A host without IPv6, or without IPv4, has one of them. gRPC would not say why a port
    cannot be had, so it is tried here first.

    Raises ListenError.
    """
    free = []
    for family, host, written in _LOOPBACK:
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                # As gRPC does: connections of the last daemon may still be in TIME_WAIT.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
                probe.listen()
        except OSError as error:
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                log.info("this host has no such address, so nobody can ask there", address=host)
                continue
            if error.errno == errno.EADDRINUSE:
                raise port_in_use(written, port) from None
            raise ListenError(
                f"cannot listen at {written}:{port}: {error.strerror}; choose another port with "
                "api.tcp_port, or set api.tcp = false"
            ) from None
        free.append(written)
    if not free:
        raise ListenError(
            f"cannot listen at port {port}: there is neither 127.0.0.1 nor ::1; bring the loopback "
            "interface up (`ip link set lo up`), or set api.tcp = false"
        )
    return free


def port_in_use(address: str, port: int) -> ListenError:
    """Return the error for a port that somebody else has."""
    return ListenError(
        f"{address}:{port}: in use by another process (`ss -ltnp sport = {port}` shows which); "
        "stop it, choose another port with api.tcp_port, or set api.tcp = false"
    )


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise ListenError(
            f"cannot listen at {path}: {where}{error.strerror}; mend that or choose another path"
        ) from error


def _make_folder(folder: Path) -> None:
    if folder.exists():
        return
    _make_folder(folder.parent)
    folder.mkdir()
    folder.chmod(0o755)  # mkdir() would heed the umask


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold ``PATH.lock``. The kernel lets go of it however this process ends."""
    lock_path = Path(f"{path}.lock")
    while True:
        # Not readable by others: a lock can be taken through any descriptor.
        lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, mode=0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(lock, 16).decode().strip()
            os.close(lock)
            raise _in_use(path, holder) from None
        # The last holder may have deleted the file after it was opened here.
        if os.fstat(lock).st_nlink:
            break
        os.close(lock)
    try:
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        lock_path.unlink(missing_ok=True)
        os.close(lock)


def _require_free(path: Path) -> None:
    """Raise unless nothing is at `path`, or a socket that nobody listens on any more."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ListenError(f"{path}: exists and is not a socket; remove it or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return
        except BlockingIOError:  # a listener with a full queue
            raise _in_use(path, "") from None
        ucred = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    raise _in_use(path, str(_UCRED.unpack(ucred)[0]))


def _in_use(path: Path, pid: str) -> ListenError:
    holder = f"process {pid}" if pid else "another process"
    return ListenError(f"{path}: in use by {holder}; stop it or choose another path")
