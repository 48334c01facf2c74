"""image build|list|pull|verify|remove."""

from __future__ import annotations

import os
import shutil

import click

from wherry.cli.common import (
    F,
    json_option,
    layout,
    print_json,
    print_table,
    stderr_is_terminal,
)
from wherry.config.units import format_size
from wherry.core.errors import UsageError, WherryError
from wherry.platform import current

_ARCHITECTURES = ("x86_64", "aarch64")


@click.group()
def image() -> None:
    """Build, fetch and manage guest images."""


def _architecture_option(function: F) -> F:
    return click.option(
        "--arch",
        "architecture",
        type=click.Choice(_ARCHITECTURES),
        default=lambda: current().architecture(),
        help="The guest's architecture; this computer's if left out.",
    )(function)


@image.command()
@_architecture_option
@click.option("--force", is_flag=True, help="Build even if this image is installed already.")
def build(architecture: str, force: bool) -> None:
    """Build the guest image from Debian packages; on Linux, with mmdebstrap."""
    from wherry.vm.image import exclusively, install, installed, verify
    from wherry_images.build import build as build_image
    from wherry_images.build import version_to_build

    where = layout()
    version = version_to_build(architecture)
    with exclusively(where, waiting=_waiting):
        for made in installed(where):
            if (made.version, made.architecture) == (version, architecture) and not force:
                verify(made)
                click.echo(f"Image {made.name} is there already.")
                return
        staged = where.images / f".build-{architecture}"
        try:
            build_image(staged, architecture, progress=_progress)
            made = install(where, staged)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    click.echo(f"Image {made.name}: {format_size(made.boot_bytes)} to boot, in {made.directory}")


def _waiting() -> None:
    _progress("waiting for another wherry image command to end")


def _progress(line: str) -> None:
    if stderr_is_terminal():
        click.echo(line, err=True)


@image.command()
@_architecture_option
@click.option("--from", "base_url", metavar="URL", help="Where releases are.")
@click.option("--clients/--no-clients", default=None, help="The docker CLI for Linux hosts too.")
def pull(architecture: str, base_url: str | None, clients: bool | None) -> None:
    """Fetch a released guest image."""
    from wherry.vm.image import exclusively
    from wherry.vm.release import RELEASE_VARIABLE
    from wherry.vm.release import pull as pull_image

    where = layout()
    base = base_url or os.environ.get(RELEASE_VARIABLE)
    if not base:
        raise UsageError(
            "there is no address to fetch images from",
            hint=f"give --from URL or set {RELEASE_VARIABLE}",
        )
    if clients is None:
        clients = where.platform.name == "linux"
    shown = stderr_is_terminal()

    def progress(name: str, done: int, total: int) -> None:
        if shown:
            click.echo(
                f"\r{name}: {format_size(done)} of {format_size(total)}  ", nl=False, err=True
            )

    with exclusively(where, waiting=_waiting):
        try:
            made = pull_image(where, base, architecture, clients=clients, progress=progress)
        finally:
            if shown:
                click.echo(err=True)
    click.echo(f"Image {made.name} is installed.")


@image.command("list")
@json_option
def list_(as_json: bool) -> None:
    """Show the installed images, the newest first."""
    from wherry.vm.image import installed

    images = installed(layout())
    if as_json:
        print_json(
            [
                {
                    "name": each.name,
                    "version": each.version,
                    "architecture": each.architecture,
                    "engine_version": each.engine_version,
                    "size_bytes": each.boot_bytes,
                    "sha256": each.sha256,
                    "directory": str(each.directory),
                }
                for each in images
            ]
        )
        return
    print_table(
        ("NAME", "ENGINE", "SIZE"),
        [(each.name, each.engine_version, format_size(each.boot_bytes)) for each in images],
    )


@image.command()
@click.argument("name", required=False)
def verify(name: str | None) -> None:
    """Compare the installed images, or image NAME alone, with their manifests."""
    from wherry.vm import image as images

    where = layout()
    found = [
        entry
        for entry in sorted(where.images.iterdir())
        if not entry.name.startswith(".") and (name is None or entry.name == name)
    ]
    if not found:
        raise WherryError(
            f"no image is named {name}" if name else "no image is installed",
            hint="see: wherry image list",
        )
    for directory in found:
        images.verify(images.read(directory))
        click.echo(f"{directory.name}: good")


@image.command()
@click.argument("name")
def remove(name: str) -> None:
    """Remove image NAME; machines that run keep it until they stop."""
    from wherry.vm.image import remove as remove_image

    remove_image(layout(), name)
    click.echo(f"Image {name} is removed.")
