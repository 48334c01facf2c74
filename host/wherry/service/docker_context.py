"""The docker CLI's context for a machine, written as the CLI itself would.

A context is ``contexts/meta/SHA256(NAME)/meta.json`` below the CLI's configuration
directory (docker/cli, ``cli/context/store``), so no docker CLI is needed to make one.
The user's current context changes only when asked.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

from wherry.core.errors import WherryError
from wherry.core.files import write_atomic


def config_directory() -> Path:
    """Return $DOCKER_CONFIG, or ``~/.docker``."""
    chosen = os.environ.get("DOCKER_CONFIG")
    return Path(chosen) if chosen else Path.home() / ".docker"


def create(name: str, docker_host: str, machine: str) -> None:
    """Make the context, or make it point to ``docker_host``.

    :raises WherryError: the CLI's directory is not writable.
    """
    meta = {
        "Name": name,
        "Metadata": {"Description": f"wherry machine {machine}"},
        "Endpoints": {"docker": {"Host": docker_host, "SkipTLSVerify": False}},
    }
    path = _directory(name) / "meta.json"
    data = json.dumps(meta, separators=(",", ":")).encode()
    try:
        if not path.exists() or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, data, mode=0o644)
    except OSError as error:
        raise WherryError(
            f"the docker context {name} cannot be written: {error}",
            hint="set DOCKER_CONFIG to a directory that you can write to",
        ) from error


def use(name: str) -> None:
    """Make ``name`` the CLI's current context, keeping all else in its ``config.json``.

    :raises WherryError: the file is not JSON, or not writable.
    """
    _set_current(name)


def remove(name: str) -> None:
    """Remove the context; if it is the current one, the CLI falls back to its default."""
    shutil.rmtree(_directory(name), ignore_errors=True)
    if current() == name:
        _set_current(None)


def current() -> str:
    """Return the CLI's current context as its configuration names it; empty for the default."""
    try:
        return str(_read_config().get("currentContext", ""))
    except WherryError:
        return ""


def _directory(name: str) -> Path:
    digest = hashlib.sha256(name.encode()).hexdigest()
    return config_directory() / "contexts" / "meta" / digest


def _read_config() -> dict[str, Any]:
    path = config_directory() / "config.json"
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


def _set_current(name: str | None) -> None:
    config = _read_config()
    if config.get("currentContext", None) == name:
        return
    if name is None:
        config.pop("currentContext", None)
    else:
        config["currentContext"] = name
    path = config_directory() / "config.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Resolved: many keep the file in a repository and link to it.
        path = path.resolve()
        mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o600
        write_atomic(path, json.dumps(config, indent="\t").encode() + b"\n", mode=mode)
    except OSError as error:
        raise WherryError(f"{path} cannot be written: {error}") from error
