"""Guest images of a few bytes, with manifests that are right."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

FILES = {"kernel": b"K" * 100, "initrd": b"I" * 200, "root": b"R" * 5000, "probe": b"P" * 50}


def write_image(
    directory: Path,
    version: str = "1",
    architecture: str = "x86_64",
    files: Mapping[str, bytes] = FILES,
) -> Path:
    """Write an image's files and its manifest; return the directory."""
    for name, contents in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(contents)
    manifest = {
        "schema": 1,
        "version": version,
        "architecture": architecture,
        "engine_version": "28.5.2",
        "cmdline": "quiet",
        "files": {
            name: {"size": len(contents), "sha256": hashlib.sha256(contents).hexdigest()}
            for name, contents in files.items()
        },
        "certificates": [],
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory
