"""``peercred status``: what the daemon says of itself."""

from __future__ import annotations

from dataclasses import asdict

import click

from peercred import Status
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
    """Show what is captured, and what had to be dropped.

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
            ("kernel", answer.kernel_release),
            ("hook set", answer.hook_set),
            ("captured cgroup", answer.cgroup),
            ("capture since", since),
            ("netns cookie", str(answer.netns_cookie)),
            ("missing fields", ", ".join(answer.missing_fields) or "none"),
        ]
    )
    print_line("")
    print_table(
        [
            (program.program, "yes" if program.attached else Styled("no", "bold red"))
            for program in answer.attachments
        ],
        ("PROGRAM", "ATTACHED"),
    )
    print_line("")
    print_table(
        [(table.name, str(table.entries), str(table.max_entries)) for table in answer.tables],
        ("TABLE", "ENTRIES", "LIMIT"),
    )
    print_line("")
    print_table(
        [
            (drop.reason, Styled(str(drop.count), "yellow" if drop.count else ""), drop.description)
            for drop in answer.drops
        ],
        ("DROPPED", "COUNT", "MEANING"),
    )
