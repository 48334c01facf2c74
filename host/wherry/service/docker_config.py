"""The docker CLI's own ``config.json``: read and written so that nothing else in it changes."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from wherry.core.errors import WherryError
from wherry.core.files import write_atomic


def directory() -> Path:
    """Return $DOCKER_CONFIG, or ``~/.docker``."""
    chosen = os.environ.get("DOCKER_CONFIG")
    return Path(chosen) if chosen else Path.home() / ".docker"


def read() -> dict[str, Any]:
    """Return what is in the file; nothing if there is none.

    :raises WherryError: it is not JSON, or not readable.
    """
    path = directory() / "config.json"
    try:
        config = json.loads(path.read_bytes())
        if not isinstance(config, dict):
            raise ValueError("it is no JSON object")
        return config
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise WherryError(
            f"the docker CLI's {path} cannot be read: {error}", hint="mend or remove the file"
        ) from error


def write(config: dict[str, Any]) -> None:
    """Replace what is in the file.

    :raises WherryError: it is not writable.
    """
    path = directory() / "config.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Resolved: many keep the file in a repository and link to it.
        path = path.resolve()
        mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o600
        write_atomic(path, json.dumps(config, indent="\t").encode() + b"\n", mode=mode)
    except OSError as error:
        raise WherryError(f"{path} cannot be written: {error}") from error
