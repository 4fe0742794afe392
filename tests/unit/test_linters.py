import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
TYPED = ("peercredd", "clients", "proto", "bench", "vagrant", "tests")
LINTERS = {
    "ruff check": ("ruff", "check", "."),
    "ruff format": ("ruff", "format", "--check", "--diff", "."),
    "mypy": ("mypy", *TYPED),
}


def run(*arguments: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=PROJECT,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.fail(done.stdout, pytrace=False)


@pytest.mark.parametrize("linter", LINTERS)
def test_the_whole_tree_passes(linter: str) -> None:
    run("-m", *LINTERS[linter])


def test_what_is_generated_from_the_proto_is_committed_as_generated(tmp_path: Path) -> None:
    run("proto/generate.py", tmp_path)

    generated = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    stale = [
        str(path)
        for path in generated
        if not (PROJECT / path).is_file()
        or (PROJECT / path).read_bytes() != (tmp_path / path).read_bytes()
    ]
    assert generated
    assert not stale, "run ./dev proto"
