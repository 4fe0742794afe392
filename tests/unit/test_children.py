import asyncio
import os
import sys
from pathlib import Path

import pytest

from peercredd import children

ARGUMENTS: dict[str, str | int] = {"name": "a 'b' \"c\"", "count": 3}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that children can run, yet to be written."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    return tmp_path / "work_of_a_child.py"


async def outcome(timeout_seconds: float = 60) -> str:
    async with children.start("work_of_a_child", ARGUMENTS) as child:
        return await children.result(child, "worker", timeout_seconds)


def test_arguments_arrive_and_output_comes_back(module: Path) -> None:
    module.write_text("import sys; print(sys.argv[1])")

    assert asyncio.run(outcome()).strip() == '{"name": "a \'b\' \\"c\\"", "count": 3}'


def test_ctrl_c_on_a_terminal_does_not_reach_a_child(module: Path) -> None:
    # A terminal signals every process of its foreground group.
    module.write_text("import os; print(os.getpgrp())")

    assert int(asyncio.run(outcome())) != os.getpgrp()


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import sys; sys.exit('no BTF')", "the worker failed: no BTF"),
        ("raise ValueError('x')", "the worker failed: ValueError: x"),
        ("import os; os._exit(3)", "the worker failed: exit status 3"),
        ("import os; os.kill(os.getpid(), 9)", "the worker died: Killed (signal 9)"),
        ("import os; os.kill(os.getpid(), 40)", "the worker died: Real-time signal 6 (signal 40)"),
    ],
)
def test_a_child_that_fails_is_reported_in_one_line(module: Path, program: str, said: str) -> None:
    module.write_text(program)

    with pytest.raises(children.ChildError) as failed:
        asyncio.run(outcome())

    assert str(failed.value) == said


def test_a_child_that_cannot_be_started_is_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")

    with pytest.raises(
        children.ChildError, match="work_of_a_child cannot be started: No such file"
    ):
        asyncio.run(outcome())


def test_a_child_that_hangs_is_reported_and_killed(module: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pid")
    module.write_text(
        f"import os, signal\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "signal.pause()"
    )

    async def until_it_hangs() -> int:
        async with children.start("work_of_a_child", ARGUMENTS) as child:
            with open(tmp_path / "pid") as pid:
                assert int(pid.read()) == child.pid
            with pytest.raises(children.ChildError, match=r"did not finish in 0\.01 s"):
                await children.result(child, "worker", 0.01)
        return child.pid

    with pytest.raises(ProcessLookupError):
        os.kill(asyncio.run(until_it_hangs()), 0)


def test_cancellation_kills_the_child(module: Path) -> None:
    module.write_text("import signal\nsignal.pause()")

    async def cancelled() -> int:
        pids = asyncio.Queue[int]()

        async def work() -> None:
            async with children.start("work_of_a_child", ARGUMENTS) as child:
                pids.put_nowait(child.pid)
                await children.result(child, "worker", 60)

        task = asyncio.create_task(work())
        pid = await pids.get()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return pid

    with pytest.raises(ProcessLookupError):
        os.kill(asyncio.run(cancelled()), 0)


def test_a_child_imports_nothing_from_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work_of_a_child.py").touch()
    monkeypatch.chdir(tmp_path)

    with pytest.raises(children.ChildError, match="No module named work_of_a_child"):
        asyncio.run(outcome())
