"""A wall clock that can be set for some programs, and for nobody else."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path
from types import TracebackType

_SOURCE = Path(__file__).with_suffix(".c")


class WallClock:
    """What CLOCK_REALTIME is to whatever is started in its `environment`."""

    def __init__(self, folder: Path) -> None:
        library, file = folder / "wall_clock.so", folder / "wall_clock"
        compile_it = ["gcc", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(library)]
        subprocess.run([*compile_it, str(_SOURCE), "-ldl"], check=True)
        file.write_bytes(bytes(8))
        self.environment = {"LD_PRELOAD": str(library), "WALL_CLOCK": str(file)}
        self._stream = file.open("r+b")
        self._off = mmap.mmap(self._stream.fileno(), 8)

    def set_off(self, seconds: int) -> None:
        """Have it be wrong by so much from now on."""
        self._off[:] = seconds.to_bytes(8, sys.byteorder, signed=True)

    def __enter__(self) -> WallClock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._off.close()
        self._stream.close()
