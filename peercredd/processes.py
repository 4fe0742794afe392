"""What /proc tells of the processes in other namespaces, to whoever may look at any process.

The links below /proc/PID/ns and the id maps are for who may ptrace(2) the process
(proc_ns_get_link() and ptrace_may_access() of the kernel): that is root's work.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

_START_TIME: Final = 19
"""Of what follows the name in proc_pid_stat(5), in clock ticks since boot, rounded down."""

_MOST_HINTS: Final = 4096

T = TypeVar("T")


class NamespaceUnknown(ValueError):  # noqa: N818 - named like the reason it becomes
    """A namespace in which there is no process to be seen; `field` is that of Namespaces."""

    def __init__(self, field: str, namespace: int) -> None:
        kind = field.removesuffix("_namespace")
        super().__init__(
            f"{namespace} is no {kind} namespace that peercredd sees a process in; send the inode "
            f"number of /proc/self/ns/{kind}, or leave it out for the initial one"
        )
        self.field = field


class SupervisorSilent(Exception):  # noqa: N818 - names a state
    """Who could look at the processes does not answer. One line."""

    def __init__(self) -> None:
        super().__init__("peercredd's supervisor does not answer; see its log, or restart it")


class Processes:
    """Finds the processes of a namespace; knows where it found one before, and looks there first.

    A number used again is noticed: what is found is always what is there now.
    """

    def __init__(self) -> None:
        self._hints: dict[int, str] = {}

    def start_of_pid_namespace(self, namespace: int) -> int:
        """When the first process of a pid namespace started: clock ticks since boot, rounded down.

        Raises:
            NamespaceUnknown: it is not to be seen.
        """
        return self.find("pid_namespace", namespace, start_of_first)

    def maps_of_user_namespace(self, namespace: int) -> tuple[str, str]:
        """The uid_map and the gid_map of a user namespace, user_namespaces(7), as text.

        Raises:
            NamespaceUnknown: no process of it is to be seen.
        """
        return self.find("user_namespace", namespace, _maps)

    def start_of_process(self, pid: int) -> int | None:
        """When a process started, in clock ticks since boot, rounded down; None if it has ended."""
        try:
            return _start_tick(Path(f"/proc/{pid}/stat").read_text(errors="replace"))
        except OSError:
            return None

    def find(self, field: str, namespace: int, read: Callable[[int], T | None]) -> T:
        """What `read` makes of the first process in a namespace that it makes anything of.

        Args:
            field: that of Namespaces.
            namespace: inode number.
            read: is given a descriptor of the process's folder in /proc.

        Raises:
            NamespaceUnknown: there is none.
        """
        link = f"ns/{field.removesuffix('_namespace')}"
        for pid in self._candidates(namespace):
            try:
                # Of a thousand processes one is wanted: pathlib would take twice as long.
                if os.stat(f"/proc/{pid}/{link}").st_ino != namespace:  # noqa: PTH116
                    continue
                # From here on it is one process, whatever its number will be used for.
                folder = os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY)
                try:
                    before = os.stat(link, dir_fd=folder).st_ino
                    found = read(folder)
                    # A process can go to a namespace below, and never comes back.
                    after = os.stat(link, dir_fd=folder).st_ino
                finally:
                    os.close(folder)
            except OSError:  # it has ended
                continue
            if found is not None and before == after == namespace:
                if len(self._hints) >= _MOST_HINTS:
                    self._hints.clear()
                self._hints[namespace] = pid
                return found
        raise NamespaceUnknown(field, namespace)

    def _candidates(self, namespace: int) -> Iterator[str]:
        if hint := self._hints.get(namespace):
            yield hint
        yield from filter(str.isdecimal, os.listdir("/proc"))  # noqa: PTH208 - as above


def start_of_first(folder: int) -> int | None:
    """When a process started that is the first in its pid namespace; None for any other.

    Args:
        folder: descriptor of its folder in /proc.

    Returns:
        Clock ticks since boot, rounded down.
    """
    for line in _read(folder, "status").splitlines():
        if line.startswith("NSpid:"):
            is_first = line.split()[-1] == "1"
            return _start_tick(_read(folder, "stat")) if is_first else None
    return None


def _start_tick(stat: str) -> int:
    return int(stat.rpartition(")")[2].split()[_START_TIME])


def _maps(folder: int) -> tuple[str, str]:
    return _read(folder, "uid_map"), _read(folder, "gid_map")


def _read(folder: int, name: str) -> str:
    with open(
        name, errors="replace", opener=lambda path, flags: os.open(path, flags, dir_fd=folder)
    ) as file:
        return file.read()
