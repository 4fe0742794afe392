"""``peercred status``: what the daemon says of itself."""

from __future__ import annotations

from dataclasses import asdict

import click

from peercred import Attachment, Scope, SoPeercred, Status
from peercred.cli.display import Styled, print_json, print_line, print_table
from peercred.cli.settings import Settings, common_options, pass_settings


@click.command(
    epilog="""\b
Examples:
  peercred status
  peercred status --json | jq '.drops[] | select(.count > 0)'"""
)
@common_options
@pass_settings
def status(settings: Settings) -> None:
    """Show what is captured, by which hook set, and what had to be dropped.

    RUNS are counted while the sysctl kernel.bpf_stats_enabled is 1. MISSED are
    runs that the kernel left out: a connection then has no record, and lookups
    say "not found". "-": the kernel has no such figure; programs of the hook set
    "cgroup" are never left out.

    SO_PEERCRED ON TCP lists where getsockopt() is answered, and who asked for that:
    see `peercredd so-peercred --help`.

    With --json, "drops" and "tables" have every reason and table, zero counts too.
    """
    with settings.client() as client:
        answer = client.status()
    if settings.json:
        print_json(asdict(answer))
    else:
        _print(answer)


def _print(answer: Status) -> None:
    since = answer.capture_start_time.astimezone().isoformat(sep=" ", timespec="seconds")
    print_table(
        [
            ("version", answer.version),
            ("daemon pid", str(answer.daemon_pid)),
            ("server pid", str(answer.server_pid or "-")),
            *(("problem", Styled(problem, "red")) for problem in answer.problems),
            ("kernel", answer.kernel_release),
            ("hook set", answer.hook_set),
            *(("unused hook set", f"{u.hook_set}: {u.reason}") for u in answer.unused_hook_sets),
            ("captured cgroup", answer.cgroup or "not told to you"),
            ("capture since", since),
            ("netns cookie", str(answer.netns_cookie)),
            ("missing fields", ", ".join(answer.missing_fields) or "none"),
        ]
    )
    print_line("")
    print_table(
        [_program(attachment) for attachment in answer.attachments],
        ("PROGRAM", "ATTACHED", "RUNS", "MISSED"),
    )
    if any(attachment.missed_count for attachment in answer.attachments):
        print_line("Runs were missed: `peercred doctor` says what that means.")
    if answer.so_peercred:
        print_line("")
        print_table(
            [_opted_in(each) for each in answer.so_peercred],
            ("SO_PEERCRED ON TCP", "SOURCE", "ATTACHED", "CGROUP", "DETAIL"),
        )
    if answer.scope is Scope.OWN:
        print_line("Tables, drops and where SO_PEERCRED is answered are not told to you: see")
        print_line("`peercred whoami`.")
        return
    print_line("")
    print_table(
        [
            (
                table.name,
                str(table.entries),
                str(table.max_entries),
                _figure(table.max_entries_per_user),
            )
            for table in answer.tables
        ],
        ("TABLE", "ENTRIES", "LIMIT", "FOR ONE USER"),
    )
    print_line("")
    print_table(
        [
            (drop.reason, Styled(str(drop.count), "yellow" if drop.count else ""), drop.description)
            for drop in answer.drops
        ],
        ("DROPPED", "COUNT", "MEANING"),
    )
    if answer.refusals:
        print_line("")
        print_table(
            [
                (refusal.reason, str(refusal.count), refusal.description)
                for refusal in answer.refusals
            ],
            ("REFUSED ON TCP", "COUNT", "MEANING"),
        )


def _program(attachment: Attachment) -> tuple[str | Styled, ...]:
    return (
        attachment.program,
        "yes" if attachment.attached else Styled("no", "bold red"),
        _figure(attachment.run_count),
        Styled(_figure(attachment.missed_count), "bold red" if attachment.missed_count else ""),
    )


def _opted_in(each: SoPeercred) -> tuple[str | Styled, ...]:
    state: str | Styled = "yes" if each.attached else Styled("no", "bold red")
    if each.waiting:
        state = "waiting"
    return each.target, each.source, state, each.cgroup or "unknown", each.detail


def _figure(count: int | None) -> str:
    return "-" if count is None else str(count)
