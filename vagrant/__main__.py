"""``python -m vagrant``: what `./dev vm-...` does."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import Coroutine, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click
from rich.console import Console
from rich.table import Table

from vagrant import box, kernels, package, report, suite
from vagrant.errors import LabError
from vagrant.kernels import KERNELS, Kernel
from vagrant.machine import accelerator, require_space, running
from vagrant.recipe import PROJECT
from vagrant.report import Outcome

WIDTH = 160
MAX_CPUS = 8
T = TypeVar("T")

_PASSES_ON = {"ignore_unknown_options": True}


@click.group()
def main() -> None:
    """Prove peercredd on the kernels that users run, in machines of QEMU's."""


@main.command("vm-list")
def list_kernels() -> None:
    r"""Show the kernels, and what has to work on each.

    \b
    They come from vagrant/kernels.json; docs/vm.md says how to add one.
    """
    table = Table(*kernels.HEADER, "Box")
    for kernel, row in zip(KERNELS.values(), kernels.rows(), strict=True):
        found = box.existing(kernel)
        table.add_row(*row, str(found.folder) if found else "not built")
    Console(width=WIDTH).print(table)


@main.command("vm-box")
@click.argument("kernel")
def pack_box(kernel: str) -> None:
    r"""Build the KERNEL's box unless it is there, and print where it is for Vagrant to add.

    \b
    vagrant box add --name peercredd/debian12 "$(./dev vm-box debian12)"

    Beside it are the kernel and the initrd that the machine is started with.
    """
    click.echo(box.pack(box.get(kernels.find(kernel))))


@main.command("vm-accelerator")
@click.argument("kernel")
def show_accelerator(kernel: str) -> None:
    """Print what a machine with KERNEL runs on here: kvm, or tcg, which is emulation."""
    click.echo(_wait_for(accelerator(box.get(kernels.find(kernel)))))


@main.command("vm-test", context_settings=_PASSES_ON)
@click.argument("kernel")
@click.option(
    "--hook-set",
    "only",
    multiple=True,
    type=click.Choice(kernels.HOOK_SETS),
    help="Test with this one, and not with those that kernels.json names. May be repeated.",
)
@click.argument("pytest", nargs=-1, type=click.UNPROCESSED)
def test(kernel: str, only: tuple[str, ...], pytest: tuple[str, ...]) -> None:
    r"""Run the kernel and conformance tests on KERNEL, with each hook set.

    Builds the kernel's box unless it is there, boots it, copies this tree into it and
    installs it as README says. What follows KERNEL goes to pytest. A test that is skipped
    has not passed. The machine is gone afterwards; the results stay, in vm-results.

    \b
    ./dev vm-test debian12
    ./dev vm-test debian12 --hook-set trace -k Fast
    """
    found = kernels.find(kernel)
    _test([found], only, pytest, 1)


@main.command("vm-test-all", context_settings=_PASSES_ON)
@click.option("--jobs", default=1, type=click.IntRange(1), help="Machines at a time.")
@click.argument("pytest", nargs=-1, type=click.UNPROCESSED)
def test_all(jobs: int, pytest: tuple[str, ...]) -> None:
    """Do what vm-test does on every kernel of the list, and print one table."""
    _test(list(KERNELS.values()), (), pytest, jobs)


@main.command("vm-deb")
@click.argument("kernel")
def deb(kernel: str) -> None:
    r"""Build the Debian package, and see it live and go in a machine with KERNEL.

    The machine is one of Debian's that has nothing the package needs: a box of its own. In
    it, apt installs the package, then one of a newer version; the daemon is restarted, stopped
    and killed; and the package is purged. Connections of several users have to be answered for
    throughout, and nothing may be left behind. What is done is tests/vm/deb/life.sh.

    The package is built for this machine's Python: KERNEL has to be of the same release of
    Debian.

    \b
    ./dev vm-deb debian12
    """
    boxed = box.get(kernels.find(kernel).bare())
    logs = _results() / boxed.kernel.name
    logs.mkdir(parents=True)
    is_kept = _wait_for(_see_package(boxed, logs))
    click.echo(f"Logs: {logs}")
    if not is_kept:
        raise SystemExit(1)


async def _see_package(boxed: box.Box, logs: Path) -> bool:
    return await package.see(boxed, await accelerator(boxed), _cpus(1), logs)


