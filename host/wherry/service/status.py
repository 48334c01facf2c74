"""What ``wherry status`` tells, of a machine that runs and of one that does not."""

from __future__ import annotations

from typing import Any

from wherry.config.layout import Layout, MachinePaths
from wherry.config.load import load
from wherry.config.model import Config
from wherry.core.errors import WherryError
from wherry.service import default_socket, state
from wherry.service.state import Record
from wherry.vm import image


def describe(
    layout: Layout,
    paths: MachinePaths,
    record: Record | None = None,
    config: Config | None = None,
    **live: Any,
) -> dict[str, Any]:
    """Return the fields of ``wherry status --json``.

    :param record: what the service knows; None to read it from disk.
    :param config: the settings that the VM runs with; None to read those from disk, or the
        ones of its next start.
    :param live: fields that only a running service has.
    """
    if record is None:
        record = state.read(paths)
    fields: dict[str, Any] = {
        "name": paths.name,
        "state": str(record.state),
        "reason": record.reason,
        "docker_host": layout.platform.docker_host(paths.docker_socket, paths.docker_context),
        "docker_context": paths.docker_context,
        "accelerator": record.accelerator,
        "cpus": None,
        "memory_bytes": None,
        "disk_bytes": None,
        "image": None,
        "engine_version": None,
        "engine_health": None,
        "engine_problem": "",
        "service_pid": record.service.pid if record.service else None,
        "qemu_pid": record.qemu.pid if record.qemu else None,
        "uptime_s": round(state.uptime(record), 1),
        "idle_s": None,
        "guest": None,
        "default_socket": None,
        "directory": str(paths.directory),
    }
    started = record.qemu is not None
    if started and record.image is not None:
        fields["image"] = dict(record.image)
    try:
        if config is None:
            as_launched = started and paths.launched_config.exists()
            config = load(paths.launched_config if as_launched else paths.config, layout.platform)
        fields |= {
            "cpus": config.cpus,
            "memory_bytes": config.memory_bytes,
            "disk_bytes": config.disk_bytes,
            "default_socket": default_socket.describe(layout, paths, config),
        }
        if fields["image"] is None:
            chosen = image.choose(layout, config.image, layout.platform.architecture())
            fields |= {
                "image": {"version": chosen.version, "sha256": chosen.sha256},
                "engine_version": chosen.engine_version,
            }
    except WherryError as error:
        fields["reason"] = fields["reason"] or error.message
    return fields | live
