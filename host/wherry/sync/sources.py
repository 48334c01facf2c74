"""What in a request names a directory or file of the host. Pure functions on the bodies' JSON.

The Engine API names sources of bind mounts in four places: ``HostConfig.Binds`` and
``HostConfig.Mounts`` of ``/containers/create``, the driver's options of a volume that such a
mount makes, and those of ``/volumes/create``, where ``type=none,o=bind,device=PATH`` is how
Compose binds a directory as a named volume (mount(8)). What ``HostConfig.VolumesFrom`` adds only
the engine knows, which tells it when it is asked about the container.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any


@dataclass(frozen=True, slots=True)
class Source:
    """One path of the host that a container mounts.

    :ivar create: whether a directory is made if nothing is there, as ``-v`` does.
    """

    path: str
    read_only: bool = False
    create: bool = False


def of_container(body: Mapping[str, Any]) -> list[Source]:
    """Return the sources in the body of ``POST /containers/create``."""
    host_config = _mapping(_as_go_reads(body).get("HostConfig"))
    found = [*_binds(host_config.get("Binds")), *_mounts(host_config.get("Mounts"))]
    return _unique(found)


def volumes_of(body: Mapping[str, Any]) -> list[str]:
    """Return the names of the volumes in the body of ``POST /containers/create``."""
    host_config = _mapping(_as_go_reads(body).get("HostConfig"))
    binds = [str(bind).partition(":")[0] for bind in _list(host_config.get("Binds"))]
    names = [name for name in binds if name and not name.startswith("/")]
    for mount in map(_mapping, _list(host_config.get("Mounts"))):
        if mount.get("Type") == "volume" and mount.get("Source"):
            names.append(str(mount["Source"]))
    return names


def inherits(body: Mapping[str, Any]) -> bool:
    """Whether a container mounts what others do, by the body of ``POST /containers/create``."""
    return bool(_mapping(_as_go_reads(body).get("HostConfig")).get("VolumesFrom"))


def of_volume(body: Mapping[str, Any]) -> list[Source]:
    """Return the sources in the body of ``POST /volumes/create``."""
    body = _as_go_reads(body)
    if body.get("Driver") not in (None, "", "local"):
        return []
    return _device(_mapping(body.get("DriverOpts")))


def of_inspected(container: Mapping[str, Any]) -> list[Source]:
    """Return the sources of a container as ``/containers/json`` and its inspection list them."""
    return _unique(
        Source(str(mount["Source"]), read_only=mount.get("RW") is False)
        for mount in _list(container.get("Mounts"))
        if isinstance(mount, Mapping) and mount.get("Type") == "bind" and mount.get("Source")
    )


def _binds(binds: object) -> Iterable[Source]:
    for bind in _list(binds):
        # SOURCE:TARGET[:OPTIONS]; a name is a volume's and no path.
        parts = str(bind).split(":")
        if len(parts) >= 2 and parts[0].startswith("/"):
            options = parts[2].split(",") if len(parts) > 2 else []
            yield Source(_clean(parts[0]), read_only="ro" in options, create=True)


def _mounts(mounts: object) -> Iterable[Source]:
    for mount in map(_mapping, _list(mounts)):
        source = str(mount.get("Source") or "")
        read_only = bool(mount.get("ReadOnly"))
        if mount.get("Type") == "bind" and source.startswith("/"):
            options = _mapping(mount.get("BindOptions"))
            yield Source(_clean(source), read_only, create=bool(options.get("CreateMountpoint")))
        elif mount.get("Type") == "volume":
            driver = _mapping(_mapping(mount.get("VolumeOptions")).get("DriverConfig"))
            if driver.get("Name") in (None, "", "local"):
                yield from _device(_mapping(driver.get("Options")))


def _device(options: Mapping[str, Any]) -> list[Source]:
    device = str(options.get("device") or "")
    how = str(options.get("o") or "").split(",")
    if device.startswith("/") and {"bind", "rbind"} & set(how):
        return [Source(_clean(device), read_only="ro" in how)]
    return []


def _unique(found: Iterable[Source]) -> list[Source]:
    """Return one source for each path: writable if any of them is."""
    by_path: dict[str, Source] = {}
    for source in found:
        known = by_path.get(source.path, source)
        by_path[source.path] = Source(
            source.path, known.read_only and source.read_only, known.create or source.create
        )
    return list(by_path.values())


def _clean(path: str) -> str:
    """Return a path without ``.``, ``..`` and doubled slashes, as the engine cleans it."""
    names: list[str] = []
    for name in PurePosixPath(path).parts[1:]:
        if name == "..":
            del names[-1:]
        else:
            names.append(name)
    return "/" + "/".join(names)


_FIELDS = {
    name.lower(): name
    for name in (
        *(
            "HostConfig",
            "Binds",
            "Mounts",
            "VolumesFrom",
            "Type",
            "Source",
            "ReadOnly",
            "BindOptions",
        ),
        *("CreateMountpoint", "VolumeOptions", "DriverConfig", "Name", "Options"),
        *("Driver", "DriverOpts"),
    )
}


def _as_go_reads(value: Any) -> Any:
    """Return JSON with the names of its fields as the engine finds them: in any case.

    ("preferring exact matches but also accepting case-insensitive matches", Go's
    ``encoding/json``.) What else is called so, as a label, is none of ours.
    """
    if isinstance(value, Mapping):
        return {_FIELDS.get(key.lower(), key): _as_go_reads(found) for key, found in value.items()}
    if isinstance(value, list):
        return [_as_go_reads(each) for each in value]
    return value


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
