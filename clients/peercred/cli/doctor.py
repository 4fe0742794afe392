"""``peercred doctor``: what keeps the daemon from answering here, and what mends it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

import click

from peercred import Client, NotFound, PeerCredError, Refused, Scope, Unavailable
from peercred.cli.display import Styled, print_json, print_table
from peercred.cli.settings import Settings, common_options, pass_settings
from peercred.cli.whoami import ask_about_myself

# Inode numbers of the initial namespaces: PID_NS_INIT_INO, USER_NS_INIT_INO of linux/nsfs.h.
INITIAL_NAMESPACES = {"pid": 0xEFFFFFFC, "user": 0xEFFFFFFD}

# Seconds. BCC compiles each of two hook sets for some, on a loaded or emulated machine for
# minutes; peercredd gives each of them up by itself after 300.
HOST_CHECK_TIMEOUT = 660

MEND_THE_DAEMON = "see 'daemon reachable'"
MEND_BY_THE_LOG = "see the log: `journalctl -u peercredd`"
MEND_MISSED_RUNS = (
    'set capture.hooks = "cgroup", whose programs are never left out, and restart the daemon'
)
NOT_TOLD = "not told to you: `peercred whoami` says why"
MEND_A_WRONG_ANSWER = "trust no answer, and report this with `peercred status --json`"


class Outcome(Enum):
    """What a check found."""

    OK = "ok"
    UNUSED = "unused"
    """A hook set that does not work, or was not tried: the daemon does without it."""
    WARNING = "warning"
    """It works, and something should be looked at."""
    FAILED = "failed"
    UNKNOWN = "unknown"
    """It could not tell."""


STYLES = {
    Outcome.OK: "green",
    Outcome.UNUSED: "",
    Outcome.WARNING: "bold yellow",
    Outcome.FAILED: "bold red",
    Outcome.UNKNOWN: "yellow",
}


@dataclass(frozen=True, slots=True)
class Check:
    """What one check found, and what mends it ("" when nothing needs mending)."""

    name: str
    outcome: Outcome
    detail: str
    mend: str = ""


@click.command(
    epilog="""\b
