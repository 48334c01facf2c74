"""Guest images: what is installed, whether it is whole, which one a machine uses.

An image is a directory ``images/VERSION-ARCHITECTURE`` with the files that
``manifest.json`` lists. It is made elsewhere and moved into place whole, so a
directory with a manifest is complete until something damages it.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from wherry.config.layout import Layout
from wherry.core.errors import WherryError
from wherry.core.files import sha256

MANIFEST = "manifest.json"
CLIENTS = "clients"
BOOT_FILES = ("kernel", "initrd", "root", "probe")
EMULATION = "emulation"

_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+~-]*")
"""What a version, an architecture and each part of a file's path look like."""

_OLD = ".old-"

_LOCK_TIMEOUT_S = 1800.0
"""Longer than a build takes on a slow computer, or fetching an image on a slow line."""

_REBUILD = "build or fetch it again: wherry image build, or wherry image pull"


@dataclass(frozen=True)
class Image:
    """One installed image."""

    directory: Path
    version: str
    architecture: str
    engine_version: str
    cmdline: str
    """The kernel arguments that belong to the image."""
    files: Mapping[str, tuple[int, str]]
    """Size in bytes and SHA-256 of each file, by its path in the directory."""
    certificates: frozenset[str] = frozenset()
    """SHA-256 of each certificate authority that the guest trusts by itself, as of its DER."""

    @property
    def name(self) -> str:
        """The image's directory name."""
        return f"{self.version}-{self.architecture}"

    @property
    def kernel(self) -> Path:
        return self.directory / "kernel"

    @property
    def initrd(self) -> Path:
        return self.directory / "initrd"

    @property
    def root(self) -> Path:
        return self.directory / "root"

    @property
    def probe(self) -> Path:
        """A tiny initramfs that says ``wherry: init`` and powers off."""
        return self.directory / "probe"

    @property
    def emulation(self) -> Path | None:
        """The disk that makes programs of other architectures run; not every image has it."""
        return self.directory / EMULATION if EMULATION in self.files else None

    @property
    def clients(self) -> Path:
        """The directory with ``docker`` and its plugins, which a fetched image may lack."""
        return self.directory / CLIENTS

    @property
    def sha256(self) -> str:
        """The root's digest, which stands for the image in ``wherry status``."""
        return self.files["root"][1]

    @property
    def boot_bytes(self) -> int:
        """Size of what the VM boots, without the clients exported for the host."""
        return sum(self.files[name][0] for name in BOOT_FILES)


def read(directory: Path) -> Image:
    """Read an image's manifest; its files are not looked at.

    :raises WherryError: there is no manifest, or it is not one.
    """
    path = directory / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        image = Image(
            directory=directory,
            version=_word(str(manifest["version"])),
            architecture=_word(str(manifest["architecture"])),
            engine_version=str(manifest["engine_version"]),
            cmdline=str(manifest["cmdline"]),
            files={
                _inside(name): (int(entry["size"]), str(entry["sha256"]))
                for name, entry in manifest["files"].items()
            },
            certificates=frozenset(map(str, manifest["certificates"])),
        )
        if manifest["schema"] != 1:
            raise ValueError(f"schema {manifest['schema']} is not 1")
        missing = [name for name in BOOT_FILES if name not in image.files]
        if missing:
            raise ValueError(f"it lists no {missing[0]}")
    except FileNotFoundError as error:
        raise WherryError(f"the image {directory} has no {MANIFEST}", hint=_REBUILD) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WherryError(f"{path} is not an image's manifest: {error}", hint=_REBUILD) from error
    return image


def _inside(name: str) -> str:
    """Refuse a file name that would lead out of the image's directory."""
    parts = name.split("/")
    if not all(map(_WORD.fullmatch, parts)) or name == MANIFEST:
        raise ValueError(f"{name!r} is not a path inside the image")
    return name


def _word(text: str) -> str:
    """Refuse what would make the image's directory another one."""
    if not _WORD.fullmatch(text):
        raise ValueError(f"{text!r} cannot be in an image's name")
    return text


