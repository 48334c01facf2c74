"""completion: scripts for shells, and the names they complete."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from wherry.config.layout import Layout
from wherry.platform import current


def complete_names(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[str]:
    """Return the machines whose names begin with what was typed."""
    names = Layout.current(current()).machine_names()
    return [name for name in names if name.startswith(incomplete)]


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for SHELL.

    For bash: add  eval "$(wherry completion bash)"  to ~/.bashrc.
    """
    from wherry.cli import cli

    maker = get_completion_class(shell)
    assert maker is not None  # click has all three
    click.echo(maker(cli, {}, "wherry", "_WHERRY_COMPLETE").source())
