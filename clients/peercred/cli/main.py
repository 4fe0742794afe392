"""The command ``peercred``: its subcommands, its exit codes, its errors."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import click

from peercred import DeadlineExceeded, InvalidArgument, NotFound, PeerCredError, Refused
from peercred.cli.completion import completion
from peercred.cli.display import escape, print_json
from peercred.cli.doctor import doctor
from peercred.cli.listing import list_connections
from peercred.cli.lookup import lookup
from peercred.cli.run import OWN_FAILURE, RunError, run
from peercred.cli.settings import common_options
from peercred.cli.status import status
from peercred.cli.watch import watch
from peercred.cli.whoami import whoami

NOT_FOUND, USAGE, UNAVAILABLE, REFUSED = 1, 2, 3, 4


class _Program(click.Group):
    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except click.BadOptionUsage as error:
            # click does not say of which command an option lacks its value.
            if error.ctx is None and (name := context.invoked_subcommand):
                error.ctx = click.Context(self.commands[name], parent=context, info_name=name)
            raise


@click.group(
    cls=_Program,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  Who is the client on port 51000 of my server on port 8080?
    peercred lookup 127.0.0.1:8080 127.0.0.1:51000
  What do servers on this host learn about me?
    peercred whoami
  What does my server get from SO_PEERCRED on TCP?
    sudo peercred run -- ./server
  Which users are connected to port 5432?
    peercred list --port 5432 --json | jq -r '.connections[].client.uid'
  Who comes and goes?
    peercred watch
  It does not work. Why?
    sudo peercred doctor

\b
Exit codes:
  0  found, or all is well
  1  not found; or doctor: not all is well
  2  the question is wrong
  3  the daemon does not answer, or not in a way that can be used
  4  the daemon refuses to answer you
  74 the answer cannot be written
  run: the command's own, or 125, 126, 127: see `peercred run --help`

Errors are one line on stderr: what is wrong; what mends it. With --json, stdout
gets one document in that case too: {"error": {"code", "message", "exit_code"}},
code being "not_found" (with "reason"), "usage", "unavailable",
"deadline_exceeded", "refused" or "not_run".""",
)
@click.version_option(package_name="peercredd", message="peercred %(version)s")
@common_options
def cli() -> None:
    """Tell who is at the other end of a localhost TCP connection.

    Asks the daemon peercredd, which has the kernel write down at connect() what
    SO_PEERCRED would tell on a unix socket.
    """


for command in (lookup, list_connections, watch, status, whoami, run, doctor, completion):
    cli.add_command(command)


def main() -> None:
    """Run the command line and exit with its code."""
    # Ctrl-C and a reader that went away end this as they end any command: silently, by the signal.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        code = _run(sys.argv[1:])
        if sys.stdout:  # there is none where it was closed
            sys.stdout.flush()
    except OSError as error:
        print(f"peercred: the answer cannot be written: {error.strerror}", file=sys.stderr)
        # At a regular exit the interpreter would try to write it once more.
        os._exit(os.EX_IOERR)
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    try:
        return cli.main(arguments, prog_name="peercred", standalone_mode=False) or 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return USAGE
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "peercred"
        # click breaks some of its texts over lines.
        reason = " ".join(error.format_message().split()).rstrip(".")
        return _fail(arguments, USAGE, "usage", f"{reason}; see `{command} --help`")
    except PeerCredError as error:
        exit_code, code, particulars = _classify(error)
        return _fail(arguments, exit_code, code, str(error), **particulars)


def _classify(error: PeerCredError) -> tuple[int, str, dict[str, str]]:
    match error:
        case NotFound():
            return NOT_FOUND, "not_found", {"reason": error.reason}
        case InvalidArgument():
            return USAGE, "usage", {"field": error.field}
        case Refused():
            return REFUSED, "refused", {}
        case RunError():
            return OWN_FAILURE, "not_run", {}
        case DeadlineExceeded():
            return UNAVAILABLE, "deadline_exceeded", {}
    return UNAVAILABLE, "unavailable", {}


def _fail(arguments: list[str], exit_code: int, code: str, message: str, **particulars: str) -> int:
    print(f"peercred: {escape(message)}", file=sys.stderr)
    # The words themselves, not their parsed form: they may be what failed to parse. What comes
    # behind "--" is another command's.
    if "--json" in arguments[: arguments.index("--") if "--" in arguments else None]:
        error = {"code": code, **particulars, "message": message, "exit_code": exit_code}
        print_json({"error": error})
    return exit_code


if __name__ == "__main__":
    main()
