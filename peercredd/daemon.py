"""The life of the daemon's process: lock, load, have a server, sweep, stop.

It has root's privileges and speaks with nobody but its children.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import structlog

from peercredd import children, defaults, logs, namespaces, pins, preemption, preflight
from peercredd.access import AccessError, Policy
from peercredd.config import Config
from peercredd.follow import following
from peercredd.guard import Guard
from peercredd.libbpf import KernelError
from peercredd.listen import ListenError, UnixSocket
from peercredd.mounts import CgroupError, cgroup_directory
from peercredd.notify import Notifier
from peercredd.privileges import PrivilegeError
from peercredd.so_peercred import OptIn, OptInError
from peercredd.supervisor import ServerError, Supervisor

log = structlog.get_logger()


class StartError(Exception):
    """The daemon cannot run. One line: why, and what mends it."""


def run(config: Config) -> int:
    """Run until SIGTERM or SIGINT.

    Returns:
        The exit status: 0 stopped as asked, 1 failure, which has been logged.
    """
    logs.configure(config.log.level, config.log.format)
    try:
        _run(config)
    except StartError as error:
        log.error(str(error))
        return 1
    return 0


def _run(config: Config) -> None:
    if missing := preflight.missing_capabilities():
        raise StartError(f"lacks {', '.join(missing)}; run it as root")
    try:
        # Of a kernel that is too old this is said, and nothing else.
        namespaces.own_cookie()
        cgroup = cgroup_directory(config.capture.cgroup)
        with pins.hold(Path(config.capture.pin_dir)):
            asyncio.run(_until_signalled(config, cgroup, Notifier()))
    except (
        *(CgroupError, pins.Held, children.ChildError, ListenError),
        *(OptInError, AccessError, PrivilegeError, ServerError),
    ) as error:
        raise StartError(str(error)) from error
    except KernelError as error:
        raise StartError(str(error.strerror)) from error


async def _until_signalled(config: Config, cgroup: Path, notifier: Notifier) -> None:
    life = asyncio.create_task(_live(config, cgroup, notifier))
    stopping = False

    def stop(number: signal.Signals) -> None:
        nonlocal stopping
        if stopping:
            log.error("forced to stop; 'peercredd unload' ends the capture if it is still there")
            os._exit(1)
        stopping = True
        log.info("stopping", signal=number.name)
        notifier.tell("STOPPING=1")
        life.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    try:
        await life
    except asyncio.CancelledError:
        log.info("stopped", capture="kept" if config.capture.keep else "ended")


async def _live(config: Config, cgroup: Path, notifier: Notifier) -> None:
    capture, api = config.capture, config.api
    pin_dir = Path(capture.pin_dir)
    loading = children.start(
        "peercredd.loader",
        {
            "pin_dir": capture.pin_dir,
            "cache_dir": capture.cache_dir,
            "cgroup": str(cgroup),
            "hooks": capture.hooks,
            "max_connections": capture.max_connections,
            "max_pending": capture.max_pending,
            "max_percent_per_user": capture.max_percent_per_user,
        },
    )
    # Until it serves, a daemon that fails takes away no more than it has brought.
    ends_capture = False
    try:
        policy = Policy.of(
            api.group,
            config.access.users,
            config.access.groups,
            listener_details=config.access.listener_details,
        )
        with UnixSocket(Path(api.socket), api.group) as unix_socket:
            async with Supervisor(config, policy, unix_socket, notifier) as supervisor:
                async with loading as loader:
                    log.debug("loading", pid=loader.pid)
                    output = await children.result(
                        loader, "loader", defaults.LOADER_TIMEOUT_SECONDS
                    )
                loaded = json.loads(output)
                ends_capture = loaded["capture"] == "begun"
                about = loaded["about"]
                _warn(loaded)
                opt_in = OptIn(
                    pin_dir,
                    Path(config.so_peercred.state),
                    config.so_peercred.cgroups,
                    cgroup,
                    about["so_peercred"],
                )
                with Guard(pin_dir) as guard:
                    async with following(opt_in):
                        await supervisor.serve(opt_in.rows)
                        log.info(
                            "serving",
                            socket=api.socket,
                            tcp_port=api.tcp_port if api.tcp else None,
                            hooks=about["hook_set"],
                            not_in_use=about["unused_hook_sets"],
                            cgroup=str(cgroup),
                            pins=capture.pin_dir,
                            capture=loaded["capture"],
                            compiled=loaded.get("compiled"),
                            server_pid=supervisor.server_pid,
                            seconds_to_first_answer=round(_age_seconds(), 2),
                        )
                        notifier.tell("READY=1")
                        ends_capture = True
                        await asyncio.gather(
                            _sweep_at_intervals(config), _guard_pins(guard, opt_in, supervisor)
                        )
    except asyncio.CancelledError:
        ends_capture = True
        raise
    finally:
        pins.remove(pin_dir, keep_capture=capture.keep or not ends_capture)


def _warn(loaded: dict[str, Any]) -> None:
    """Say what an administrator should look at in what the loader did."""
    about = loaded["about"]
    if why_not := loaded.get("lost"):
        log.warning(
            "the capture that was found running could not be taken over: its connections are "
            "answered with OLDER_THAN_CAPTURE",
            reason=why_not,
        )
    if problem := loaded["cache_problem"]:
        log.warning("compiled programs are not kept: the next start is slow, too", reason=problem)
    if loaded["capture"] != "found running" and (missing := about["missing_fields"]):
        log.warning("this kernel does not provide all of the credentials", missing=missing)
    if about["hook_set"] == "trace" and (objection := preemption.why_not_to_trace()):
        log.warning(f"{objection}; use --hooks cgroup")
    if left_out := loaded.get("older", {}).get("left_out"):
        log.warning(
            "more connections than max_connections were there before capture: of some a "
            "lookup will say NEVER_SEEN, not OLDER_THAN_CAPTURE",
            sockets_left_out=left_out,
        )


async def _guard_pins(guard: Guard, opt_in: OptIn, supervisor: Supervisor) -> None:
    while True:
        if not guard.is_complete():
            problem = guard.restore()
            supervisor.problems = [problem] if problem else []
            if not problem:
                try:
                    await asyncio.to_thread(opt_in.reconcile)
                except OptInError as error:
                    log.error(f"SO_PEERCRED on TCP stays as it is until the next change: {error}")
        await asyncio.sleep(defaults.PULSE_SECONDS)


async def _sweep_at_intervals(config: Config) -> None:
    arguments: dict[str, str | int] = {
        "pin_dir": config.capture.pin_dir,
        "pending_age_seconds": config.sweep.pending_age_seconds,
        "record_age_seconds": config.sweep.record_age_seconds,
    }
    while True:
        await asyncio.sleep(config.sweep.interval_seconds)
        try:
            async with children.start("peercredd.sweeper", arguments) as sweeper:
                summary = await children.result(
                    sweeper, "sweeper", defaults.SWEEPER_TIMEOUT_SECONDS
                )
        except children.ChildError as error:
            log.warning("stale records stay for now", reason=str(error))
        else:
            counts = json.loads(summary)
            (log.info if any(counts.values()) else log.debug)("swept", **counts)


def _age_seconds() -> float:
    """How long this process has run, to a clock tick: field 22 of proc_pid_stat(5)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
