import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
from click.testing import CliRunner, Result

from peercredd import preemption, preflight
from peercredd.cli import main
from peercredd.config import Config, load
from peercredd.preflight import Check

Loader = Callable[[str], None]

BREAKS = """
print("BPF_PROG_LOAD refused", "0: (b7) r0 = 1", sep="\\n", file=sys.stderr)
sys.exit("the kernel cannot attach to tcp_connect; run another kernel")
"""


@pytest.fixture
def loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loader:
    """Put a program in the place of the loader, which would load BPF programs."""
    script = tmp_path / "loader.py"
    monkeypatch.setattr(preflight, "LOADER", (str(script),))
    monkeypatch.setattr(preflight, "missing_capabilities", list)
    monkeypatch.setattr(preemption, "why_not_to_trace", lambda: None)

    def install(program: str) -> None:
        script.write_text(f"import sys\nhook_set = sys.argv[2]\n{program}")

    return install


def loads(hooks: str = "auto") -> dict[str, Check]:
    """What is said of each hook set, by its name."""
    return {
        check.name.removesuffix(" loadable"): check
        for check in preflight.run(load(None, {"capture.hooks": hooks}).config)
        if check.name.endswith(" loadable")
    }


def only(hook_set: str, program: str) -> str:
    indented = program.strip().replace("\n", "\n    ")
    return f"if hook_set == {hook_set!r}:\n    {indented}\n"


def test_every_hook_set_is_looked_at_the_preferred_one_first(loader: Loader) -> None:
    loader("")

    assert [(name, check.outcome) for name, check in loads().items()] == [
        ("trace", "ok"),
        ("cgroup", "ok"),
    ]


def test_it_is_said_that_trace_was_attached_and_cgroup_was_not(loader: Loader) -> None:
    loader("")

    checks = loads()

    assert "attached for an instant" in checks["trace"].detail
    assert "attached" not in checks["cgroup"].detail


@pytest.mark.parametrize(("broken", "working"), [("trace", "cgroup"), ("cgroup", "trace")])
def test_with_auto_one_that_works_is_enough_and_the_other_says_why_not(
    loader: Loader, broken: str, working: str
) -> None:
    loader(only(broken, BREAKS))

    checks = loads("auto")

    assert checks[working].outcome == "ok"
    assert checks[broken].outcome == "unused"
    assert checks[broken].detail == "the kernel cannot attach to tcp_connect"
    assert checks[broken].mend == "run another kernel"


def test_auto_spares_trace_where_it_would_miss_calls(
    loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader("")
    monkeypatch.setattr(preemption, "why_not_to_trace", lambda: "it would miss calls")

    assert (loads()["trace"].outcome, loads()["trace"].detail) == ("unused", "it would miss calls")
    assert loads("trace")["trace"].outcome == "ok"


def test_with_auto_none_that_works_is_a_failure(loader: Loader) -> None:
    loader(BREAKS)

    assert [check.outcome for check in loads("auto").values()] == ["failed", "failed"]


@pytest.mark.parametrize(("named", "other"), [("trace", "cgroup"), ("cgroup", "trace")])
def test_one_that_is_named_has_to_work_and_the_other_is_not_tried(
    loader: Loader, named: str, other: str
) -> None:
    loader(only(named, BREAKS) + only(other, "raise SystemExit('it was tried')"))

    checks = loads(named)

    assert checks[named].outcome == "failed"
    assert checks[other].outcome == "unused"
    assert checks[other].detail == f"not tried: capture.hooks is {named}"


def test_a_named_one_that_works_is_ok(loader: Loader) -> None:
    loader(only("cgroup", BREAKS))

    assert loads("trace")["trace"].outcome == "ok"


def test_the_loader_is_asked_for_a_dry_run_with_its_log(loader: Loader) -> None:
    loader("sys.exit(' '.join(sys.argv[1:]))")

    assert loads()["trace"].detail == "--dry-run trace --log"


def test_the_log_of_what_does_not_load_is_kept_whole_and_apart_from_the_one_line(
    loader: Loader,
) -> None:
    loader(only("trace", BREAKS) + "print('a warning', file=sys.stderr)")

    checks = loads()

    assert checks["trace"].detail == "the kernel cannot attach to tcp_connect"
    assert checks["trace"].log == "BPF_PROG_LOAD refused\n0: (b7) r0 = 1"
    assert checks["cgroup"].log == ""


def test_where_the_loader_knows_no_mend_the_whole_log_is_pointed_to(loader: Loader) -> None:
    loader("sys.exit('the kernel refuses tcp_connect: invalid mem access')")

    assert all("peercredd check --verifier-log" in check.mend for check in loads().values())


def test_a_loader_that_dies_without_a_word_is_a_failure(loader: Loader) -> None:
    loader("import os; os.kill(os.getpid(), 9)")

    assert {(check.outcome, check.detail) for check in loads().values()} == {
        ("failed", "exit status -9")
    }


TRACE_UNUSED = Check("trace loadable", "unused", "refused", "run another", "line 1\nline 2")


def checked(
    monkeypatch: pytest.MonkeyPatch, checks: list[Check], *arguments: str, file: Path
) -> Result:
    def run(_: Config) -> list[Check]:
        return checks

    monkeypatch.setattr(preflight, "run", run)
    file.touch()
    return CliRunner().invoke(main, ["--config", str(file), "check", *arguments])


@pytest.mark.parametrize(
    ("outcome", "status"), [("ok", 0), ("unused", 0), ("failed", 1), ("unknown", 1)]
)
def test_what_is_unused_is_no_failure(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    outcome: Literal["ok", "failed", "unknown", "unused"],
    status: int,
) -> None:
    check = TRACE_UNUSED._replace(outcome=outcome)

    result = checked(monkeypatch, [check], file=tmp_path / "empty.toml")

    assert result.exit_code == status
    assert result.output.splitlines()[0].split() == [outcome, "trace", "loadable", "refused"]


def test_the_whole_log_comes_after_the_checks_and_on_demand_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checks = [TRACE_UNUSED, Check("cgroup loadable", "ok", "compiled")]
    file = tmp_path / "empty.toml"

    brief = checked(monkeypatch, checks, file=file).output
    whole = checked(monkeypatch, checks, "--verifier-log", file=file).output
    brief_json = checked(monkeypatch, checks, "--json", file=file).output
    whole_json = checked(monkeypatch, checks, "--verifier-log", "--json", file=file).output

    assert whole == brief + "\nlog of trace loadable:\nline 1\nline 2\n"
    assert [check["log"] for check in json.loads(brief_json)["checks"]] == ["", ""]
    assert [check["log"] for check in json.loads(whole_json)["checks"]] == ["line 1\nline 2", ""]
