"""Programs started in a cgroup and as a user, that know nothing of the tests."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.cgroup import Cgroup


def command(
    cgroup: Cgroup, uid: int, *program: str | Path, groups: Iterable[int] = ()
) -> list[str | Path]:
    """The words that run a program there; its pid is that of the process they start."""
    supplementary = ",".join(map(str, groups))
    return [
        *("sh", "-c", 'echo 0 >"$0" && exec "$@"', cgroup.path / "cgroup.procs"),
        *("setpriv", "--pdeathsig", "KILL", f"--reuid={uid}", f"--regid={uid}"),
        *((f"--groups={supplementary}",) if supplementary else ("--clear-groups",)),
        *("--", *program),
    ]


@contextmanager
def running(words: list[str | Path]) -> Iterator[subprocess.Popen[str]]:
    """Start a program whose output is read; it is killed at the end, should it still run."""
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()
