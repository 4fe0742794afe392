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
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

import click
from click.shell_completion import CompletionItem, get_completion_class

try:
    import msgspec
except ModuleNotFoundError:
    # The command is there without the extra, which alone brings what it needs.
    sys.exit(
        "peercredd: only the client is installed here; install the daemon too: "
        "pip install '<source>[daemon]' (docs/operations.md)"
    )

import peercredd
from peercredd import config, defaults, targets

if TYPE_CHECKING:
    from peercredd.so_peercred import OptIn

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
            multiple=option.is_list,
            default=None,
            metavar=option.metavar,
            help=f"{option.help}{' May be repeated.' if option.is_list else ''} "
            f"Default: {json.dumps(option.default)}.",
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
        key: list(value) if option.is_list else value
        for key, option in config.OPTIONS.items()
        if (value := given[_parameter(option)]) not in (None, ())
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


@main.group(
    "so-peercred",
    no_args_is_help=False,
    epilog=_examples(
        "sudo peercredd so-peercred enable postgresql.service",
        "sudo peercredd so-peercred list",
        "sudo peercredd so-peercred disable postgresql.service",
    ),
)
def so_peercred() -> None:
    r"""Have getsockopt(SO_PEERCRED) answered on TCP sockets, for the programs you name.

    In the cgroups that are enabled, programs that know nothing of peercredd get
    pid, uid and gid of a TCP connection's other end as they get it on a unix
    socket; elsewhere the kernel goes on saying {0, -1, -1}. Sockets count by the
    cgroup that they were created in. Every getsockopt() there gets slower by a
    fraction of a microsecond, and none elsewhere.

    \b
    TARGET is one of
      all                  the whole capture (capture.cgroup)
      /sys/fs/cgroup/...   a cgroup v2 directory, and all below it
      postgresql.service   a systemd unit: .service, .socket, .slice or .scope

    What is enabled stays so: a unit that is started again is attached to again, and
    so is everything after a restart or a reboot. What the configuration names
    (so_peercred.cgroups, --so-peercred) is enabled by that, and only there.
    """


def _complete_target(
    _: click.Context, __: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    if incomplete.startswith("/"):
        return [CompletionItem(incomplete, type="dir")]
    names = [targets.ALL, *targets.running_units(incomplete)]
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


class _Target(click.ParamType[str]):
    name = "target"

    def convert(self, value: str, *_: object) -> str:
        if not targets.is_valid(value):
            raise click.BadParameter(f"{value!r} is not {targets.ALLOWED}")
        return value


@contextmanager
def _opt_in(load: Load) -> Iterator[OptIn]:
    """What is asked for and attached in the capture that the configuration names."""
    from peercredd import about, mounts, pins, preflight
    from peercredd.libbpf import KernelError
    from peercredd.so_peercred import OptIn, OptInError

    options = load().config
    if missing := preflight.missing_capabilities():
        raise _Failure(f"lacks {', '.join(missing)}; run it as root")
    pin_dir = Path(options.capture.pin_dir)
    try:
        if running := pins.capture(pin_dir):
            said = about.read(running / pins.MAPS)
            if "so_peercred" not in said:
                raise _Failure("the capture is an older peercredd's; restart the daemon")
            covered, why_impossible = Path(said["cgroup"]), said["so_peercred"]
        else:
            covered, why_impossible = mounts.cgroup_directory(options.capture.cgroup), ""
        wanted = options.so_peercred
        yield OptIn(pin_dir, Path(wanted.state), wanted.cgroups, covered, why_impossible)
    except (OptInError, mounts.CgroupError) as error:
        raise _Failure(str(error)) from error
    except KernelError as error:
        raise _Failure(str(error.strerror)) from error


@so_peercred.command(
    epilog=_examples(
        "sudo peercredd so-peercred enable postgresql.service",
        "sudo peercredd so-peercred enable /sys/fs/cgroup/user.slice/user-1000.slice",
        "sudo peercredd so-peercred enable all",
    ),
)
@click.argument("target", type=_Target(), shell_complete=_complete_target)
@click.option(
    "--transient",
    is_flag=True,
    help="Until the cgroup goes or the capture ends, and then forget it. "
    "TARGET is the path of a cgroup.",
)
@click.pass_obj
def enable(load: Load, target: str, transient: bool) -> None:
    """Answer getsockopt(SO_PEERCRED) on TCP in TARGET, from now on.

    TARGET has to be there: to have one waited for, name it in the configuration.
    Programs that others have attached there stay, and run as before. Either all is
    done or nothing is changed. Exit status 1 too when it is enabled already.
    """
    _require_path(target, transient)
    with _opt_in(load) as opt_in:
        if transient:
            opt_in.enable_transient(Path(target))
            click.echo(f"{target}: enabled until it goes")
        else:
            click.echo(f"{target}: enabled, attached to {opt_in.enable(target)}")


@so_peercred.command(
    epilog=_examples(
        "sudo peercredd so-peercred disable postgresql.service",
    ),
)
@click.argument("target", type=_Target(), shell_complete=_complete_target)
@click.option("--transient", is_flag=True, help="What was enabled with --transient.")
@click.pass_obj
def disable(load: Load, target: str, transient: bool) -> None:
    """Answer getsockopt(SO_PEERCRED) on TCP in TARGET no more.

    It need not be there any more. Another target that means the same cgroup keeps it
    attached, and so does one above it. What the configuration names is taken out
    there. Exit status 1 too when it is not enabled.
    """
    _require_path(target, transient)
    with _opt_in(load) as opt_in:
        if transient:
            opt_in.disable_transient(Path(target))
        else:
            opt_in.disable(target)
        click.echo(f"{target}: disabled")


def _require_path(target: str, transient: bool) -> None:
    if transient and not target.startswith("/"):
        raise click.BadParameter(f"{target!r} is not the path of a cgroup, as --transient needs")


@so_peercred.command(
    "list",
    epilog=_examples(
        "sudo peercredd so-peercred list",
        "sudo peercredd so-peercred list --json | jq '.so_peercred[] | select(.attached | not)'",
    ),
)
@click.option("--json", "as_json", is_flag=True, help='One object: {"so_peercred": [...]}.')
@click.pass_obj
def list_targets(load: Load, as_json: bool) -> None:
    """List what is enabled, by whom, and whether it is attached now.

    SOURCE is config (the configuration), enabled (`enable`), transient (`enable
    --transient`) or leftover (attached though nobody asks for it any more: the daemon
    ends that at its next change). What is not attached says why, or that it is
    waited for. The configuration is read anew: a running daemon may have another.
    """
    with _opt_in(load) as opt_in:
        opt_in.locate()
        rows = opt_in.rows()
    if as_json:
        click.echo(json.dumps({"so_peercred": [row._asdict() for row in rows]}, indent=2))
        return
    if not rows:
        click.echo("enabled nowhere; see peercredd so-peercred enable --help", err=True)
        return
    table = [("TARGET", "SOURCE", "ATTACHED", "CGROUP")]
    for row in rows:
        state = "yes" if row.attached else "waiting" if row.waiting else "no"
        table.append((row.target, row.source, state, row.cgroup or "unknown"))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells, detail in zip(table, ["DETAIL", *(row.detail for row in rows)], strict=True):
        padded = (f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True))
        click.echo("  ".join((*padded, detail)).rstrip())


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
