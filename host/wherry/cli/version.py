"""version."""

from __future__ import annotations

import click

from wherry import __version__
from wherry.core.errors import WherryError
from wherry.platform import current


@click.command()
def version() -> None:
    """Print the versions of wherry and QEMU."""
    from wherry.vm.qemu import programs

    click.echo(f"wherry {__version__}")
    platform = current()
    try:
        click.echo(f"QEMU {programs.find(platform.architecture(), platform).version}")
    except WherryError as error:
        click.echo(f"QEMU: {error}")
