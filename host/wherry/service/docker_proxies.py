"""Proxies for containers and builds: the docker CLI sets them in what it starts.

In its ``config.json`` they are below ``proxies``, by the endpoint that they are for
(docker/cli, ``cli/config/configfile``, ``ParseProxyConfig``), so those of other engines and
its ``default`` stay as they are. What we wrote is noted, so that we never take away what
somebody else did.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wherry.config.layout import MachinePaths
from wherry.config.model import Config
from wherry.core.errors import WherryError
from wherry.core.files import write_atomic
from wherry.service import docker_config, proxies


def update(paths: MachinePaths, config: Config, present: Mapping[str, str]) -> None:
    """Write what the settings say now, or take it away.

    :param present: what ``auto`` means, as :func:`proxies.system` has it.
    :raises WherryError: somebody else wrote proxies for this machine, or the file is not
        writable.
    """
    found = proxies.for_guest(config.proxy, present) if config.proxy.containers else {}
    _set(paths, proxies.for_clients(found))


def remove(paths: MachinePaths) -> None:
    """Take away what we wrote.

    :raises WherryError: as :func:`update`.
    """
    _set(paths, {})


def _set(paths: MachinePaths, wanted: dict[str, str]) -> None:
    note = paths.directory / "docker-proxies.json"
    ours = _noted(note)
    if not wanted and ours is None:
        return
    config = docker_config.read()
    table: dict[str, Any] = config.get("proxies") or {}
    endpoint = f"unix://{paths.docker_socket}"
    if table.get(endpoint, ours) not in (ours, wanted):
        raise WherryError(
            f"the docker CLI's proxies for {endpoint} are not those that wherry wrote",
            hint=f"they stay in {docker_config.directory() / 'config.json'}",
        )
    if wanted:
        config["proxies"] = {**table, endpoint: wanted}
    else:
        table.pop(endpoint, None)
        if not table:
            config.pop("proxies", None)
    docker_config.write(config)
    _note(note, wanted)


def _noted(note: Path) -> dict[str, str] | None:
    try:
        found: dict[str, str] = json.loads(note.read_bytes())
        return found
    except (OSError, ValueError):
        return None


def _note(note: Path, wanted: dict[str, str]) -> None:
    try:
        if wanted:
            write_atomic(note, json.dumps(wanted).encode())
        else:
            note.unlink(missing_ok=True)
    except OSError as error:
        raise WherryError(f"{note} cannot be written: {error.strerror}") from error
