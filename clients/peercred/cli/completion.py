"""``peercred completion``: scripts that teach a shell to complete this command."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from peercred.cli.display import print_json
from peercred.cli.settings import Settings, common_options, pass_settings


@click.command(
    epilog="""\b
Examples:
  peercred completion bash > /etc/bash_completion.d/peercred
  peercred completion zsh > "${fpath[1]}/_peercred"
  peercred completion fish > ~/.config/fish/completions/peercred.fish
  source <(peercred completion bash)        # this shell only"""
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@common_options
@pass_settings
@click.pass_context
def completion(context: click.Context, settings: Settings, shell: str) -> None:
    """Print the completion script for SHELL."""
    completer = get_completion_class(shell)
    assert completer is not None, "click knows these shells by name"
    script = completer(context.find_root().command, {}, "peercred", "_PEERCRED_COMPLETE").source()
    if settings.json:
        print_json({"shell": shell, "script": script})
    else:
        click.echo(script, nl=False)
