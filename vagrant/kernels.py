"""The kernels that peercredd is proven on: `kernels.json`, which all others read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from vagrant.errors import LabError

FILE = Path(__file__).with_name("kernels.json")


class Kernel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One kernel of a Debian release, and what has to work there."""

    name: str
    suite: str
    """The release whose Python and BCC run on it."""
    archives: tuple[str, ...]
    """Where packages come from: suites, or what follows one, as ``-security``."""
    package: str
    """The kernel's package as apt takes it: ``NAME`` or ``NAME/SUITE``."""
    release: str
    """What ``uname -r`` begins with."""
    bcc: str
    """What ``bcc.__version__`` begins with."""
    status: Literal["supported", "too-old"]
    hook_sets: tuple[str, ...]
    """Each has to pass every kernel and conformance test."""
    reason: str = ""
    """Why the kernel is too old, or a hook set is not among those."""
    is_bare: bool = False
    """Whether its box has nothing that the project needs."""

    def bare(self) -> Kernel:
        """The same, for a box of its own without what the project needs."""
        return msgspec.structs.replace(self, name=f"{self.name}-bare", is_bare=True)


class _List(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    command_line: str
    kernels: tuple[Kernel, ...]


_LIST = msgspec.json.decode(FILE.read_bytes(), type=_List)
COMMAND_LINE = _LIST.command_line
HOOK_SETS = sorted({name for kernel in _LIST.kernels for name in kernel.hook_sets})
KERNELS = {kernel.name: kernel for kernel in _LIST.kernels}


def find(name: str) -> Kernel:
    """Return the kernel called `name`, also when it is written ``KERNEL=name``.

    Raises:
        LabError: no kernel of the list is called so.
    """
    wanted = name.removeprefix("KERNEL=")
    if wanted not in KERNELS:
        raise LabError(f"no kernel '{wanted}' in the list; take one of: {', '.join(KERNELS)}")
    return KERNELS[wanted]


HEADER = ("Name", "Kernel", "BCC", "Hook sets", "Status", "Reason")


def rows() -> list[tuple[str, ...]]:
    """What people are told about each kernel, under `HEADER`."""
    return [
        (
            kernel.name,
            kernel.release,
            kernel.bcc,
            ", ".join(kernel.hook_sets) or "none",
            kernel.status.replace("-", " "),
            kernel.reason,
        )
        for kernel in KERNELS.values()
    ]
