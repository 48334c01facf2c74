"""config show|get|set|unset|edit|path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from wherry.cli.common import json_option, layout, name_argument, print_json, print_table
from wherry.config.layout import DEFAULT_NAME
from wherry.core.errors import UsageError, WherryError


@click.group()
def config() -> None:
    """Show and change a machine's settings."""


def machine_option(function: Any) -> Any:
    """Add ``--machine``: these commands take keys and values as arguments."""
    return click.option(
        "--machine", "name", default=DEFAULT_NAME, show_default=True, help="Which machine."
    )(function)


def effective(name: str) -> dict[str, Any]:
    """Return every setting's value by key: the file's, else the default."""
    from wherry.config.load import read_values
    from wherry.config.model import SETTINGS
    from wherry.service import machine

    where = layout()
    values = read_values(machine.require(where, name).config)
    return {
        key: setting.show(values.get(key, setting.default(where.platform)))
        for key, setting in SETTINGS.items()
    }


@config.command()
@name_argument
@json_option
def show(name: str, as_json: bool) -> None:
    """Print every setting of machine NAME with its meaning."""
    from wherry.config.model import SETTINGS

    values = effective(name)
    if as_json:
        print_json(values)
        return
    print_table(
        ("KEY", "VALUE", "MEANING"),
        [(key, _text(value), SETTINGS[key].help) for key, value in values.items()],
    )


@config.command()
@click.argument("key")
@machine_option
def get(key: str, name: str) -> None:
    """Print the value of KEY."""
    values: Mapping[str, Any] = effective(name)
    table, _, leaf = key.partition(".")
    if key in values:
        click.echo(_text(values[key]))
    elif isinstance(values.get(table), Mapping) and leaf in values[table]:
        click.echo(_text(values[table][leaf]))
    else:
        raise UsageError(f"no setting is named {key}", hint="see: wherry config show")


@config.command("set")
@click.argument("key")
@click.argument("value")
@machine_option
def set_(key: str, value: str, name: str) -> None:
    """Set KEY to VALUE; a running machine takes it at its next start."""
    _change(name, key, value)


@config.command()
@click.argument("key")
@machine_option
def unset(key: str, name: str) -> None:
    """Return KEY to its default."""
    _change(name, key, None)


def _change(name: str, key: str, value: str | None) -> None:
    from wherry.cli.status import status_of
    from wherry.service import machine
    from wherry.vm import disk
    from wherry.vm.qemu import programs

    where = layout()
    paths = machine.require(where, name)
    with machine.locked(where, name):
        if key == "disk":
            # Refused here, not at the next start: a disk cannot shrink.
            _refuse_shrinking(where, paths, value, disk, programs)
        wanted = machine.reconfigure(where, paths, {key: value})
        running = status_of(where, paths)["state"] == "running"
        if key == "endpoint.default_socket":
            # Within the lock: no stop may come between.
            _apply_default_socket(where, paths, wanted.default_socket, running=running)
            return
    if running:
        click.echo(f"It takes effect at the next start: wherry restart {name}", err=True)


def _apply_default_socket(where: Any, paths: Any, wanted: bool, *, running: bool) -> None:
    """Do at once what the setting says now, or tell why not: the setting itself is kept."""
    from wherry.service.default_socket import DefaultSocket

    place = DefaultSocket.of(where, paths)
    try:
        if not wanted:
            place.release()
        elif running:
            place.claim()
        elif (problem := place.problem()) is not None:
            raise problem
    except WherryError as error:
        click.echo(f"wherry: warning: {error}", err=True)


def _refuse_shrinking(where: Any, paths: Any, value: str | None, disk: Any, programs: Any) -> None:
    from wherry.config.units import format_size, parse_size

    if value is None:
        return
    try:
        wanted = parse_size(value)
    except ValueError:
        return  # said with all other wrong values
    qemu_img = programs.find(where.platform.architecture(), where.platform).img
    present = disk.virtual_size(paths.data_disk, qemu_img=qemu_img)
    if wanted < present:
        raise UsageError(
            f"disk = {value} is smaller than the data disk, {format_size(present)}",
            hint="a disk can only grow",
        )


@config.command()
@name_argument
def edit(name: str) -> None:
    """Open the settings of machine NAME in $EDITOR, and check them afterwards."""
    from wherry.config.load import parse
    from wherry.core.files import write_atomic
    from wherry.service import machine

    paths = machine.require(layout(), name)
    before = paths.config.read_text(encoding="utf-8") if paths.config.exists() else ""
    after = click.edit(before, extension=".toml")
    if after is None or after == before:
        click.echo("Nothing changed.")
        return
    try:
        parse(after, paths.config)
    except WherryError:
        kept = paths.config.with_name("config.toml.rejected")
        kept.write_text(after, encoding="utf-8")
        click.echo(f"Not saved; what you wrote is in {kept}", err=True)
        raise
    write_atomic(paths.config, after.encode())


@config.command()
@name_argument
def path(name: str) -> None:
    """Print where the settings of machine NAME are."""
    from wherry.service import machine

    click.echo(machine.require(layout(), name).config)


def _text(value: Any) -> str:
    import json

    return value if isinstance(value, str) else json.dumps(value)
