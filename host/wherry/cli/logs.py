"""logs."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TextIO

import click

from wherry.cli.common import layout, name_argument
from wherry.core.errors import WherryError

ENGINE_LOG = "/var/log/dockerd/current"
"""Where the guest keeps what dockerd says."""

_POLL_S = 0.2


@click.command()
@name_argument
@click.option("-f", "--follow", is_flag=True, help="Go on as the log grows.")
@click.option(
    "--source",
    type=click.Choice(["service", "console", "engine"]),
    default="service",
    show_default=True,
    help="Whose log.",
)
def logs(name: str, follow: bool, source: str) -> None:
    """Show a log of machine NAME."""
    from wherry.cli.shell import run_in_guest
    from wherry.service import machine

    where = layout()
    paths = machine.require(where, name)
    if source == "engine":
        command = ["tail", "-n", "+1", *(["-F"] if follow else []), ENGINE_LOG]
        sys.exit(run_in_guest(where, name, command, terminal=False))
    path = paths.service_log if source == "service" else paths.console_log
    try:
        _print(path, follow)
    except FileNotFoundError as error:
        raise WherryError(
            f"machine {name} has no {source} log yet", hint=f"start it: wherry start {name}"
        ) from error


def _print(path: Path, follow: bool) -> None:
    file = _open(path)
    try:
        while True:
            rotated = follow and _is_another(path, file)
            # After a look at the name: what the old file got until then is read to its end.
            while chunk := file.read(65536):
                click.echo(chunk, nl=False)
            if not follow:
                return
            if rotated:
                file.close()
                file = _open(path)
                continue
            time.sleep(_POLL_S)
            # QEMU begins the console's file anew at each boot.
            if os.fstat(file.fileno()).st_size < file.tell():
                file.seek(0)
    finally:
        file.close()


def _open(path: Path) -> TextIO:
    return path.open(encoding="utf-8", errors="replace")


def _is_another(path: Path, file: TextIO) -> bool:
    """Whether the name leads to another file by now, as after a rotation."""
    try:
        return not os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False  # between the old one and the new one
