from pathlib import Path

import pytest

from peercredd.hooks import HOOK_SETS
from vagrant import kernels
from vagrant.errors import LabError

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_docs_show_the_list() -> None:
    rows = [f"| {' | '.join(row)} |" for row in (kernels.HEADER, *kernels.rows())]
    shown = (DOCS / "kernels.md").read_text().splitlines()

    assert [row for row in rows if row not in shown] == []
    assert len([line for line in shown if line.startswith("| ") and "---" not in line]) == len(rows)


@pytest.mark.parametrize("written", ["debian12", "KERNEL=debian12"])
def test_a_kernel_is_found_by_its_name(written: str) -> None:
    assert kernels.find(written).release == "6.1"


def test_a_kernel_that_is_not_in_the_list_is_told_those_that_are() -> None:
    with pytest.raises(LabError) as refused:
        kernels.find("debian7")

    assert "no kernel 'debian7'" in str(refused.value)
    assert all(name in str(refused.value) for name in kernels.KERNELS)


@pytest.mark.parametrize("kernel", kernels.KERNELS.values(), ids=lambda kernel: kernel.name)
def test_a_kernel_is_tested_with_every_hook_set_or_there_is_a_reason(
    kernel: kernels.Kernel,
) -> None:
    assert set(kernel.hook_sets) == set(HOOK_SETS) or kernel.reason
    assert bool(kernel.hook_sets) == (kernel.status == "supported")