def verify(image: Image, *, progress: Callable[[int], None] | None = None) -> None:
    """Compare every file that the image has with the manifest.

    The clients for Linux hosts may be left out as a whole, never in part.

    :param progress: called with the bytes read since the last call.
    :raises WherryError: a file is missing, has another size or other contents.
    """
    has_clients = (image.directory / CLIENTS).is_dir()
    for name, (size, digest) in image.files.items():
        path = image.directory / name
        if name.startswith(f"{CLIENTS}/") and not has_clients:
            continue
        try:
            found_size = path.stat().st_size
            if found_size != size:
                raise WherryError(
                    f"{path} has {found_size} bytes where its manifest says {size}", hint=_REBUILD
                )
            found = sha256(path, progress=progress)
        except FileNotFoundError as error:
            raise WherryError(f"{path} is missing from the image", hint=_REBUILD) from error
        except OSError as error:
            raise WherryError(f"{path} cannot be read: {error.strerror}", hint=_REBUILD) from error
        if found != digest:
            raise WherryError(
                f"{path} has SHA-256 {found[:12]}… where its manifest says {digest[:12]}…",
                hint=_REBUILD,
            )


def installed(layout: Layout) -> list[Image]:
    """Return the images that have a readable manifest, the newest version first."""
    images = []
    if layout.images.is_dir():
        for directory in layout.images.iterdir():
            if not directory.name.startswith(".") and (directory / MANIFEST).is_file():
                try:
                    images.append(read(directory))
                except WherryError:
                    continue  # `wherry image verify` names it
    return sorted(images, key=_age, reverse=True)


def choose(layout: Layout, version: str, architecture: str) -> Image:
    """Return the image of that version, or the newest for the architecture if it is empty.

    A whole name, VERSION-ARCHITECTURE, also chooses one for a foreign architecture.

    :raises WherryError: none is installed.
    """
    for image in installed(layout):
        if version == image.name:
            return image
        if image.architecture == architecture and version in ("", image.version):
            return image
    what = f"image {version}" if version else "guest image"
    raise WherryError(
        f"no {what} for {architecture} is installed in {layout.images}",
        hint="make one: wherry image build, or fetch one: wherry image pull",
    )


@contextlib.contextmanager
def exclusively(layout: Layout, *, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Keep other commands from making images meanwhile, and remove what a killed one left.

    :param waiting: called when another command is at it, before waiting for that.
    :raises WherryError: it does not end.
    """
    lock = FileLock(layout.images / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        waiting()
        try:
            lock.acquire(timeout=_LOCK_TIMEOUT_S)
        except Timeout as error:
            raise WherryError(
                "another wherry image command does not end", hint="end it, then repeat"
            ) from error
    try:
        _sweep(layout)
        yield
    finally:
        lock.release()


def _sweep(layout: Layout) -> None:
    for left in layout.images.glob(".build-*"):
        shutil.rmtree(left, ignore_errors=True)
    for old in layout.images.glob(f"{_OLD}*"):
        image = layout.images / old.name.removeprefix(_OLD)
        if image.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(image)  # killed between taking it away and putting the new one there


def install(layout: Layout, staged: Path) -> Image:
    """Verify a finished image and move it into place, over one of the same name.

    The caller is in :func:`exclusively`.

    :param staged: a directory on the same file system; gone afterwards.
    :raises WherryError: the image is not whole.
    """
    image = read(staged)
    verify(image)
    target = layout.images / image.name
    old = layout.images / f"{_OLD}{image.name}"
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    staged.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return read(target)


def remove(layout: Layout, name: str) -> None:
    """Remove an installed image.

    :raises WherryError: no image has that name.
    """
    for image in installed(layout):
        if name in (image.name, image.version):
            shutil.rmtree(image.directory)
            return
    raise WherryError(f"no image is named {name}", hint="see: wherry image list")


def _age(image: Image) -> tuple[list[int], float]:
    """Order by the date in the version, then by when the image came here.

    What follows the date in a version is a hash, which has no order.
    """
    date = image.version.partition("-")[0]
    installed_at = (image.directory / MANIFEST).stat().st_mtime
    return [int(number) for number in re.findall(r"\d+", date)], installed_at
