"""`python -m wherry_images`: build an image, or choose new packages for it."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from wherry.core.errors import WherryError
from wherry_images.architecture import ARCHITECTURES
from wherry_images.build import build, update_lock


@click.group()
def main() -> None:
    """Build the guest image of wherry from Debian packages."""


@main.command("build")
@click.option(
    "--output", type=click.Path(path_type=Path), required=True, help="Directory to write."
)
@click.option(
    "--arch", type=click.Choice(sorted(ARCHITECTURES)), default="x86_64", show_default=True
)
@click.option("--cache", type=click.Path(path_type=Path), help="Where fetched packages are kept.")
@click.option("--update-lock", "update", is_flag=True, help="Choose the newest packages first.")
def build_command(output: Path, arch: str, cache: Path | None, update: bool) -> None:
    """Build the image for ARCH into the directory OUTPUT."""

    def progress(line: str) -> None:
        click.echo(line, err=True)

    try:
        if update:
            update_lock(arch, progress=progress)
        manifest = build(output, arch, cache=cache, progress=progress)
    except WherryError as error:
        click.echo(f"wherry_images: {error}", err=True)
        sys.exit(error.exit_status)
    click.echo(f"{output}: {manifest.version} for {manifest.architecture}")


if __name__ == "__main__":
    main()
