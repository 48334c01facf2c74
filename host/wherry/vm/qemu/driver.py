"""The driver for QEMU."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wherry.core.errors import WherryError
from wherry.vm.driver import Exit, Features, MachineSpec, ProcessIdentity
from wherry.vm.qemu.arguments import GUEST_SSH_PORT, SSH_HOST, arguments
from wherry.vm.qemu.process import QemuProcess
from wherry.vm.qemu.programs import Programs
from wherry.vm.qemu.qmp import HostForward, Monitor, host_forwards

_QUIT_TIMEOUT_S = 5.0


class QemuDriver:
    """Runs one VM in one QEMU process. See :class:`wherry.vm.driver.Driver`.

    :param log: where QEMU's own messages go.
    """

    features = Features(suspend_to_disk=True, host_forwards=True)

    def __init__(self, programs: Programs, log: Path) -> None:
        self._programs = programs
        self._log = log
        self._process: QemuProcess | None = None
        self._monitor: Monitor | None = None
        self._socket: Path | None = None
        self._stopping = False
        self._guest_shut_down = False
        self._panicked = False
        self._exit: asyncio.Task[Exit] | None = None
        self._quitting: asyncio.Task[None] | None = None

    @property
    def identity(self) -> ProcessIdentity | None:
        """The QEMU process, while it runs."""
        process = self._process
        return process.identity if process is not None and process.alive else None

    async def start(self, spec: MachineSpec, *, timeout_s: float) -> None:
        """Start QEMU and connect to its monitor."""
        spec.qmp_socket.unlink(missing_ok=True)
        self._socket = spec.qmp_socket
        process = QemuProcess.launch([self._programs.system, *arguments(spec)], self._log)
        try:
            await self._control(process, spec, timeout_s)
        except BaseException as error:
            process.kill()
            spec.qmp_socket.unlink(missing_ok=True)
            said = process.last_message()
            if isinstance(error, WherryError):
                what = f"{error.message}: {said}" if said else error.message
                raise WherryError(what, hint=f"see {self._log}") from error
            raise

    async def adopt(
        self, spec: MachineSpec, identity: ProcessIdentity, *, timeout_s: float
    ) -> None:
        """Connect to the monitor of a QEMU that runs already."""
        self._socket = spec.qmp_socket
        await self._control(QemuProcess.adopt(identity, self._log), spec, timeout_s)
        if (await self.monitor.execute("query-status"))["status"] == "shutdown":
            await self.stop(timeout_s=timeout_s)
            raise WherryError("its guest has powered off")

    async def _control(self, process: QemuProcess, spec: MachineSpec, timeout_s: float) -> None:
        monitor = Monitor(spec.name, self._on_event)
        try:
            await monitor.connect(
                spec.qmp_socket, timeout_s=timeout_s, still_alive=lambda: process.alive
            )
        except BaseException:
            await monitor.close()
            raise
        self._process, self._monitor = process, monitor
        self._exit = asyncio.create_task(self._await_exit(process), name="qemu exit")

    async def ssh_address(self) -> tuple[str, int]:
        """Ask the monitor which port QEMU bound."""
        for forward in await self.host_forwards():
            if forward.guest_port == GUEST_SSH_PORT and forward.address == SSH_HOST:
                return SSH_HOST, forward.port
        raise WherryError(f"QEMU forwards nothing to the guest's port {GUEST_SSH_PORT}")

    async def host_forwards(self) -> list[HostForward]:
        """Return all ports of the host that QEMU forwards now, the one for SSH included."""
        return host_forwards(await self.monitor.human("info usernet"))

    @property
    def monitor(self) -> Monitor:
        """The monitor of the running QEMU.

        :raises WherryError: QEMU does not run.
        """
        if self._monitor is None:
            raise WherryError("QEMU does not run")
        return self._monitor

    async def wait(self) -> Exit:
        """Wait for QEMU's end."""
        if self._exit is None:
            raise WherryError("QEMU does not run")
        return await asyncio.shield(self._exit)

    def expect_shutdown(self) -> None:
        """Take the guest's own powering off for intended from now on."""
        self._stopping = True

    async def stop(self, *, timeout_s: float) -> None:
        """Ask QEMU to quit, which flushes its disks, then kill it."""
        process, self._stopping = self._process, True
        if process is None:
            return
        if process.alive:
            await self._quit(timeout_s)
        if self._quitting is not None:
            await self._quitting
        if self._monitor is not None:
            await self._monitor.close()
        if self._exit is not None:
            await self._exit
        if self._socket is not None:
            self._socket.unlink(missing_ok=True)  # a QEMU that was killed left it

    def _on_event(self, name: str, data: Mapping[str, Any]) -> None:
        if name == "SHUTDOWN" and data.get("reason") == "guest-shutdown":
            self._guest_shut_down = True
        elif name == "GUEST_PANICKED" or (
            name == "SHUTDOWN" and data.get("reason") in ("guest-panic", "guest-reset")
        ):
            # -no-reboot turns the reset after a kernel panic into a shutdown.
            self._panicked = True
        if name == "SHUTDOWN" and self._quitting is None:
            # QEMU waits for that (-no-shutdown).
            self._quitting = asyncio.create_task(self._quit(_QUIT_TIMEOUT_S), name="qemu quit")

    async def _quit(self, timeout_s: float) -> None:
        """Ask QEMU to end, then kill it."""
        if self._process is None or self._monitor is None:
            return
        try:
            await self._monitor.execute("quit", timeout_s=min(_QUIT_TIMEOUT_S, timeout_s))
            await asyncio.wait_for(self.wait(), timeout_s)
        except (WherryError, TimeoutError):
            pass  # what did not listen is killed
        if self._process.alive:
            self._process.kill()

    async def _await_exit(self, process: QemuProcess) -> Exit:
        reason = await process.wait()
        if self._panicked and not self._stopping:
            return Exit(False, "the guest's kernel crashed or reset")
        if self._guest_shut_down or self._stopping:
            return Exit(True, "the guest powered off" if self._guest_shut_down else reason)
        return Exit(False, reason)
