import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from peercredd.config import OPTIONS

Run = Callable[..., "subprocess.CompletedProcess[str]"]

POWERLESS = () if os.geteuid() else ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
"""Still able to read the tree and the environment, wherever they are."""


@pytest.fixture
def peercredd(tmp_path: Path) -> Run:
    """Run the command in an empty folder, on an empty configuration file."""
    file = tmp_path / "empty.toml"
    file.touch()

    def run(
        *arguments: str | Path, config: Path | None = file, prefix: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        named = ("--config", config) if config else ()
        return subprocess.run(
            [*prefix, sys.executable, "-m", "peercredd", *named, *arguments],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_config_prints_a_file_that_says_the_same(peercredd: Run, tmp_path: Path) -> None:
    first = peercredd("--max-pending", "7", "--keep", "--log-level", "error", "config")
    printed = tmp_path / "printed.toml"
    printed.write_text(first.stdout)

    second = peercredd("config", "--json", config=printed)

    assert first.returncode == second.returncode == 0
    assert tomllib.loads(first.stdout)["capture"]["max_pending"] == 7
    values = json.loads(second.stdout)
    assert {key: entry["value"] for key, entry in values.items()} == {
        key: option.default for key, option in OPTIONS.items()
    } | {"capture.max_pending": 7, "capture.keep": True, "log.level": "error"}
    assert {entry["source"] for entry in values.values()} == {f"file:{printed}"}


def test_config_names_the_source_of_each_value(peercredd: Run, tmp_path: Path) -> None:
    file = tmp_path / "some.toml"
    file.write_text("[capture]\nkeep = true\n")

    lines = peercredd("--no-keep", "--group", "staff", "config", config=file).stdout.splitlines()
    entries = json.loads(peercredd("config", "--json", config=file).stdout)

    assert 'api.group = "staff"' in next(line for line in lines if "flag:--group" in line)
    assert "capture.keep = false" in next(line for line in lines if "flag:--keep" in line)
    assert entries["capture.keep"] == {"value": True, "source": f"file:{file}"}
    assert entries["api.group"] == {"value": "peercredd", "source": "default"}


def test_every_option_has_a_flag_that_sets_it(peercredd: Run) -> None:
    other = {
        "a whole number": "17",
        "an absolute path": "/x",
        "the name": "staff",
        "a list of targets": "all",
        "a list of users": "staff",
        "a list of groups": "staff",
        "an address and a port": "127.0.0.1:9338",
    }
    flags = [
        "--hooks=trace",
        "--keep",
        "--no-tcp",
        "--access-listener-details",
        "--log-level=debug",
        "--log-format=json",
    ]
    for option in OPTIONS.values():
        flags += [
            f"{option.flag}={value}"
            for start, value in other.items()
            if option.allowed.startswith(start)
        ]

    values = json.loads(peercredd(*flags, "config", "--json").stdout)

    assert len(flags) == len(OPTIONS)
    for key, entry in values.items():
        assert entry["value"] != OPTIONS[key].default
        assert entry["source"] == f"flag:{OPTIONS[key].flag}"


@pytest.mark.parametrize("command", [(), ("config",), ("check",), ("unload",)])
def test_a_bad_configuration_ends_every_command_with_one_line_and_2(
    peercredd: Run, tmp_path: Path, command: tuple[str, ...]
) -> None:
    file = tmp_path / "bad.toml"
    file.write_text("[api]\nsoket = 1\n")

    done = peercredd(*command, config=file)

    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"peercredd: {file}: 'api.soket': unknown option; did you mean api.socket?\n"
    )


def test_a_file_that_may_not_be_read_is_refused_with_2(peercredd: Run, tmp_path: Path) -> None:
    file = tmp_path / "closed.toml"
    file.touch(mode=0)

    done = peercredd("config", config=file, prefix=POWERLESS)

    assert done.returncode == 2
    assert done.stderr.startswith(f"peercredd: {file}: cannot be read: Permission denied; ")
    assert done.stderr.count("\n") == 1


def test_a_bad_flag_is_refused_with_2(peercredd: Run) -> None:
    done = peercredd("--max-connections", "many", "config")

    assert done.returncode == 2
    assert done.stderr == (
        "peercredd: --max-connections: 'many' is not a whole number from 1 to 16777216\n"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("--nonsense",),
        ("nonsense",),
        ("--log-level", "loud"),
        ("--hooks", "kprobe"),
        ("--group",),
        ("check", "surplus"),
        ("completion",),
        ("completion", "tcsh"),
    ],
)
def test_bad_usage_is_refused_with_one_line_and_2(
    peercredd: Run, arguments: tuple[str, ...]
) -> None:
    done = peercredd(*arguments)

    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"peercredd: .+; see peercredd( \w+)? --help\n", done.stderr)