Examples:
  sudo peercred doctor
  sudo peercred doctor --json | jq '.checks[] | select(.outcome != "ok")'"""
)
@common_options
@pass_settings
@click.pass_context
def doctor(context: click.Context, settings: Settings) -> None:
    """Check that all works here, and say what mends the rest.

    Looks at what the daemon needs, and whether it answers correctly. Run it as
    the user that starts the daemon, usually root; as a client, only the last
    five checks matter. Each is "ok", "unused" (a hook set that does not work,
    and need not), "warning", "failed" or "unknown" (could not tell). Exit code
    1 when one is failed or unknown, else 0.

    With --json: {"ok": true or false, "checks": [{"name", "outcome", "detail",
    "mend"}, ...]}.
    """
    with settings.client() as client, ThreadPoolExecutor() as threads:
        host = threads.submit(check_host)
        daemon = [
            threads.submit(check, client)
            for check in (
                check_daemon,
                check_hooks,
                check_missed_runs,
                check_so_peercred,
                check_self_connection,
            )
        ]
        checks = [*host.result(), *(check.result() for check in daemon)]
    healthy = all(check.outcome not in (Outcome.FAILED, Outcome.UNKNOWN) for check in checks)
    if settings.json:
        print_json({"ok": healthy, "checks": [asdict(check) for check in checks]})
    else:
        _print(checks)
    context.exit(0 if healthy else 1)


def check_host() -> list[Check]:
    """Ask the daemon's program whether it can run on this host; it alone knows what it needs.

    Privileges, BTF, cgroup v2, bpffs, BCC, and whether the kernel takes the programs.
    """
    name = "host"
    try:
        # -P: root must not import what lies in the current directory.
        result = subprocess.run(
            [sys.executable, "-P", "-m", "peercredd", "check", "--json"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="backslashreplace",
            timeout=HOST_CHECK_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [
            Check(
                name,
                Outcome.UNKNOWN,
                f"`peercredd check` said nothing within {HOST_CHECK_TIMEOUT} s",
                "run `peercredd check` on its own, to see where it stops",
            )
        ]
    try:
        return _each_cause_once(
            Check(check["name"], Outcome(check["outcome"]), check["detail"], check["mend"])
            for check in json.loads(result.stdout)["checks"]
        )
    except (ValueError, KeyError, TypeError):
        reason = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
    if "No module named" in reason:
        return [
            Check(
                name,
                Outcome.FAILED,
                f"the daemon is not installed with this command ({reason})",
                "install it as docs/operations.md says",
            )
        ]
    # The program's own texts are "what is wrong; what mends it", like those of the client.
    detail, _, mend = reason.removeprefix("peercredd: ").partition("; ")
    mend = mend or "mend that; `peercredd check` tells more"
    return [Check(name, Outcome.FAILED, detail, mend)]


def _each_cause_once(checks: Iterable[Check]) -> list[Check]:
    """Have each hook set point to what it needs, where that is what failed."""
    found = list(checks)
    failed = [check.name for check in found if check.outcome is Outcome.FAILED]
    need = next((need for need in ("BTF", "BCC importable") if need in failed), None)
    if need is None:
        return found
    return [
        Check(check.name, Outcome.UNKNOWN, "could not be tried", f"see '{need}'")
        if check.name.endswith(" loadable") and check.outcome is Outcome.FAILED
        else check
        for check in found
    ]


def check_daemon(client: Client) -> Check:
    """See whether a daemon answers."""
    name = "daemon reachable"
    try:
        status = client.status()
    except (Unavailable, Refused) as error:
        detail, _, mend = str(error).partition("; ")
        return Check(name, Outcome.FAILED, detail, mend or MEND_BY_THE_LOG)
    except PeerCredError as error:
        return Check(name, Outcome.FAILED, str(error), MEND_BY_THE_LOG)
    return Check(name, Outcome.OK, f"version {status.version}, pid {status.daemon_pid}")


def check_hooks(client: Client) -> Check:
    """Ask the daemon which hook set runs, and whether every BPF program is in its place."""
    name = "hooks attached"
    try:
        status = client.status()
    except PeerCredError:
        return Check(name, Outcome.UNKNOWN, "the daemon does not say", MEND_THE_DAEMON)
    if status.problems:
        detail, _, mend = status.problems[0].partition("; ")
        return Check(name, Outcome.FAILED, detail, mend or MEND_BY_THE_LOG)
    lost = [attachment.program for attachment in status.attachments if not attachment.attached]
    if lost or not status.attachments:
        return Check(
            name,
            Outcome.FAILED,
            f"not attached: {', '.join(lost) or 'any program'}",
            "restart the daemon: `systemctl restart peercredd`",
        )
    running = f"{status.hook_set}, {len(status.attachments)} programs"
    unused = (f"{unused.hook_set} unused: {unused.reason}" for unused in status.unused_hook_sets)
    return Check(name, Outcome.OK, "; ".join((running, *unused)))


def check_missed_runs(client: Client) -> Check:
    """Ask the daemon whether the kernel left out runs of the BPF programs."""
    name = "no runs missed"
    try:
        status = client.status()
    except PeerCredError:
        return Check(name, Outcome.UNKNOWN, "the daemon does not say", MEND_THE_DAEMON)
    if status.scope is Scope.OWN:
        return Check(name, Outcome.OK, NOT_TOLD)
    attachments = status.attachments
    missed = [f"{a.program} {a.missed_count}" for a in attachments if a.missed_count]
    if missed:
        return Check(
            name,
            Outcome.WARNING,
            f"the kernel left out runs of {', '.join(missed)}: as many connections may have no "
            "record, and lookups of them say 'not found'",
            MEND_MISSED_RUNS,
        )
    if all(attachment.missed_count is None for attachment in attachments):
        return Check(name, Outcome.OK, "the kernel does not count such runs here")
    return Check(name, Outcome.OK, "none")


def check_so_peercred(client: Client) -> Check:
    """Ask the daemon whether getsockopt() is answered wherever that is asked for."""
    name = "SO_PEERCRED on TCP"
    try:
        status = client.status()
    except PeerCredError:
        return Check(name, Outcome.UNKNOWN, "the daemon does not say", MEND_THE_DAEMON)
    if status.scope is Scope.OWN:
        return Check(name, Outcome.OK, NOT_TOLD)
    asked = status.so_peercred
    for each in asked:
        if not (each.attached or each.waiting):
            detail, _, mend = each.detail.partition("; ")
            detail = detail if each.target in detail else f"{each.target}: {detail}"
            return Check(name, Outcome.WARNING, detail, mend or MEND_BY_THE_LOG)
    if not asked:
        return Check(name, Outcome.OK, "enabled nowhere")
    states = (f"{each.target}{' (waited for)' if each.waiting else ''}" for each in asked)
    return Check(name, Outcome.OK, ", ".join(states))


def check_self_connection(client: Client) -> Check:
    """See whether a connection of our own is answered with our own credentials."""
    name = "self-connection answered"
    try:
        peer = ask_about_myself(client)
    except NotFound as error:
        return Check(
            name,
            Outcome.FAILED,
            f"nothing is known of it ({error.reason})",
            "run this in the captured cgroup, which `peercred status` names",
        )
    except (Unavailable, Refused):
        return Check(name, Outcome.UNKNOWN, "the daemon does not say", MEND_THE_DAEMON)
    except PeerCredError as error:
        return Check(name, Outcome.FAILED, str(error), MEND_A_WRONG_ANSWER)
    except OSError as error:
        return Check(
            name,
            Outcome.UNKNOWN,
            f"this host does not let you connect to itself: {error.strerror}",
            "bring the loopback interface up: `ip link set lo up`",
        )
    form = "pid {}, uid {}, gid {}"
    answer = form.format(peer.pid, peer.uid, peer.gid)
    truth = form.format(os.getpid(), os.geteuid(), os.getegid())
    if answer == truth:
        return Check(name, Outcome.OK, answer)
    if not _in_initial_namespaces():
        return Check(
            name,
            Outcome.UNKNOWN,
            f"{answer}; this container counts {truth}",
            "run it outside of the container: answers are in numbers of the initial namespaces",
        )
    return Check(name, Outcome.FAILED, f"wrong: {answer}; it was {truth}", MEND_A_WRONG_ANSWER)


def _in_initial_namespaces() -> bool:
    return all(
        Path(f"/proc/self/ns/{name}").stat().st_ino == inode
        for name, inode in INITIAL_NAMESPACES.items()
    )


def _print(checks: list[Check]) -> None:
    rows: list[tuple[str | Styled, str, str]] = []
    for check in checks:
        outcome = Styled(check.outcome.value, STYLES[check.outcome])
        rows.append((outcome, check.name, check.detail))
        if check.mend:
            rows.append(("", "", f"mend: {check.mend}"))
    print_table(rows)
