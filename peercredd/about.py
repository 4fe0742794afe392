"""What a capture's loader says of it, in one of the capture's maps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peercredd.libbpf import Map
from peercredd.records import ABOUT_SIZE

_KEY = bytes(4)


def read(maps: Path) -> dict[str, Any]:
    """What is said of the capture whose maps are pinned in a folder.

    Raises:
        KernelError: the map is not there.
        ValueError: it has not been written.
    """
    text = Map.open(maps / "about").lookup(_KEY) or b""
    about: dict[str, Any] = json.loads(text.rstrip(b"\0"))
    return about


def write(table: int, about: Mapping[str, Any]) -> None:
    """Say it in the map of that descriptor.

    Raises:
        KernelError: it cannot be written.
    """
    Map(table).update(_KEY, json.dumps(about).encode().ljust(ABOUT_SIZE, b"\0"))