@pytest.mark.parametrize("arguments", [(), ("--help",), ("check", "--json")])
def test_where_only_the_client_is_installed_one_line_says_how_to_get_the_daemon(
    peercredd: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    missing = tmp_path / "missing"
    missing.mkdir()
    (missing / "msgspec.py").write_text("raise ModuleNotFoundError('no msgspec')")
    monkeypatch.setenv("PYTHONPATH", str(missing), prepend=os.pathsep)

    done = peercredd(*arguments)

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "peercredd: only the client is installed here; install the daemon too: "
        "pip install '<source>[daemon]' (docs/operations.md)\n"
    )


def test_without_privilege_the_daemon_says_what_it_lacks(peercredd: Run) -> None:
    done = peercredd("--log-format", "text", prefix=POWERLESS)

    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "lacks CAP_SYS_ADMIN; run it as root" in done.stderr


def test_without_privilege_nothing_can_be_unloaded(peercredd: Run) -> None:
    done = peercredd("unload", prefix=POWERLESS)

    assert done.returncode == 1
    assert done.stderr == "peercredd: lacks CAP_SYS_ADMIN; run it as root\n"


def test_the_capabilities_of_bpf_alone_are_too_few(peercredd: Run) -> None:
    if os.geteuid():
        pytest.skip("not root: run the tests with sudo")
    done = peercredd("--log-format=text", prefix=("setpriv", "--bounding-set=-sys_admin"))

    assert done.returncode == 1
    assert "lacks CAP_SYS_ADMIN; run it as root" in done.stderr


def test_check_without_privilege_says_so_and_does_not_guess_the_rest(peercredd: Run) -> None:
    done = peercredd("check", "--json", prefix=POWERLESS)

    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert done.returncode == 1
    assert list(checks) == [
        "root or capabilities",
        "BTF",
        "cgroup v2",
        "bpffs",
        "BCC importable",
        "SO_PEERCRED targets",
        "trace loadable",
        "cgroup loadable",
    ]
    assert checks["root or capabilities"]["outcome"] == "failed"
    assert checks["trace loadable"]["outcome"] == "unknown"
    assert checks["cgroup loadable"]["outcome"] == "unknown"
    for check in checks.values():
        assert set(check) == {"name", "outcome", "detail", "mend", "log"}
        assert bool(check["mend"]) == (check["outcome"] != "ok")


def test_check_names_a_cgroup_that_is_none(peercredd: Run, tmp_path: Path) -> None:
    done = peercredd("--cgroup", tmp_path, "check", prefix=POWERLESS)

    assert f"failed   cgroup v2             capture.cgroup: {tmp_path} is no" in done.stdout
    assert "mend: name one in /" in done.stdout


def test_check_names_a_target_that_can_never_be(peercredd: Run, tmp_path: Path) -> None:
    done = peercredd("--so-peercred", tmp_path, "check", "--json", prefix=POWERLESS)

    (check,) = (
        check
        for check in json.loads(done.stdout)["checks"]
        if check["name"] == "SO_PEERCRED targets"
    )
    assert check["outcome"] == "failed"
    assert check["detail"].startswith(f"so_peercred.cgroups: {tmp_path} is outside of the captured")
    assert check["mend"].startswith("name one in it, or ")


def test_check_names_a_pin_directory_that_is_on_no_bpffs(peercredd: Run, tmp_path: Path) -> None:
    done = peercredd("--pin-dir", tmp_path, "check", prefix=POWERLESS)

    assert f"failed   bpffs                 {tmp_path} is not on one" in done.stdout
    assert "mend: name one below /sys/fs/bpf" in done.stdout


