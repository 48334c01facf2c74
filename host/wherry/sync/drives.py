"""Paths of a Windows host, as clients write them, and what they are in the guest.

``C:\\Users\\ann`` is ``/c/Users/ann`` in the guest, as with Docker Desktop and in MSYS. Clients
write one and the same directory in all of these ways, and requests are rewritten before the
engine, to which a colon separates a source from its target, sees them:

====================== ==========================================================
``C:\\Users\\ann``       the docker CLI, Compose
``C:/Users/ann``       Compose files, IDEs
``/c/Users/ann``       Git Bash, and what ``docker inspect`` shows
``//c/Users/ann``      the same, for MSYS not to rewrite it
====================== ==========================================================

A share (``\\\\server\\share``), a device (``\\\\.\\``), and a path that depends on what is current
(``C:ann``, ``\\ann``) are refused by name. Anything else is a volume's name or the guest's own
path and stays as it is. Pure functions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_DRIVE = re.compile(
    r"(?:(?:\\\\\?\\)?([A-Za-z]):|//?([A-Za-z])(?=/|\Z))(?:[\\/]|\Z)(.*)", re.DOTALL
)
# A volume's name has two characters at least, so one letter before a colon is a drive's.
_RELATIVE = re.compile(r"[A-Za-z]:[^\\/]|\\(?!\\)")
_UNC = re.compile(r"[\\/]{2}")
# SOURCE:TARGET[:OPTIONS], where a target is the guest's: it begins with a slash.
_BIND = re.compile(
    r"(?P<source>[A-Za-z]:[\\/].*?|\\\\.*?|[A-Za-z]:[^\\/:][^:]*|[^:]*):(?P<rest>/.*)", re.DOTALL
)
_ENGINE_SOCKETS = ("//var/run/docker.sock", "//run/docker.sock")
"""No share of the network: with two slashes Git Bash does not rewrite them."""


class PathRefused(ValueError):
    """A path that cannot be mounted; the message says why, by the path."""


def to_guest(path: str) -> str:
    """Return the guest's path of a host's path; any other string as it is.

    :raises PathRefused: it is a path of Windows, and none on a drive.
    """
    match = _DRIVE.fullmatch(path)
    if match is None:
        if path in _ENGINE_SOCKETS:
            return path[1:]
        if _UNC.match(path):
            raise PathRefused(f"{path} is not on a drive of this computer and cannot be mounted")
        if _RELATIVE.match(path):
            raise PathRefused(f"{path} depends on the current drive or directory; give all of it")
        return path
    names: list[str] = []
    for name in re.split(r"[\\/]", match[3]):
        if name == "..":
            del names[-1:]
        elif name not in ("", "."):
            names.append(name)
    return "/".join(["", (match[1] or match[2]).lower(), *names])


def to_host(path: str) -> str:
    """Return the host's path of a guest's path that :func:`to_guest` gave.

    :raises ValueError: it is none.
    """
    match = re.fullmatch(r"/([a-z])(/.*)?", path, re.DOTALL)
    if match is None:
        raise ValueError(f"{path} is not on a drive")
    return f"{match[1].upper()}:\\" + (match[2] or "")[1:].replace("/", "\\")


def host_path(drives: bool) -> Callable[[str], Path]:
    """Return what turns a path of the guest into the host's.

    :param drives: whether the host's paths begin with a drive's letter.
    """
    return (lambda path: Path(to_host(path))) if drives else Path


def of_container(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body of ``POST /containers/create`` with the guest's paths.

    :raises PathRefused: a source cannot be mounted.
    """
    host_config = body.get("HostConfig")
    if not isinstance(host_config, Mapping):
        return dict(body)
    changed = dict(host_config)
    if isinstance(binds := host_config.get("Binds"), list):
        changed["Binds"] = [_bind(bind) for bind in binds]
    if isinstance(mounts := host_config.get("Mounts"), list):
        changed["Mounts"] = [_mount(mount) for mount in mounts]
    return {**body, "HostConfig": changed}


def of_volume(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body of ``POST /volumes/create`` with the guest's path, if it binds one.

    :raises PathRefused: it cannot be mounted.
    """
    if body.get("Driver") not in (None, "", "local"):
        return dict(body)
    return {**body, "DriverOpts": _options(body.get("DriverOpts"))}


def _bind(bind: object) -> object:
    match = _BIND.fullmatch(bind) if isinstance(bind, str) else None
    return f"{to_guest(match['source'])}:{match['rest']}" if match is not None else bind


def _mount(mount: object) -> object:
    if not isinstance(mount, Mapping):
        return mount
    if mount.get("Type") == "bind" and isinstance(mount.get("Source"), str):
        return {**mount, "Source": to_guest(mount["Source"])}
    volume = mount.get("VolumeOptions")
    if mount.get("Type") != "volume" or not isinstance(volume, Mapping):
        return mount
    driver = volume.get("DriverConfig")
    if not isinstance(driver, Mapping):
        return mount
    if driver.get("Name") not in (None, "", "local"):
        return mount
    driver = {**driver, "Options": _options(driver.get("Options"))}
    return {**mount, "VolumeOptions": {**volume, "DriverConfig": driver}}


def _options(options: object) -> object:
    """Return a local volume's options; ``type=none,o=bind`` has a path as its device."""
    if not isinstance(options, Mapping) or not isinstance(options.get("device"), str):
        return options
    if not {"bind", "rbind"} & set(str(options.get("o") or "").split(",")):
        return options
    return {**options, "device": to_guest(options["device"])}