@main.command("vm-shell")
@click.argument("kernel")
def shell(kernel: str) -> None:
    r"""Open a shell on KERNEL, in this tree, with the daemon running.

    The tree is a copy, and the machine is gone when the shell ends. The daemon is a unit:

    \b
    journalctl -u peercredd     what it says
    systemctl stop peercredd    end it
    peercred doctor             what the machine can do
    """
    boxed = box.get(kernels.find(kernel))
    with tempfile.TemporaryDirectory(prefix="peercredd-vm-") as logs:
        _wait_for(_shell(boxed, Path(logs)))


async def _shell(boxed: box.Box, logs: Path) -> None:
    require_space(1)
    click.echo(f"{boxed.kernel.name}: booting, and installing the project", err=True)
    async with running(boxed, await accelerator(boxed), _cpus(1), logs) as machine:
        guest = suite.Guest(machine, logs)
        await guest.install()
        # Of this type it is waited for: emulated, it compiles for long. There is a shell anyway.
        start = (
            "systemd-run --quiet --unit=peercredd --property=Type=notify "
            "--property=TimeoutStartSec=5min $PWD/.venv/bin/peercredd"
        )
        for line in await guest.ask(f"{start} || echo 'no daemon: see journalctl -u peercredd'"):
            click.echo(line, err=True)
        terminal = await asyncio.create_subprocess_exec(*guest.shell())
        await terminal.wait()


def _test(
    wanted: Sequence[Kernel], only: Sequence[str], arguments: Sequence[str], jobs: int
) -> None:
    boxes = [box.get(kernel) for kernel in wanted]
    results = _results()
    outcomes = _wait_for(_test_boxes(boxes, only, arguments, jobs, results))
    Console(width=WIDTH).print(report.render(outcomes))
    click.echo(f"Results and logs: {results}")
    if not all(outcome.is_ok for outcome in outcomes):
        raise SystemExit(1)


async def _test_boxes(
    boxes: Sequence[box.Box],
    only: Sequence[str],
    arguments: Sequence[str],
    jobs: int,
    results: Path,
) -> list[Outcome]:
    require_space(min(jobs, len(boxes)))
    with_what = await accelerator(boxes[0])
    free = asyncio.Semaphore(jobs)

    async def test_one(boxed: box.Box) -> list[Outcome]:
        async with free:
            logs = results / boxed.kernel.name
            logs.mkdir(parents=True)
            click.echo(f"{boxed.kernel.name}: booting; logs in {logs}", err=True)
            hook_sets = only or boxed.kernel.hook_sets
            return await suite.test(
                boxed, with_what, _cpus(jobs), hook_sets, arguments, logs, echo=jobs == 1
            )

    async with asyncio.TaskGroup() as group:
        tests = [group.create_task(test_one(boxed)) for boxed in boxes]
    return [outcome for task in tests for outcome in task.result()]


def _results() -> Path:
    results = Path(os.environ.get("PEERCREDD_VM_RESULTS", PROJECT / "vm-results")).absolute()
    return results / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}"


def _cpus(jobs: int) -> int:
    return max(2, min(MAX_CPUS, len(os.sched_getaffinity(0)) // jobs))


_ENDING = tuple(
    number
    for number in (signal.SIGTERM, signal.SIGHUP)
    if signal.getsignal(number) is not signal.SIG_IGN  # nohup(1)
)
"""Besides SIGINT: the second is sent when the terminal is closed."""


def _wait_for(work: Coroutine[Any, Any, T]) -> T:
    """Run `work`; a signal that ends this process lets it clean up first."""

    async def cancelled_by_signals() -> T:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task

        def cancel(_number: int, _frame: object) -> None:
            # A second one, as comes when ./dev is killed as well, would end the cleaning up.
            for each in _ENDING:
                signal.signal(each, signal.SIG_IGN)
            loop.call_soon_threadsafe(task.cancel)

        # Not by the loop: when it is closed, signals of which it knew are deadly.
        for number in _ENDING:
            signal.signal(number, cancel)
        try:
            return await work
        finally:
            for number in _ENDING:
                if signal.getsignal(number) is cancel:
                    signal.signal(number, _unwind)

    return asyncio.run(cancelled_by_signals())


def _unwind(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


def _run() -> None:
    for number in _ENDING:
        signal.signal(number, _unwind)
    try:
        main(prog_name="./dev")
    except LabError as error:
        if error.log:
            click.echo(error.log, err=True)
        click.echo(f"./dev: {error}", err=True)
        raise SystemExit(1) from None
    except asyncio.CancelledError:
        raise SystemExit(128 + signal.SIGTERM) from None


if __name__ == "__main__":
    _run()
