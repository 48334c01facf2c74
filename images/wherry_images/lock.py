"""Lock files: the exact packages an image is made of.

A lock file is TOML with the time of the update, which becomes the timestamp of everything in the
image, and one line per package. The sha256 is what is trusted, not the archive the file is
fetched from.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from wherry.core.errors import WherryError

UPDATE_LOCK = "choose newer packages: python -m wherry_images build --update-lock --output DIR"


@dataclass(frozen=True, order=True)
class LockedPackage:
    """One .deb: `path` is relative to the root of `archive`, `size` is in bytes."""

    name: str
    version: str
    archive: str
    path: str
    size: int
    sha256: str

    @property
    def file_name(self) -> str:
        """The name in the cache, unique for the contents."""
        return f"{self.name}_{self.sha256[:16]}.deb"


@dataclass(frozen=True)
class Lock:
    """All packages of one tree, and the Unix time of the update that chose them."""

    epoch: int
    packages: tuple[LockedPackage, ...]

    def version_of(self, name: str) -> str:
        """Return the locked version of package `name`; raises KeyError."""
        return {package.name: package.version for package in self.packages}[name]


def read_lock(path: Path) -> Lock:
    """Read a lock file.

    Raises WherryError when it is missing or not what `write_lock` writes.
    """
    try:
        document = tomllib.loads(path.read_text())
        packages = tuple(LockedPackage(**entry) for entry in document["packages"])
        return Lock(epoch=int(document["epoch"]), packages=packages)
    except FileNotFoundError as error:
        raise WherryError(f"there is no lock file {path}", hint=UPDATE_LOCK) from error
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as error:
        raise WherryError(
            f"the lock file {path} cannot be read: {error}",
            hint=f"restore it from git, or {UPDATE_LOCK}",
        ) from error


def format_lock(epoch: int, packages: Iterable[LockedPackage]) -> str:
    """Return the text of a lock file, one package a line so that a diff reads well."""
    lines = [
        "# Written by `python -m wherry_images build --update-lock`.",
        f"epoch = {epoch}",
        "packages = [",
    ]
    for package in sorted(packages):
        fields = ", ".join(
            f"{key} = {value}" if isinstance(value, int) else f'{key} = "{value}"'
            for key, value in vars(package).items()
        )
        lines.append(f"    {{ {fields} }},")
    lines.append("]")
    return "\n".join(lines) + "\n"
