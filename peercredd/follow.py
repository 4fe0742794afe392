"""SO_PEERCRED on TCP stays where it is asked for, while cgroups come and go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import TypeVar

import structlog

from peercredd.so_peercred import OptIn, OptInError, Row
from peercredd.watch import Changes

log = structlog.get_logger()

_Result = TypeVar("_Result")


@asynccontextmanager
async def following(opt_in: OptIn) -> AsyncIterator[None]:
    """Attach where it is asked for, and follow every change while the ``async with`` block runs.

    Leaving detaches nothing: that is for the end of the capture.

    Raises:
        OptInError: what the configuration asks for can never be, or cannot be told.
    """
    await _whole(opt_in.locate)
    if wrong := opt_in.misconfigured():
        raise OptInError(wrong)
    changes, rows = await _settled(opt_in, [])
    task = asyncio.create_task(_follow(opt_in, changes, rows))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _follow(opt_in: OptIn, changes: Changes, rows: list[Row]) -> None:
    try:
        while True:
            await changes.next()
            try:
                newer, rows = await _settled(opt_in, rows)
            except OptInError as error:
                log.error(f"SO_PEERCRED on TCP stays as it is until the next change: {error}")
            except Exception:
                # Whatever it is, what comes later is to be followed.
                log.exception("SO_PEERCRED on TCP stays as it is until the next change")
            else:
                changes.close()
                changes = newer
    finally:
        changes.close()


async def _settled(opt_in: OptIn, before: list[Row]) -> tuple[Changes, list[Row]]:
    """Make what is attached what is asked for; what comes later is seen by the Changes."""
    changes = await _watched(opt_in)
    try:
        await _whole(opt_in.reconcile)
        # What is asked for since then has another turn, and is told of in that one.
        rows = opt_in.rows() if opt_in.is_up_to_date() else before
    except BaseException:
        changes.close()
        raise
    _tell(before, rows)
    return changes, rows


async def _watched(opt_in: OptIn) -> Changes:
    """Watch all paths that matter, as they are while they are watched."""
    while True:
        paths = await _whole(opt_in.locate)
        with ExitStack() as resources:
            try:
                changes = resources.enter_context(Changes(paths))
            except OSError as error:
                raise OptInError(
                    f"cgroups cannot be watched: {error.strerror}; raise the sysctl settings "
                    "fs.inotify.max_user_instances and fs.inotify.max_user_watches"
                ) from error
            if opt_in.is_up_to_date():
                resources.pop_all()
                return changes


async def _whole(work: Callable[[], _Result]) -> _Result:
    """Do work that may wait for others in a thread, and to its end even if this is cancelled."""
    thread = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        with suppress(OptInError):
            await thread
        raise


def _tell(before: list[Row], after: list[Row]) -> None:
    known = {row.target: row for row in before}
    for row in after:
        if row == known.pop(row.target, None):
            continue
        if row.attached:
            log.info("SO_PEERCRED on TCP attached", target=row.target, cgroup=row.cgroup)
        elif row.waiting:
            log.info("SO_PEERCRED on TCP waits", target=row.target, reason=row.detail)
        else:
            log.warning("SO_PEERCRED on TCP not attached", target=row.target, reason=row.detail)
    for row in known.values():
        log.info("SO_PEERCRED on TCP ended", target=row.target, cgroup=row.cgroup)
