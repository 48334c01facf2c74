"""sync: the directories and files of this computer that containers mount."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from wherry.cli.common import json_option, layout, print_json, print_table
from wherry.cli.progress import progress_line, sync_progress
from wherry.config.layout import DEFAULT_NAME


@click.group()
@click.option("--machine", "name", default=DEFAULT_NAME, show_default=True, help="Whose.")
@click.pass_context
def sync(context: click.Context, name: str) -> None:
    """Show and manage the files that containers mount.

    What a container mounts with -v is synchronised by itself; nothing here has to be called
    for that.
    """
    context.obj = name


@sync.command("list")
@json_option
@click.pass_obj
def list_(name: str, as_json: bool) -> None:
    """List what is synchronised."""
    found = _call(name, "sync_list")
    if as_json:
        print_json(found)
        return
    print_table(
        ("PATH", "STATE", "CONFLICTS", "PROBLEMS"),
        [
            (root["path"], root["state"], str(root["conflicts"]), str(len(root["problems"])))
            for root in found
        ],
    )


@sync.command()
@json_option
@click.pass_obj
def status(name: str, as_json: bool) -> None:
    """Show what is synchronised, and each path that is not equal on both sides."""
    found = _call(name, "sync_list")
    if as_json:
        print_json(found)
        return
    for root in found:
        click.echo(root["path"])
        click.echo(f"  State:      {root['state']}")
        if root["reason"]:
            click.echo(f"  Reason:     {root['reason']}")
        if root["watch_problem"]:
            click.echo(f"  Not watched: {root['watch_problem']}")
        if root["transfer"] is not None:
            click.echo(f"  Progress:   {progress_line(root['transfer'])}")
            click.echo(f"  At:         {root['transfer']['path']}")
        click.echo(f"  Moved:      {root['bytes_moved'] / 1e6:.1f} MB")
        click.echo(f"  Conflicts:  {root['conflicts']}")
        for problem in root["problems"]:
            click.echo(f"  Problem:    {problem['path'] or '.'}: {problem['reason']}")


@sync.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--ignore",
    metavar="PATTERN",
    multiple=True,
    help="What to leave out, as a line of .wherryignore does; may be given again.",
)
@json_option
@click.pass_obj
def add(name: str, path: Path, ignore: tuple[str, ...], as_json: bool) -> None:
    """Synchronise PATH from now on, whether a container mounts it or not.

    Its patterns, if any are given, are in the place of those given before, come after those of
    .wherryignore, and hold until `wherry sync remove`.
    """
    with sync_progress() as show:
        found = _call(name, "sync_add", show, path=_absolute(path), ignore=ignore)
    if as_json:
        print_json(found)


@sync.command()
@click.argument("path", type=click.Path(path_type=Path))
@json_option
@click.pass_obj
def remove(name: str, path: Path, as_json: bool) -> None:
    """Synchronise PATH no longer; both sides keep what they have.

    What was known of it is forgotten, so it is halted no longer. A container that mounts it and
    is started again begins anew: what one side alone has comes to the other one.
    """
    removed = _absolute(path)
    _call(name, "sync_remove", path=removed)
    if as_json:
        print_json({"path": removed})


@sync.command()
@click.argument("path", type=click.Path(path_type=Path), required=False)
@json_option
@click.pass_obj
def flush(name: str, path: Path | None, as_json: bool) -> None:
    """Wait until PATH, or everything, is equal on both sides."""
    with sync_progress() as show:
        chosen = _absolute(path) if path is not None else None
        found = _call(name, "sync_flush", show, path=chosen)
    if as_json:
        print_json(found)


@sync.command()
@json_option
@click.pass_obj
def conflicts(name: str, as_json: bool) -> None:
    """List files that both sides had changed.

    This computer's version is in place on both sides; the container's is kept.
    """
    found = _call(name, "sync_conflicts")
    if as_json:
        print_json(found)
        return
    print_table(
        ("ID", "TIME", "SIZE", "PATH"),
        [
            (
                each["id"],
                f"{datetime.datetime.fromtimestamp(each['time']):%Y-%m-%d %H:%M:%S}",
                str(each["size"]),
                each["path"],
            )
            for each in found
        ],
    )


@sync.command()
@click.argument("id")
@click.option("--restore", "action", flag_value="restore", help="Put it where it was.")
@click.option("--discard", "action", flag_value="discard", help="Remove it.")
@click.option("--save", "target", type=click.Path(path_type=Path), help="Put it into this file.")
@json_option
@click.pass_obj
def resolve(name: str, id: str, action: str | None, target: Path | None, as_json: bool) -> None:
    """Say what becomes of the container's version of a file; see conflicts for the ID."""
    if (action is None) == (target is None):
        raise click.UsageError("one of --restore, --discard and --save FILE is needed")
    action = action or "save"
    written = _call(
        name,
        "sync_resolve",
        id=id,
        action=action,
        target=_absolute(target) if target is not None else "",
    )
    if as_json:
        print_json({"id": id, "action": action, "path": written or None})
    elif written:
        click.echo(written)


def _absolute(path: Path) -> str:
    # Not resolved: what containers mount is known by the path that they were given.
    return os.path.normpath(Path.cwd() / path)


def _call(
    name: str,
    method: str,
    on_event: Callable[[Mapping[str, Any]], None] = lambda event: None,
    **params: Any,
) -> Any:
    from wherry.control.client import call
    from wherry.service import machine

    where = layout()
    paths = machine.require(where, name)
    return call(where.platform, paths.control_socket, method, params, on_event=on_event)
