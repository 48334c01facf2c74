"""What the service needs from whatever runs the VM.

One implementation exists, :class:`wherry.vm.qemu.driver.QemuDriver`. What a driver
cannot do it says in its ``features``; callers ask those and not which driver it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from wherry.vm.image import Image


@dataclass(frozen=True)
class Features:
    """What a driver can do beyond running a VM."""

    suspend_to_disk: bool = False
    host_forwards: bool = False
    """Ports on the host may be added and removed while the VM runs."""


@dataclass(frozen=True)
class MachineSpec:
    """One VM to run. Paths are absolute."""

    name: str
    image: Image
    cpus: int
    memory_bytes: int
    accelerator: str
    """One accelerator, already chosen: never ``auto``."""
    data_disk: Path
    console_log: Path
    qmp_socket: Path
    firmware_files: Mapping[str, Path] = field(default_factory=dict)
    """Files the guest reads through fw_cfg, by their name below ``opt/wherry/``."""
    new_disk: bool = False
    """Whether the guest may make a file system on the data disk."""


@dataclass(frozen=True)
class ProcessIdentity:
    """A process that cannot be taken for a later one with the same number."""

    pid: int
    started: float
    """Its start, as :meth:`wherry.platform.Platform.process_start` has it."""
    boot: str
    """The boot of the host that this is true in."""


@dataclass(frozen=True)
class Exit:
    """How the VM ended."""

    expected: bool
    """Whether we, or the guest by powering off, wanted it to."""
    reason: str
    powered_off: bool = False
    """Whether the guest powered off: what it has written is on its disks then."""


class Driver(Protocol):
    """Runs one VM. All methods are called on the event loop.

    ``start`` and ``adopt`` are called once, and not both. ``stop`` and ``kill`` may
    be called at any time and again, also while ``start`` is under way.
    """

    @property
    def features(self) -> Features:
        """What this driver can do."""

    @property
    def identity(self) -> ProcessIdentity | None:
        """The process that is the VM, while there is one."""

    async def start(self, spec: MachineSpec, *, timeout_s: float) -> None:
        """Start the VM; returns when it executes and can be controlled.

        :raises WherryError: it did not start; no process is left behind.
        """

    async def adopt(self, qmp_socket: Path, identity: ProcessIdentity, *, timeout_s: float) -> None:
        """Take control of a VM that an earlier service left running.

        :raises WherryError: it is not there, or does not answer.
        """

    def expect_shutdown(self) -> None:
        """Take the guest's own powering off for intended from now on."""

    async def release(self) -> None:
        """Give up control of the VM, which goes on running."""

    @property
    def paused(self) -> str:
        """Why the VM does not execute at the moment; empty when it does."""

    async def wait_paused(self) -> str:
        """Wait until it stops executing, and return why."""

    async def resume(self) -> None:
        """Have it execute again, and do what it failed to do once more.

        :raises WherryError: the VM does not answer.
        """

    async def ssh_address(self) -> tuple[str, int]:
        """Return the host and port at which the guest's sshd can be reached.

        :raises WherryError: the VM does not answer.
        """

    async def wait(self) -> Exit:
        """Wait until the VM has ended, however that came about."""

    async def stop(self, *, timeout_s: float) -> None:
        """End the VM by its monitor, by force after ``timeout_s``; data not yet on the
        guest's disk is lost, so the guest is asked to shut down before."""
