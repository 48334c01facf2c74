"""config show|get|set|unset|edit|path."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from wherry.cli.common import json_option, layout, name_argument, print_json, print_table
from wherry.config.layout import DEFAULT_NAME
from wherry.core.errors import UsageError, WherryError

if TYPE_CHECKING:
    from wherry.config.layout import Layout, MachinePaths
    from wherry.config.model import Config

    Check = Callable[[Config], object]


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
    from wherry.config.load import read_values, split_key
    from wherry.service import machine

    values = effective(name)
    if key in _PROXIES:
        # Asked for by its name, it is given with its password.
        written = read_values(machine.require(layout(), name).config)
        values[key] = written.get(key, values[key])
    value: Any = values
    for part in [key] if key in values else split_key(key):
        if not isinstance(value, Mapping) or part not in value:
            raise UsageError(f"no setting is named {key}", hint="see: wherry config show")
        value = value[part]
    click.echo(_text(value))


@config.command("set")
@click.argument("pairs", metavar="KEY VALUE [KEY VALUE]...", nargs=-1, required=True)
@machine_option
def set_(pairs: tuple[str, ...], name: str) -> None:
    """Set KEY to VALUE; a running machine takes most at its next start.

    The engine takes engine.* and proxy.* at once. VALUE is written as in TOML, or as a plain
    text; a list of texts as words with commas between them. ENGINE.TABLE.KEY reaches into a
    table.
    """
    if len(pairs) % 2:
        raise UsageError(f"{pairs[-1]} has no value", hint="wherry config set KEY VALUE")
    _change(name, dict(zip(pairs[::2], pairs[1::2], strict=True)))


@config.command()
@click.argument("keys", metavar="KEY...", nargs=-1, required=True)
@machine_option
def unset(keys: tuple[str, ...], name: str) -> None:
    """Return KEY to its default."""
    _change(name, dict.fromkeys(keys))


def _change(name: str, changes: Mapping[str, str | None]) -> None:
    from wherry.service import machine

    where = layout()
    paths = machine.require(where, name)
    with machine.locked(where, name):
        _apply(where, paths, changes.keys(), partial(machine.reconfigure, where, paths, changes))


@config.command()
@name_argument
def edit(name: str) -> None:
    """Open the settings of machine NAME in $EDITOR, and check them afterwards."""
    from wherry.config.load import read_text
    from wherry.core.files import write_atomic
    from wherry.service import machine

    where = layout()
    paths = machine.require(where, name)
    before = read_text(paths.config)
    # Without the lock, which would keep every other command waiting for the editor.
    after = click.edit(before, extension=".toml")
    if after is None or after == before:
        click.echo("Nothing changed.")
        return
    try:
        with machine.locked(where, name):
            changed = machine.changed_settings(paths, after)
            _apply(where, paths, changed, partial(machine.rewrite, where, paths, before, after))
    except WherryError:
        kept = paths.config.with_name("config.toml.rejected")
        write_atomic(kept, after.encode())
        click.echo(f"Not saved; what you wrote is in {kept}", err=True)
        raise


_DEFAULT_SOCKET = "endpoint.default_socket"
_CERTIFICATES = "certificates.directory"
_AT_ONCE = {_DEFAULT_SOCKET, _CERTIFICATES, "ssh.agent"}
_TABLES = ("engine", "proxy")
_PROXIES = ("proxy.http", "proxy.https")


def _apply(
    where: Layout, paths: MachinePaths, keys: Iterable[str], save: Callable[[Check], Config]
) -> None:
    """Save settings and do at once what can be, within the machine's lock; tell the rest.

    :param keys: of the settings that change.
    :param save: checks and writes them; it calls its argument with what they will be before.
    """
    from wherry.cli.status import status_of

    running = status_of(where, paths)["state"] == "running"
    engine = _Engine(where, paths, keys, running=running)
    wanted = save(engine.try_)
    engine.tell(wanted)
    rest = {key for key in keys if _table(key) not in _TABLES}
    if _DEFAULT_SOCKET in rest:
        # Within the lock: no stop may come between.
        _apply_default_socket(where, paths, wanted.default_socket, running=running)
    if _CERTIFICATES in rest and running:
        _apply_certificates(where, paths)
    if running and rest - _AT_ONCE:
        click.echo(f"It takes effect at the next start: wherry restart {paths.name}", err=True)


def _table(key: str) -> str:
    return key.partition(".")[0]


class _Engine:
    """What a change of settings means for the engine, while it runs.

    :param keys: those that change.
    """

    def __init__(
        self, where: Layout, paths: MachinePaths, keys: Iterable[str], *, running: bool
    ) -> None:
        self._where = where
        self._paths = paths
        self._changed = {_table(key) for key in keys}.intersection(_TABLES)
        self._running = running
        self._done: Mapping[str, Any] | None = None

    def try_(self, config: Any) -> None:
        """Have the engine take its part of the settings.

        :raises WherryError: it refuses them.
        """
        from wherry.cli.progress import stages
        from wherry.control.client import call
        from wherry.service import proxies

        if not self._running or not self._changed:
            return
        # The environment of this command counts for what is about proxies alone.
        found = None
        if "proxy" in self._changed:
            found = proxies.for_engine(proxies.for_guest(config.proxy, proxies.system()))
        params = {"engine": config.engine, "proxies": found}
        with stages() as show:
            self._done = call(
                self._where.platform,
                self._paths.control_socket,
                "engine_settings",
                params,
                on_event=show,
            )

    def tell(self, config: Any) -> None:
        """Say what became of it, and do what is left to do."""
        from wherry.service import docker_proxies, proxies

        if "proxy" in self._changed:
            try:
                docker_proxies.update(self._paths, config, proxies.system())
            except WherryError as error:
                click.echo(f"wherry: warning: {error}", err=True)
        restart = f"wherry restart {self._paths.name}"
        if self._changed and not self._running:
            click.echo("The engine checks it at the machine's next start.", err=True)
        elif self._done is not None:
            later = self._done["later"]
            if set(self._done["keys"]) - set(later):
                click.echo("The engine has started anew with it; containers went on.", err=True)
            if later:
                which = ", ".join(later)
                click.echo(
                    f"Containers run, and would have to be stopped for: {which}. "
                    f"It takes effect at the next start: {restart}",
                    err=True,
                )
            if self._done["note"]:
                click.echo(f"wherry: warning: {self._done['note']}", err=True)
            _tell_certificates(self._done["certificates"], restart)


def _apply_default_socket(
    where: Layout, paths: MachinePaths, wanted: bool, *, running: bool
) -> None:
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


def _apply_certificates(where: Layout, paths: MachinePaths) -> None:
    """Have a running guest trust what is there now; the setting itself is kept in any case."""
    from wherry.control.client import call

    try:
        done = call(where.platform, paths.control_socket, "certificates")
    except WherryError as error:
        click.echo(f"wherry: warning: {error}", err=True)
        return
    _tell_certificates(done, f"wherry restart {paths.name}")


def _tell_certificates(done: Mapping[str, Any], restart: str) -> None:
    for problem in done["problems"]:
        click.echo(f"wherry: warning: {problem}", err=True)
    if done["restarted"]:
        click.echo("The engine has started anew to trust them; containers went on.", err=True)
    elif done["changed"]:
        click.echo(f"The engine trusts them from its next start on: {restart}", err=True)


@config.command()
@name_argument
def path(name: str) -> None:
    """Print where the settings of machine NAME are."""
    from wherry.service import machine

    click.echo(machine.require(layout(), name).config)


def _text(value: Any) -> str:
    import json

    return value if isinstance(value, str) else json.dumps(value)
