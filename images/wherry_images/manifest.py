"""manifest.json: what an image is, so that a host can check it and choose how to start it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from wherry.core.files import sha256

SCHEMA = 1
FILES = (
    "kernel",
    "initrd",
    "root",
    "probe",
    "emulation",
    "clients/docker",
    "clients/cli-plugins/docker-buildx",
    "clients/cli-plugins/docker-compose",
)


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and sha256 of one file of the image."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json; `cmdline` is the image's own part of the kernel's."""

    version: str
    architecture: str
    epoch: int
    cmdline: str
    engine_version: str
    files: Mapping[str, FileEntry]
    packages: Mapping[str, str]
    certificates: Sequence[str]
    """SHA-256 of each certificate authority in the guest's own bundle, as of its DER."""

    def to_json(self) -> str:
        """Return the text of manifest.json; equal manifests give equal text."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=2, sort_keys=True) + "\n"


def describe(directory: Path, names: Sequence[str] = FILES) -> dict[str, FileEntry]:
    """Return the entries for the files `names` of an image. Raises OSError."""
    return {
        name: FileEntry(size=(directory / name).stat().st_size, sha256=sha256(directory / name))
        for name in names
    }
