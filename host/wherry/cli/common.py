"""What the commands share: where the machines are, options, output."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from wherry.config.layout import DEFAULT_NAME, Layout
from wherry.platform import current

F = TypeVar("F", bound=Callable[..., Any])


def layout() -> Layout:
    """Return the user's directories, made if they are missing.

    :raises WherryError: they cannot be made.
    """
    found = Layout.current(current())
    found.prepare()
    return found


def name_argument(function: F) -> F:
    """Add the optional NAME, ``default`` if it is left out."""
    from wherry.cli.completion import complete_names

    return click.argument("name", default=DEFAULT_NAME, shell_complete=complete_names)(function)


def json_option(function: F) -> F:
    """Add ``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


def print_json(value: object) -> None:
    """Print a value as JSON."""
    click.echo(json.dumps(value, indent=2))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows below headings, each column as wide as its longest cell."""
    cells = [list(columns), *(list(row) for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    for row in cells:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo(line.rstrip())


def stderr_is_terminal() -> bool:
    """Whether progress may be shown."""
    return sys.stderr.isatty()
