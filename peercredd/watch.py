"""Waiting for paths to come, go or be replaced, with nothing polled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from asyncinotify import Inotify, Mask

_COMES_OR_GOES = Mask.CREATE | Mask.DELETE | Mask.MOVED_FROM | Mask.MOVED_TO | Mask.ONLYDIR


class Changes:
    """What happens to some paths from now on; they need not exist, nor what they are in.

    To miss nothing, look at the paths after this is made, and make another one after each
    change: one of a folder above may have brought or taken those below.

    Each folder above is watched, not only the nearest: the kernel does not say of a watched
    cgroup that it is removed, but of the one above that something in it is.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        """Begin to watch.

        Raises:
            OSError: the kernel's limits on inotify(7) are reached.
        """
        self._names: defaultdict[Path, set[str]] = defaultdict(set)
        self._inotify = Inotify()
        try:
            for path in paths:
                self._watch_above(path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the descriptor back."""
        self._inotify.close()

    async def next(self) -> None:
        """Wait until something may have happened to one of the paths."""
        async for event in self._inotify:
            # Without a watch: the queue ran over.
            if event.watch is None or str(event.name) in self._names[event.watch.path]:
                return

    def _watch_above(self, path: Path) -> None:
        # From the top: what is made below while this runs is seen from above.
        for folder, below in zip(reversed(path.parents), path.parts[1:], strict=True):
            try:
                watch = self._inotify.add_watch(folder, _COMES_OR_GOES)
            except (FileNotFoundError, NotADirectoryError):
                return
            self._names[watch.path].add(below)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
