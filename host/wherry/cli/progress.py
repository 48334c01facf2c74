"""The stages of a start, and how far a synchronisation is, on a terminal alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from wherry.cli.common import stderr_is_terminal

_WORDS = {
    "image": "Checking the image",
    "accelerator": "Trying which acceleration works",
    "disk": "Checking the data disk",
    "machine": "Starting QEMU",
    "adopt": "Taking over the running machine",
    "boot": "Booting the guest",
    "tunnel": "Connecting over SSH",
    "engine": "Waiting for the engine",
    "settings": "Starting the engine with its new settings",
    "names": "Telling the guest this computer's names",
    "files": "Looking after shared files",
    "ports": "Looking after published ports",
    "stop": "Stopping the engine and its containers",
}


class Show(Protocol):
    """Takes the service's events."""

    def __call__(self, event: Mapping[str, Any]) -> None: ...


@contextmanager
def stages() -> Iterator[Show]:
    """Show each stage with its elapsed time while it runs, and a line when it has ended."""
    if not stderr_is_terminal():
        yield lambda event: None
        return
    # rich takes 50 ms to import, which a script never needs.
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        tasks: dict[str, Any] = {}

        def show(event: Mapping[str, Any]) -> None:
            stage = str(event.get("stage", ""))
            if event.get("state") == "begin":
                tasks[stage] = progress.add_task(_WORDS.get(stage, stage), total=1)
            elif stage in tasks:
                progress.update(tasks[stage], completed=1)

        yield show


def progress_line(transfer: Mapping[str, Any]) -> str:
    """Return how far a synchronisation is, in words."""
    left_s = transfer["left_s"]
    left = "" if left_s is None else f", {left_s:.0f} s left"
    return (
        f"{transfer['files_done']} of {transfer['files']} files,"
        f" {transfer['bytes_done'] / 1e6:.1f} of {transfer['bytes'] / 1e6:.1f} MB,"
        f" {transfer['bytes_per_s'] / 1e6:.1f} MB/s{left}"
    )


@contextmanager
def sync_progress() -> Iterator[Show]:
    """Show how far each root is that is being synchronised, on a line of its own."""
    if not stderr_is_terminal():
        yield lambda event: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (BarColumn(bar_width=20), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        tasks: dict[str, Any] = {}

        def show(event: Mapping[str, Any]) -> None:
            path, transfer = str(event["path"]), event["transfer"]
            if transfer is None:
                return
            if path not in tasks:
                tasks[path] = progress.add_task("", total=None)
            progress.update(
                tasks[path],
                description=f"{escape(path)}: {progress_line(transfer)}",
                total=transfer["bytes"] or 1,
                completed=transfer["bytes_done"],
            )

        yield show
