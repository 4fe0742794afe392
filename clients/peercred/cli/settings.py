"""The options every command takes, before or after its name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from peercred import Client

MAX_TIMEOUT = 86_400.0

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


@dataclass
class Settings:
    """What the common options say."""

    address: str | None = None
    """gRPC address of the daemon; None leaves the choice to the library."""
    trust_user: str | None = None
    """Whose daemon is believed, besides root's and peercredd's."""
    timeout: float = 5.0
    """Seconds to wait for each answer."""
    json: bool = False

    def client(self) -> Client:
        """Open a client of the daemon these settings name."""
        return Client(self.address, timeout=self.timeout, trusted_user=self.trust_user)


pass_settings = click.make_pass_decorator(Settings, ensure=True)


def common_options(command: Decorated) -> Decorated:
    """Add ``--address``, ``--trust-user``, ``--timeout`` and ``--json``, which `Settings` gets."""
    for option in (
        click.option(
            "--json",
            is_flag=True,
            expose_value=False,
            callback=_remember,
            help="Print one JSON document.",
        ),
        click.option(
            "--timeout",
            type=_seconds,
            metavar="SECONDS",
            expose_value=False,
            callback=_remember,
            help=f"How long to wait for an answer.  [default: {Settings.timeout:g}]",
        ),
        click.option(
            "--address",
            metavar="ADDRESS",
            expose_value=False,
            callback=_remember,
            help="Where the daemon listens: unix:/path or HOST:PORT on loopback.  [default: "
            "$PEERCRED_ADDRESS, or unix:/run/peercredd/peercredd.sock, or for who may not connect "
            "to that 127.0.0.1:338]",
        ),
        click.option(
            "--trust-user",
            metavar="USER",
            expose_value=False,
            callback=_remember,
            help="Believe a daemon that this user runs; root's and peercredd's are believed "
            "always.  [default: $PEERCRED_TRUSTED_USER]",
        ),
    ):
        command = option(command)
    return command


def _remember(context: click.Context, parameter: click.Parameter, value: object) -> None:
    # An option that is absent after the command's name must not undo one before it.
    if value and parameter.name:
        setattr(context.ensure_object(Settings), parameter.name, value)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_TIMEOUT:
        raise click.BadParameter(
            f"{text!r} is not a number of seconds above 0 and up to {MAX_TIMEOUT:g}"
        )
    return seconds
