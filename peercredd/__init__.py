"""The daemon: records who connects over loopback TCP, and answers who it was."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__: str

if not TYPE_CHECKING:

    def __getattr__(name: str) -> str:
        # On demand: importlib.metadata takes 40 ms and 2 MB, and few need it.
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import PackageNotFoundError, version

        try:
            found = version("peercredd")
        except PackageNotFoundError:
            found = "unknown (not installed)"
        globals()[name] = found
        return found
