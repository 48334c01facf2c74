"""The docker CLI's context for a machine, written as the CLI itself would.

A context is ``contexts/meta/SHA256(NAME)/meta.json`` below the CLI's configuration
directory (docker/cli, ``cli/context/store``), so no docker CLI is needed to make one.
The user's current context changes only when asked.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from wherry.core.errors import WherryError
from wherry.core.files import write_atomic
from wherry.service import docker_config


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
        return str(docker_config.read().get("currentContext", ""))
    except WherryError:
        return ""


def _directory(name: str) -> Path:
    digest = hashlib.sha256(name.encode()).hexdigest()
    return docker_config.directory() / "contexts" / "meta" / digest


def _set_current(name: str | None) -> None:
    config = docker_config.read()
    if config.get("currentContext", None) == name:
        return
    if name is None:
        config.pop("currentContext", None)
    else:
        config["currentContext"] = name
    docker_config.write(config)
