"""The pins of a capture stay: who removes them by hand finds them back.

Without pins the capture would end with the daemon, and nobody new could open it.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog

from peercredd import pins
from peercredd.libbpf import KernelError, get_pinned, pin

log = structlog.get_logger()


class Guard:
    """Holds what is pinned for as long as the ``with`` block runs.

    Not the attachments of SO_PEERCRED on TCP: who removes one of those pins ends it.
    """

    def __init__(self, pin_dir: Path) -> None:
        """Open what the capture in `pin_dir` has pinned; the caller holds the folder.

        Raises:
            KernelError: something is not there any more.
        """
        self._pin_dir = pin_dir
        self._capture = pin_dir / pins.CAPTURE
        self._resources = ExitStack()
        self._held: dict[Path, int] = {}
        try:
            for part in (pins.MAPS, pins.LINKS, pins.PROGRAMS):
                for path in (self._capture / part).iterdir():
                    self._held[path] = get_pinned(path)
                    self._resources.callback(os.close, self._held[path])
            self._identity = pin_dir.stat()
        except BaseException:
            self._resources.close()
            raise

    def is_complete(self) -> bool:
        """Whether all pins are there."""
        return all(path.exists() for path in self._held)

    def restore(self) -> str | None:
        """Put back the pins that are missing.

        Returns:
            What is wrong, and what mends it, if that could not be done.
        """
        missing = [path for path in self._held if not path.exists()]
        try:
            if not self._is_same_folder():
                # The lock has gone with the old one, or with its file system.
                self._resources.enter_context(pins.hold(self._pin_dir))
                self._identity = self._pin_dir.stat()
            for part in pins.PARTS:
                (self._capture / part).mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in missing:
                pin(self._held[path], path)
        except pins.Held as error:
            return str(error)
        except OSError as error:
            reason = error.strerror if isinstance(error, KernelError) else str(error)
            return f"pins are missing below {self._pin_dir}, and cannot be put back: {reason}"
        log.warning(
            "pins had been removed, and were put back; only 'peercredd unload' should do that",
            pins=str(self._pin_dir),
            missing=len(missing),
        )
        return None

    def _is_same_folder(self) -> bool:
        try:
            return os.path.samestat(self._pin_dir.stat(), self._identity)
        except FileNotFoundError:
            return False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._resources.close()
