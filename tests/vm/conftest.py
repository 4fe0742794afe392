"""A lab of the test's own, and what has to be installed for it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from harness.lab import QEMU, Lab


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with ExitStack() as exit_stack:
        yield Lab(tmp_path / "lab", exit_stack)


@pytest.fixture
def needs_qemu() -> None:
    if not shutil.which(QEMU):
        pytest.skip(f"no {QEMU}: ./dev vm-box debian12 installs what the lab needs")


@pytest.fixture
def needs_mmdebstrap() -> None:
    if not shutil.which("mmdebstrap"):
        pytest.skip("no mmdebstrap: ./dev vm-box debian12 installs what the lab needs")
