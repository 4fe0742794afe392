"""The command ``peercredd``.

What only one subcommand needs is imported there: --help and completion answer at
once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
from click.shell_completion import get_completion_class

try:
    import msgspec
except ModuleNotFoundError:
    # The command is there without the extra, which alone brings what it needs.
    sys.exit(
        "peercredd: only the client is installed here; install the daemon too: "
        "pip install '<source>[daemon]' (docs/operations.md)"
    )

import peercredd
from peercredd import config, defaults

Command = TypeVar("Command", bound=Callable[..., None])
Load = Callable[[], config.Effective]
"""Reads the configuration when it is needed: a broken file must not break completion."""


class _Failure(click.ClickException):
    """Ends the command with one line and exit status 1."""

    def show(self, file: Any = None) -> None:
        click.echo(f"peercredd: {self.message}", file=file or sys.stderr)


class _Misuse(_Failure):
    """Bad usage or configuration."""

    exit_code = 2


@contextmanager
def _misuse_in_one_line() -> Iterator[None]:
    try:
        yield
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "peercredd"
        # click breaks some of its texts over lines.
        reason = " ".join(error.format_message().split()).rstrip(".")
        raise _Misuse(f"{reason}; see {command} --help") from error


class _Program(click.Group):
    def make_context(self, *arguments: Any, **extra: Any) -> click.Context:
        with _misuse_in_one_line():
            return super().make_context(*arguments, **extra)

    def invoke(self, context: click.Context) -> Any:
        with _misuse_in_one_line():
            return super().invoke(context)


def _examples(*lines: str) -> str:
    # The backspace tells click to leave the lines as they are.
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


def _parameter(option: config.Option) -> str:
    return option.key.replace(".", "_")


def _with_config_flags(command: Command) -> Command:
    for option in reversed(tuple(config.OPTIONS.values())):
        flag = option.flag
        kind: click.ParamType[Any] = click.STRING
        value_type = get_args(option.type)[0]
        if value_type is bool:
            flag = f"{flag}/--no-{flag.removeprefix('--')}"
            kind = click.BOOL
        elif get_origin(value_type) is Literal:
            kind = click.Choice(get_args(value_type))
        elif option.metavar == "PATH":
            kind = click.Path(readable=False)
        command = click.option(
            flag,
            _parameter(option),
            type=kind,
            default=None,
            metavar=option.metavar,
            help=f"{option.help} Default: {json.dumps(option.default)}.",
        )(command)
    return command


def _show_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(f"peercredd {peercredd.__version__}")
        context.exit()


@click.group(
    cls=_Program,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_examples(
        "sudo peercredd                              the whole host",
        "sudo peercredd --group staff --log-level debug",
        "sudo peercredd --cgroup /sys/fs/cgroup/user.slice",
        "sudo peercredd --pin-dir /sys/fs/bpf/try --socket /run/try/peercredd.sock",
        "peercredd config > try.toml                 a file with every option, to edit",
        "peercredd --config ./try.toml config        what would be in force, and why",
        "sudo peercredd check                        can this machine run it?",
    ),
)
@click.option(
    "-V",
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and exit.",
)
@click.option(
    "--config",
    "config_file",
    type=click.Path(readable=False, path_type=Path),
    help=f"Read this file instead of {defaults.CONFIG_FILE}, which need not exist.",
)
@_with_config_flags
@click.pass_context
def main(context: click.Context, /, config_file: Path | None, **given: Any) -> None:
    """Record who connects over loopback TCP, and answer who it was.

    Without a COMMAND, run the daemon in the foreground until SIGTERM or SIGINT;
    a second one ends it at once. Ask it with peercred(1).

    Each option stands in the configuration file too: see peercredd.toml(5), or
    `peercredd config`; one given here wins. Options go before the COMMAND.

    Exit status: 0 stopped as asked, 1 failure, 2 bad usage or configuration.
    Errors are one line on stderr: what is wrong; what mends it.
    """
    flags = {
        key: given[_parameter(option)]
        for key, option in config.OPTIONS.items()
        if given[_parameter(option)] is not None
    }

    def load() -> config.Effective:
        try:
            return config.load(config_file, flags)
        except config.ConfigError as error:
            raise _Misuse(str(error)) from error

    context.obj = load
    if context.invoked_subcommand is None:
        checked = msgspec.json.encode(load().config).decode()
        arguments = [sys.executable, "-P", "-m", "peercredd.process", checked]
        os.execv(arguments[0], arguments)


@main.command(
    "config",
    epilog=_examples(
        "peercredd config",
        "peercredd --max-connections 1000000 config --json",
    ),
)
@click.option("--json", "as_json", is_flag=True, help="One object: key to value and source.")
@click.pass_obj
def show_config(load: Load, as_json: bool) -> None:
    """Print every option, its value in force and where that comes from.

    The output is a configuration file. A source is default, file:PATH or flag:--NAME.
    """
    effective = load()
    if as_json:
        values = {
            key: {"value": value, "source": source} for key, value, source in effective.values()
        }
        click.echo(json.dumps(values, indent=2))
        return
    lines = [(f"{key} = {json.dumps(value)}", source) for key, value, source in effective.values()]
    width = max(len(line) for line, _ in lines)
    for line, source in lines:
        click.echo(f"{line:{width}}  # {source}")


@main.command(
    epilog=_examples(
        "sudo peercredd check",
        "sudo peercredd --hooks trace check --verifier-log",
        "sudo peercredd check --json | jq '.checks[] | select(.outcome != \"ok\")'",
    ),
)
@click.option(
    "--verifier-log",
    is_flag=True,
    help="Add all that compiler and verifier wrote of what does not load.",
)
@click.option("--json", "as_json", is_flag=True, help='One object: {"checks": [...]}.')
@click.pass_obj
def check(load: Load, verifier_log: bool, as_json: bool) -> None:
    """Check whether this machine can run the daemon. Leaves nothing changed.

    The programs of each hook set are compiled and shown to the kernel's verifier;
    those of "trace" are attached for an instant too, as only that tells whether
    they can be. A check that fails says what mends it; one that cannot tell is
    "unknown", and a hook set that the daemon does not need is "unused": with
    --hooks auto, one of the two has to work. Exit status 0 when all are ok or
    unused, else 1.
    """
    from peercredd import preflight

    checks = preflight.run(load().config)
    if not verifier_log:
        checks = [done._replace(log="") for done in checks]
    if as_json:
        click.echo(json.dumps({"checks": [done._asdict() for done in checks]}, indent=2))
    else:
        width = max(len(done.name) for done in checks)
        for done in checks:
            click.echo(f"{done.outcome:7}  {done.name:{width}}  {done.detail}")
            if done.mend:
                click.echo(f"{'':7}  {'':{width}}  mend: {done.mend}")
        for done in checks:
            if done.log:
                click.echo(f"\nlog of {done.name}:\n{done.log}")
    if any(done.outcome not in ("ok", "unused") for done in checks):
        sys.exit(1)


@main.command(
    epilog=_examples(
        "sudo peercredd unload",
        "sudo peercredd --pin-dir /sys/fs/bpf/try unload",
    ),
)
@click.pass_obj
def unload(load: Load) -> None:
    """End a capture that goes on without a daemon.

    One is left by --keep, and by a daemon that was killed. A running daemon's
    capture is not touched: stop the daemon instead.
    """
    from peercredd import pins, preflight
    from peercredd.libbpf import KernelError

    pin_dir = Path(load().config.capture.pin_dir)
    if missing := preflight.missing_capabilities():
        raise _Failure(f"lacks {', '.join(missing)}; run it as root")
    try:
        with pins.hold(pin_dir):
            removed = pins.remove(pin_dir)
    except pins.Held as held:
        raise _Failure(str(held)) from held
    except KernelError as error:
        raise _Failure(str(error.strerror)) from error
    click.echo(f"{pin_dir}: removed" if removed else f"{pin_dir}: nothing to remove")


@main.command(
    epilog=_examples(
        "peercredd completion bash > /etc/bash_completion.d/peercredd",
        "peercredd completion zsh > ~/.zfunc/_peercredd",
        "peercredd completion fish > ~/.config/fish/completions/peercredd.fish",
    ),
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for a shell."""
    script = get_completion_class(shell)
    assert script is not None
    click.echo(script(main, {}, "peercredd", "_PEERCREDD_COMPLETE").source())
