"""Set-user-ID programs: copies of others."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from harness.requirements import cannot_run


@contextmanager
def open_folder() -> Iterator[Path]:
    """A folder all may enter, where set-user-ID bits count."""
    for parent in ("/tmp", "/var/tmp", "/root"):
        if not os.statvfs(parent).f_flag & os.ST_NOSUID:
            with TemporaryDirectory(dir=parent, prefix="peercredd-test-") as folder:
                Path(folder).chmod(0o755)
                yield Path(folder)
            return
    cannot_run("every temporary folder is mounted nosuid: mount one without")


def set_user_id_copy(program: str, folder: Path, uid: int) -> Path:
    """A copy of a program that runs as its owner, `uid`, and as that group."""
    copy = folder / f"{Path(program).name}-{uid}"
    shutil.copy(program, copy)
    os.chown(copy, uid, uid)
    copy.chmod(0o6755)
    return copy
