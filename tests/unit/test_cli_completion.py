import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SHELLS = ("bash", "zsh", "fish")


def peercred(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "peercred", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """One in which the command is installed as `peercred`."""
    command = tmp_path / "bin" / "peercred"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m peercred "$@"\n')
    command.chmod(0o755)
    return os.environ | {
        "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path),
    }


def shell(name: str, program: str, environment: dict[str, str], folder: Path) -> list[str]:
    """Run `program` where $SCRIPT is the file with the completion script."""
    if not shutil.which(name):
        pytest.skip(f"{name} is not installed")
    script = folder / "script"
    script.write_text(peercred("completion", name))
    done = subprocess.run(
        [name, "-c", program],
        env=environment | {"SCRIPT": str(script)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


@pytest.mark.parametrize("name", SHELLS)
def test_the_json_form_carries_the_same_script(name: str) -> None:
    document = json.loads(peercred("completion", name, "--json"))

    assert document == {"shell": name, "script": peercred("completion", name)}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["lo"], {"lookup"}),
        ([""], {"lookup", "list", "watch", "status", "whoami", "run", "doctor", "completion"}),
        (["whoami", "--ip"], {"--ipv6"}),
        (["list", "--net"], {"--netns-cookie"}),
        (["completion", "f"], {"fish"}),
    ],
)
def test_bash_completes_with_the_script(
    tmp_path: Path, environment: dict[str, str], words: list[str], expected: set[str]
) -> None:
    program = f"""
        source "$SCRIPT"
        complete -p peercred >/dev/null || exit 1
        COMP_WORDS=({shlex.join(["peercred", *words])})
        COMP_CWORD={len(words)}
        _peercred_completion peercred
        echo "${{COMPREPLY[@]}}"
    """

    assert set(shell("bash", program, environment, tmp_path)) == expected


def test_zsh_takes_the_script(tmp_path: Path, environment: dict[str, str]) -> None:
    program = """
        autoload -Uz compinit && compinit -u -d "$HOME/zcompdump"
        source "$SCRIPT"
        print -- $_comps[peercred]
    """

    assert shell("zsh", program, environment, tmp_path) == ["_peercred_completion"]


def test_fish_completes_with_the_script(tmp_path: Path, environment: dict[str, str]) -> None:
    shown = shell("fish", "source $SCRIPT; complete -C 'peercred lo'", environment, tmp_path)

    assert shown[:1] == ["lookup"]
