"""Every path on disk.

$WHERRY_HOME/
├── images/VERSION-ARCHITECTURE/   the guest images, each with its manifest
├── accelerators.json              which accelerators work here, by trial
└── machines/NAME/                 one machine, mode 0700
    ├── config.toml                settings, the user's to edit
    ├── launched.toml              the settings that the VM was started with
    ├── data.qcow2                 all that is the user's in the guest
    ├── keys/                      the SSH keys of the user and of the guest
    ├── state.json                 what the service last said of itself
    ├── service.lock               held by the service while it lives
    ├── service.log, console.log, qemu.log
    └── docker.sock, control.sock, qmp.sock
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wherry.core.errors import UsageError, WherryError

if TYPE_CHECKING:
    from wherry.platform import Platform

DEFAULT_NAME = "default"

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")
_DEVICE_NAMES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")


def check_name(name: str) -> str:
    """Return a machine's name if it can be one.

    The rule holds on every system, so that a name that works on one works on all:
    no capitals, since some file systems do not tell them apart; no Windows device.

    :raises UsageError: it cannot.
    """
    if not _is_name(name):
        shown = name if len(name) <= 60 else name[:57] + "..."
        raise UsageError(
            f"{shown!r} cannot be a machine's name",
            hint="use 1 to 40 small letters, digits, '-', '_' and single '.'",
        )
    return name


def _is_name(name: str) -> bool:
    usable = _NAME.fullmatch(name) and not _DEVICE_NAMES.fullmatch(name)
    return bool(usable) and ".." not in name and not name.endswith(".")


@dataclass(frozen=True)
class MachinePaths:
    """The files of one machine."""

    name: str
    directory: Path
    socket_directory: Path
    socket_prefix: str = ""

    @property
    def config(self) -> Path:
        return self.directory / "config.toml"

    @property
    def launched_config(self) -> Path:
        return self.directory / "launched.toml"

    @property
    def data_disk(self) -> Path:
        return self.directory / "data.qcow2"

    @property
    def keys(self) -> Path:
        return self.directory / "keys"

    @property
    def new_disk(self) -> Path:
        """There until the guest has made a file system on the data disk."""
        return self.directory / "data.new"

    @property
    def state(self) -> Path:
        return self.directory / "state.json"

    @property
    def service_lock(self) -> Path:
        return self.directory / "service.lock"

    @property
    def service_log(self) -> Path:
        return self.directory / "service.log"

    @property
    def console_log(self) -> Path:
        return self.directory / "console.log"

    @property
    def qemu_log(self) -> Path:
        return self.directory / "qemu.log"

    @property
    def sync_database(self) -> Path:
        return self.directory / "sync.db"

    @property
    def docker_socket(self) -> Path:
        return self._socket("docker.sock")

    @property
    def control_socket(self) -> Path:
        return self._socket("control.sock")

    @property
    def qmp_socket(self) -> Path:
        return self._socket("qmp.sock")

    @property
    def docker_context(self) -> str:
        """The name of the machine's docker context."""
        return "wherry" if self.name == DEFAULT_NAME else f"wherry-{self.name}"

    def _socket(self, name: str) -> Path:
        return self.socket_directory / (self.socket_prefix + name)


@dataclass(frozen=True)
class Layout:
    """The directories of one user."""

    home: Path
    platform: Platform

    @classmethod
    def current(cls, platform: Platform) -> Layout:
        """Return the layout below $WHERRY_HOME, or below the system's data directory.

        Links are followed, so that a machine has the same paths whichever way leads to it.
        """
        chosen = os.environ.get("WHERRY_HOME")
        home = Path(chosen) if chosen else platform.data_directory
        return cls(home.resolve(), platform)

    @property
    def images(self) -> Path:
        return self.home / "images"

    @property
    def machines(self) -> Path:
        return self.home / "machines"

    @property
    def accelerators(self) -> Path:
        return self.home / "accelerators.json"

    def machine(self, name: str) -> MachinePaths:
        """Return the paths of a machine, whether it exists or not.

        :raises UsageError: the name cannot be one.
        :raises WherryError: there is no place for its sockets.
        """
        directory = self.machines / check_name(name)
        limit = self.platform.socket_path_limit
        longest = len(os.fsencode(directory / "control.sock"))
        if limit is None or longest <= limit:
            return MachinePaths(name, directory, directory)
        digest = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
        try:
            short = self.platform.short_directory()
        except OSError as error:
            raise WherryError(
                f"{error.filename} cannot be used for sockets: {error.strerror}",
                hint="remove what is there, or set WHERRY_HOME to a shorter path",
            ) from error
        return MachinePaths(name, directory, short, f"{digest}-")

    def prepare(self) -> None:
        """Make the home directory and what is always in it.

        :raises WherryError: it is not writable.
        """
        try:
            # A home that exists keeps its mode: it may be a directory that others use too.
            if not self.home.is_dir():
                self.platform.make_private_directory(self.home)
            for directory in (self.images, self.machines):
                self.platform.make_private_directory(directory)
        except OSError as error:
            raise WherryError(
                f"{self.home} cannot be used: {error.strerror}",
                hint="set WHERRY_HOME to a directory that you can write to",
            ) from error

    def machine_names(self) -> list[str]:
        """Return the names of the machines that exist, sorted."""
        if not self.machines.is_dir():
            return []
        return sorted(
            entry.name
            for entry in self.machines.iterdir()
            if _is_name(entry.name) and entry.is_dir()
        )
