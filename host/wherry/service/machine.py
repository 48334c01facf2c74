"""Making and removing machines. A machine exists when its directory does.

It is made whole beside its place and then moved there, so that an interruption, a
full disk or a wrong value leaves no half of one.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import replace
from typing import Any

from filelock import FileLock, Timeout

from wherry.config.layout import Layout, MachinePaths
from wherry.config.load import edit, load, parse, read_text, read_values, refusal
from wherry.config.model import (
    GIB,
    SETTINGS,
    SMALLEST_DISK,
    Config,
    Problem,
    build,
    host_problem,
)
from wherry.config.units import format_size
from wherry.core.errors import ConfigError, NoSuchMachine, UsageError, WherryError
from wherry.core.files import write_atomic
from wherry.vm import disk, image
from wherry.vm.qemu import programs

_LOCK_TIMEOUT_S = 240.0
"""Longer than making a machine or an orderly stop takes: a start meanwhile waits for that."""


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

    :raises WherryError: another command holds it for longer than any should, or the
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
        if problem := host_problem(config, layout.platform, disk_total=total):
            raise UsageError(problem.message, hint=problem.hint)
        make_keys(half.keys)
        disk.create(half.data_disk, config.disk_bytes, qemu_img=qemu_img)
        half.new_disk.touch()
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
    """Change settings of a machine that exists, if it can start with them.

    :param check: called last with what they would be; what it raises keeps the file.
    :raises UsageError: a setting is wrong, or more than there is; nothing changed.
    :raises ConfigError: the file had a wrong one before; nothing changed.
    :raises WherryError: the file cannot be written; nothing changed.
    """

    def check_all(text: str) -> None:
        values = parse(text, paths.config)
        if problem := _problem(layout, paths, values, changed=changes):
            if problem.key in changes:
                raise UsageError(problem.message, hint=problem.hint)
            raise refusal(problem, text, paths.config)
        check(build(values, layout.platform))

    with _written(paths):
        edit(paths.config, changes, check=check_all)
    return load(paths.config, layout.platform)


def changed_settings(paths: MachinePaths, text: str) -> set[str]:
    """Return the keys of the settings that a new text for the file changes.

    :raises ConfigError: the new text is wrong.
    """
    values = parse(text, paths.config)
    try:
        old = read_values(paths.config)
    except ConfigError:
        old = {}  # which is what is being mended
    return {key for key in SETTINGS if values.get(key) != old.get(key)}


def rewrite(
    layout: Layout,
    paths: MachinePaths,
    before: str,
    after: str,
    check: Callable[[Config], object] = lambda config: None,
) -> Config:
    """Replace the text of a machine's settings, if it can start with the new one.

    :param before: what the file held when the user began to edit it.
    :param check: as for :func:`reconfigure`.
    :raises ConfigError: the new text is wrong, or the file is another one by now; it is then
        what it was.
    :raises WherryError: the file cannot be written; nothing changed.
    """
    if read_text(paths.config) != before:
        raise ConfigError(
            f"{paths.config} was changed by something else meanwhile",
            hint=f"do it again: wherry config edit {paths.name}",
        )
    changed = changed_settings(paths, after)
    values = parse(after, paths.config)
    if problem := _problem(layout, paths, values, changed=changed):
        raise refusal(problem, after, paths.config)
    config = build(values, layout.platform)
    check(config)
    with _written(paths):
        write_atomic(paths.config, after.encode())
    return config


def _problem(
    layout: Layout, paths: MachinePaths, values: Mapping[str, Any], *, changed: Container[str]
) -> Problem | None:
    """Return why a machine that exists could not start with these settings.

    What is asked of its disk and of the images is asked for changed settings alone, so that
    others can be changed while something of those is amiss.
    """
    config = build(values, layout.platform)
    total = shutil.disk_usage(paths.directory).total
    if problem := host_problem(config, layout.platform, disk_total=total):
        return problem
    architecture = layout.platform.architecture()
    if "disk" in changed:
        qemu_img = programs.find(architecture, layout.platform).img
        present = disk.virtual_size(paths.data_disk, qemu_img=qemu_img)
        if config.disk_bytes < present:
            what = f"disk = {format_size(config.disk_bytes)}"
            return Problem(
                "disk",
                f"{what} is smaller than the data disk, {format_size(present)}",
                "a disk can only grow",
            )
    if "image" in changed and config.image:
        try:
            image.choose(layout, config.image, architecture)
        except WherryError as error:
            return Problem("image", error.message, error.hint)
    return None


@contextlib.contextmanager
def _written(paths: MachinePaths) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WherryError(
            f"{paths.config} cannot be written: {error.strerror}",
            hint="free some space, or make it writable",
        ) from error


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
