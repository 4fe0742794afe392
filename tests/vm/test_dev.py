"""What `./dev` says where the lab cannot run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from vagrant.recipe import PROJECT

SYSTEM = (Path("/usr/sbin"), Path("/usr/bin"), Path("/sbin"), Path("/bin"))
LEFT_OUT = ("qemu-", "apt-")


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    """A copy of `./dev` in a tree whose .venv is up to date, as far as it can tell."""
    for name in ("dev", "pyproject.toml"):
        shutil.copy(PROJECT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    version = subprocess.check_output(["/usr/bin/python3", "--version"], text=True)
    built_from = f"{tmp_path}\n{version}{(tmp_path / 'pyproject.toml').read_text()}"
    (tmp_path / ".venv" / "built-from").write_text(built_from)
    return tmp_path / "dev"


def test_without_qemu_and_without_apt_it_says_what_to_install(dev: Path, tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    for folder in SYSTEM:
        for program in folder.iterdir():
            if not program.name.startswith(LEFT_OUT) and not (programs / program.name).exists():
                (programs / program.name).symlink_to(program)

    done = subprocess.run(
        [dev, "vm-test", "debian12"],
        env=os.environ | {"PATH": str(programs)},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )

    assert done.returncode == 1
    assert "dnf install" in done.stderr
    assert "qemu-system-x86" in done.stderr


def setup_with_uv(dev: Path, uv: str) -> subprocess.CompletedProcess[str]:
    """Let it install, where that is a program of this text, and no index is in reach."""
    programs = dev.parent / "programs"
    programs.mkdir()
    (programs / "uv").write_text(uv)
    (programs / "uv").chmod(0o755)
    (dev.parent / ".venv" / "built-from").unlink()
    path = f"{programs}:{os.environ['PATH']}"
    return subprocess.run(
        [dev, "setup"],
        env=os.environ | {"PATH": path, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )


def test_where_uv_is_it_installs(dev: Path, tmp_path: Path) -> None:
    done = setup_with_uv(dev, '#!/bin/sh\necho "$@" >>calls\n')

    assert done.returncode == 0, done.stderr
    made, filled = (tmp_path / "calls").read_text().splitlines()
    assert made.endswith("--system-site-packages --python /usr/bin/python3 .venv")
    assert filled.endswith(f"--python {tmp_path}/.venv/bin/python --editable .[dev]")
    assert (tmp_path / ".venv" / "built-from").exists()


def test_what_uv_cannot_install_pip_does(dev: Path, tmp_path: Path) -> None:
    done = setup_with_uv(dev, "#!/bin/sh\nexit 2\n")

    assert "uv could not; so pip does it" in done.stderr
    assert "No matching distribution found" in done.stderr
    assert done.returncode == 1
    assert not (tmp_path / ".venv" / "built-from").exists()


def test_a_package_of_what_is_no_version_is_not_begun(dev: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [dev, "deb", "newest", tmp_path / "debs"], stderr=subprocess.PIPE, text=True, check=False
    )

    assert done.returncode == 1
    assert done.stderr.endswith("./dev: 'newest' is no version: ./dev deb 0.1.0+1\n")
    assert not (tmp_path / "debs").exists()


def test_a_box_is_built_of_every_package_that_dev_installs() -> None:
    listed = subprocess.check_output([PROJECT / "dev", "packages"], text=True).split()

    assert {"python3-bpfcc", "linux-libc-dev", "fish", "gcc"} <= set(listed)
