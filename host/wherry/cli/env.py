"""env: point Docker clients that know no contexts at a machine."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from pathlib import PurePath

import click

from wherry.cli.common import layout, name_argument
from wherry.cli.status import status_of


def _fish(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


# Each of them ends a string that any of them has begun (CharTraits.cs of PowerShell).
_POWERSHELL_QUOTES = re.compile("['\u2018\u2019\u201a\u201b]")


def _powershell(text: str) -> str:
    return "'" + _POWERSHELL_QUOTES.sub(r"\g<0>\g<0>", text) + "'"


_LINES: dict[str, tuple[str, Callable[[str], str]]] = {
    "bash": ("export DOCKER_HOST={host}", shlex.quote),
    "zsh": ("export DOCKER_HOST={host}", shlex.quote),
    "fish": ("set -gx DOCKER_HOST {host}", _fish),
    "powershell": ("$Env:DOCKER_HOST = {host}", _powershell),
}
_USES = {
    "bash": '# Run: eval "$(wherry env{name})"',
    "zsh": '# Run: eval "$(wherry env{name})"',
    "fish": "# Run: wherry env{name} | source",
    "powershell": "# Run: wherry env{name} | Invoke-Expression",
}


@click.command()
@name_argument
@click.option("--shell", "chosen", type=click.Choice(list(_LINES)), help="The shell to print for.")
def env(name: str, chosen: str | None) -> None:
    """Print what makes Docker clients use machine NAME."""
    from wherry.service import machine

    where = layout()
    fields = status_of(where, machine.require(where, name))
    shell = chosen or _guess()
    line, quote = _LINES[shell]
    click.echo(line.format(host=quote(fields["docker_host"])))
    click.echo(_USES[shell].format(name="" if name == "default" else f" {name}"))


def _guess() -> str:
    """$SHELL on POSIX systems; Windows sets none, and has PowerShell."""
    name = PurePath(os.environ.get("SHELL") or "pwsh").stem
    if name == "pwsh":
        return "powershell"
    return name if name in _LINES else "bash"
