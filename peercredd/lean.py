"""What a process does not carry: what it would import or keep, and never use."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

_M_MMAP_THRESHOLD: Final = -3
_DEFAULT_MMAP_THRESHOLD: Final = 128 * 1024
"""Bytes: of malloc.h, as is the name."""
_MADV_DONTNEED: Final = 4

_MAPPING: Final = re.compile(
    r"^(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) r-[x-]p \S+ \S+ \S+ +/.*\n"
    r"(?:[A-Z].*\n)*?Anonymous: +(?P<anonymous>\d+) kB\n"
    r"(?:[A-Z].*\n)*?Swap: +(?P<swapped>\d+) kB\n",
    re.MULTILINE,
)
"""Of a file that is only read and run, in proc_pid_smaps(5)."""


def leave_out() -> None:
    """Have libraries do without what they would import and nothing here uses.

    structlog imports rich, and asyncio ssl, where they are installed: 8 MB. The package of
    pyroute2 imports each of its modules: a quarter of a second. That of peercred imports the
    clients, beside the messages: half a megabyte. Comes before any of them.
    """
    # None says "not installed".
    sys.modules.update(dict.fromkeys(("rich", "ssl")))  # type: ignore[arg-type]
    for name in ("pyroute2", "peercred"):
        if package := importlib.util.find_spec(name):
            # Modules are found in the package, of which nothing has been run.
            sys.modules[name] = importlib.util.module_from_spec(package)


def let_in(library: str) -> None:
    """Let a library that was left out be imported after all."""
    if sys.modules.get(library, library) is None:
        del sys.modules[library]


def keep_no_freed_blocks() -> None:
    """Have what importing allocates in large blocks go back to the kernel when it is freed.

    The first such block freed would have glibc take the next ones out of its heap, which keeps
    its size: a megabyte. A threshold that was set, to whatever, stays: mallopt(3).
    """
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _DEFAULT_MMAP_THRESHOLD)


def give_back_freed_memory() -> None:
    """Have glibc return what it holds between blocks that are in use: malloc_trim(3).

    It returns by itself only what is freed last, and gRPC frees from many threads. Takes some 20
    microseconds when there is nothing to return, and milliseconds for hundreds of megabytes.
    """
    ctypes.CDLL(None).malloc_trim(0)


def resident_memory() -> int:
    """Bytes that this process has in memory: proc_pid_statm(5)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def give_back_code() -> None:
    """Unmap the pages of programs and libraries that only starting took: seven megabytes.

    They stay in the files; what is used later is mapped again as it is used: madvise(2). Not to be
    called while another thread may load a library, or map and unmap files.
    """
    madvise = ctypes.CDLL(None).madvise
    with suppress(OSError):  # a kernel without smaps
        for mapping in _MAPPING.finditer(Path("/proc/self/smaps").read_text()):
            # With pages of this process's own it would lose what was written there.
            if mapping["anonymous"] == mapping["swapped"] == "0":
                start, end = (int(mapping[limit], 16) for limit in ("start", "end"))
                madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)