def test_check_finds_the_pypi_package_that_is_not_bcc(
    peercredd: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lattices").mkdir()
    (tmp_path / "lattices" / "bcc.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "lattices"), prepend=os.pathsep)

    done = peercredd("check", "--json", prefix=POWERLESS)

    (bcc,) = (c for c in json.loads(done.stdout)["checks"] if c["name"] == "BCC importable")
    assert bcc["outcome"] == "failed"
    assert "cannot import name 'BPF'" in bcc["detail"]
    assert "python3-bpfcc" in bcc["mend"]


def test_nothing_is_imported_from_the_current_directory_by_children(
    peercredd: Run, tmp_path: Path
) -> None:
    (tmp_path / "bcc.py").write_text("raise SystemExit('taken from the current directory')")

    done = peercredd("check", prefix=POWERLESS)

    assert "taken from" not in done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_works_with_a_broken_configuration(
    peercredd: Run, tmp_path: Path, shell: str
) -> None:
    file = tmp_path / "bad.toml"
    file.write_text("=")

    done = peercredd("completion", shell, config=file)

    assert done.returncode == 0
    assert "_PEERCREDD_COMPLETE" in done.stdout


def test_bash_completes_commands_flags_and_choices() -> None:
    def complete(*words: str) -> set[str]:
        done = subprocess.run(
            [sys.executable, "-m", "peercredd"],
            env=os.environ
            | {
                "_PEERCREDD_COMPLETE": "bash_complete",
                "COMP_WORDS": " ".join(["peercredd", *words]),
                "COMP_CWORD": str(len(words)),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        return {line.partition(",")[2] for line in done.stdout.splitlines()}

    assert complete("") >= {"check", "completion", "config", "unload"}
    assert complete("--sweep-i") == {"--sweep-interval-seconds"}
    assert complete("--log-level", "") == {"debug", "info", "warning", "error"}
    assert complete("--hooks", "") == {"auto", "trace", "cgroup"}
    assert complete("check", "--v") == {"--verifier-log"}
    assert complete("so-peercred", "") == {"enable", "disable", "list"}
    assert complete("so-peercred", "enable", "a") == {"all"}
    assert complete("so-peercred", "enable", "--t") == {"--transient"}


def test_the_version_is_shown(peercredd: Run) -> None:
    done = peercredd("--version")

    assert done.returncode == 0
    assert re.fullmatch(r"peercredd (\d\S+|unknown.*)\n", done.stdout)


def test_help_shows_every_flag_its_default_and_examples(peercredd: Run) -> None:
    text = peercredd("--help").stdout

    words = " ".join(text.split())
    for option in OPTIONS.values():
        assert option.flag in text
        assert f"Default: {json.dumps(option.default)}." in words
    assert "Examples:\n" in text
    for command in ("config", "check", "unload", "completion", "so-peercred"):
        assert "Examples:\n" in peercredd(command, "--help").stdout
    for command in ("enable", "disable", "list"):
        assert "Examples:\n" in peercredd("so-peercred", command, "--help").stdout


def test_a_flag_that_may_be_repeated_gives_a_list(peercredd: Run) -> None:
    done = peercredd("--so-peercred", "all", "--so-peercred", "a@b.service", "config", "--json")

    assert json.loads(done.stdout)["so_peercred.cgroups"] == {
        "value": ["all", "a@b.service"],
        "source": "flag:--so-peercred",
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ("so-peercred",),
        ("so-peercred", "enable"),
        ("so-peercred", "enable", "postgresql"),
        ("so-peercred", "enable", "a/b"),
        ("so-peercred", "enable", "a@.service"),
        ("so-peercred", "enable", "--transient", "all"),
        ("so-peercred", "disable", "--transient", "a.service"),
        ("so-peercred", "list", "all"),
        ("--so-peercred", "postgresql", "so-peercred", "list"),
    ],
)
def test_what_is_no_target_is_refused_with_one_line_and_2(
    peercredd: Run, arguments: tuple[str, ...]
) -> None:
    done = peercredd(*arguments)

    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"peercredd: .+\n", done.stderr)


@pytest.mark.parametrize("action", [("enable", "all"), ("disable", "all"), ("list",)])
def test_without_privilege_so_peercred_says_what_it_lacks(
    peercredd: Run, action: tuple[str, ...]
) -> None:
    done = peercredd("so-peercred", *action, prefix=POWERLESS)

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "peercredd: lacks CAP_SYS_ADMIN; run it as root\n"
