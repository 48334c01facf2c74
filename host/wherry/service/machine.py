"""Making and removing machines. A machine exists when its directory does.

It is made whole beside its place and then moved there, so that an interruption, a
full disk or a wrong value leaves no half of one.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from filelock import FileLock, Timeout

from wherry.config.layout import Layout, MachinePaths
from wherry.config.load import edit, load
from wherry.config.model import GIB, SETTINGS, SMALLEST_DISK, Config, build, check_host
from wherry.core.errors import NoSuchMachine, WherryError
from wherry.vm import disk
from wherry.vm.qemu import programs

_LOCK_TIMEOUT_S = 60.0
"""Longer than making a machine takes, so that two starts at once make one."""


def exists(paths: MachinePaths) -> bool:
    """Whether the machine exists."""
    return paths.directory.is_dir()


def require(layout: Layout, name: str) -> MachinePaths:
    """Return the paths of a machine that exists.

    :raises NoSuchMachine: it does not.
    """
    paths = layout.machine(name)
    if not exists(paths):
        raise NoSuchMachine(f"no machine is named {name}", hint=f"make it: wherry start {name}")
    return paths


@contextlib.contextmanager
def locked(layout: Layout, name: str) -> Iterator[None]:
    """Keep other commands from making or removing this machine meanwhile.

    :raises WherryError: another command holds it for longer than a minute, or the
        directory cannot be written.
    """
    lock = FileLock(layout.machines / f".{name}.lock")
    try:
        lock.acquire(timeout=_LOCK_TIMEOUT_S)
    except Timeout as error:
        raise WherryError(
            f"another wherry command is busy with machine {name}", hint="wait for it, then repeat"
        ) from error
    except OSError as error:
        raise WherryError(
            f"{layout.machines} cannot be written: {error.strerror}",
            hint="set WHERRY_HOME to a directory that you can write to",
        ) from error
    try:
        yield
    finally:
        lock.release()


def create(layout: Layout, name: str, changes: Mapping[str, Any]) -> MachinePaths:
    """Make a machine with these settings; its keys and its empty data disk with it.

    :raises UsageError: a setting is wrong, or more than the host has.
    :raises WherryError: QEMU is missing, or the disk cannot be written.
    """
    # paramiko's neighbour cryptography is slow to import and needed here alone.
    from wherry.tunnel.keys import make_keys

    paths = layout.machine(name)
    architecture = layout.platform.architecture()
    qemu_img = programs.find(architecture, layout.platform).img
    staged = layout.machines / f".{name}.new"
    try:
        # Left by one that was killed; the caller's lock keeps any other away.
        shutil.rmtree(staged, ignore_errors=True)
        half = replace(paths, directory=staged)
        layout.platform.make_private_directory(staged)
        layout.platform.make_private_directory(half.keys)
        total = shutil.disk_usage(staged).total
        edit(half.config, {**_fitting(total, layout), **changes})
        config = load(half.config, layout.platform)
        check_host(config, layout.platform, disk_total=total)
        make_keys(half.keys)
        disk.create(half.data_disk, config.disk_bytes, qemu_img=qemu_img)
        staged.rename(paths.directory)
    except OSError as error:
        raise WherryError(
            f"machine {name} cannot be made in {layout.machines}: {error.strerror}",
            hint="free some space, or set WHERRY_HOME to another disk",
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return paths


def _fitting(total: int, layout: Layout) -> dict[str, Any]:
    """Return a smaller size for the data disk where the default is more than there is."""
    if SETTINGS["disk"].default(layout.platform) <= total or total < SMALLEST_DISK:
        return {}
    return {"disk": f"{total // GIB}GiB"}


def reconfigure(
    layout: Layout,
    paths: MachinePaths,
    changes: Mapping[str, Any],
    check: Callable[[Config], object] = lambda config: None,
) -> Config:
    """Change settings of a machine that exists, checking them against this host first.

    :param check: called last with what they would be; what it raises keeps the file.
    :raises UsageError: a setting is wrong, or more than the host has; nothing changed.
    :raises WherryError: the file cannot be written; nothing changed.
    """
    total = shutil.disk_usage(paths.directory).total

    def check_all(values: Mapping[str, Any]) -> None:
        config = build(values, layout.platform)
        check_host(config, layout.platform, disk_total=total)
        check(config)

    try:
        edit(paths.config, changes, check=check_all)
    except OSError as error:
        raise WherryError(
            f"{paths.config} cannot be written: {error.strerror}",
            hint="free some space, or make it writable",
        ) from error
    return load(paths.config, layout.platform)


def delete(paths: MachinePaths) -> None:
    """Remove a stopped machine and all that is in it.

    :raises WherryError: something of it cannot be removed.
    """
    # Renamed first, so that a removal that breaks off leaves no half of a machine.
    doomed = paths.directory.with_name(f".{paths.name}.deleted")
    try:
        shutil.rmtree(doomed, ignore_errors=True)
        paths.directory.rename(doomed)
        shutil.rmtree(doomed)
        for socket in (paths.docker_socket, paths.control_socket, paths.qmp_socket):
            socket.unlink(missing_ok=True)
    except OSError as error:
        raise WherryError(
            f"{error.filename or doomed} cannot be removed: {error.strerror}"
        ) from error
