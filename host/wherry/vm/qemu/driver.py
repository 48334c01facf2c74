"""The driver for QEMU."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wherry.core.bridge import in_thread
from wherry.core.errors import WherryError
from wherry.core.processes import Argument
from wherry.platform import Platform
from wherry.vm.driver import Exit, Features, MachineSpec, ProcessIdentity
from wherry.vm.qemu.arguments import GUEST_SSH_PORT, SSH_HOST, arguments
from wherry.vm.qemu.process import QemuProcess
from wherry.vm.qemu.qmp import HostForward, Monitor, host_forwards

_QUIT_TIMEOUT_S = 5.0
_NO_SPACE = "this computer's disk is full, so the guest is paused"


class QemuDriver:
    """Runs one VM in one QEMU process. See :class:`wherry.vm.driver.Driver`.

    :param log: where QEMU's own messages go.
    :param platform: makes the connection to QEMU's monitor.
    :param system: the program; not needed to adopt one that runs.
    """

    features = Features(suspend_to_disk=True, host_forwards=True)

    def __init__(self, log: Path, platform: Platform, system: Path | None = None) -> None:
        self._log = log
        self._platform = platform
        self._system = system
        self._process: QemuProcess | None = None
        self._monitor: Monitor | None = None
        self._socket: Path | None = None
        self._stopping = False
        self._guest_shut_down = False
        self._panicked = False
        self._paused = ""
        self._pausing = asyncio.Event()
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
        assert self._system is not None
        process = await self._launch([self._system, *arguments(spec)])
        try:
            await self._control(process, spec.qmp_socket, timeout_s)
        except BaseException as error:
            await in_thread(process.kill, name="qemu kill")
            spec.qmp_socket.unlink(missing_ok=True)
            said = process.last_message()
            if isinstance(error, WherryError):
                what = f"{error.message}: {said}" if said else error.message
                raise WherryError(what, hint=f"see {self._log}") from error
            raise

    async def _launch(self, argv: Sequence[Argument]) -> QemuProcess:
        """Execute QEMU, which from a slow disk takes seconds; never leave one behind."""
        launch = asyncio.ensure_future(
            in_thread(lambda: QemuProcess.launch(argv, self._log), name="qemu launch")
        )
        try:
            return await asyncio.shield(launch)
        except asyncio.CancelledError:
            await asyncio.gather(launch, return_exceptions=True)
            if launch.exception() is None:
                await in_thread(launch.result().kill, name="qemu kill")
            raise

    async def adopt(self, qmp_socket: Path, identity: ProcessIdentity, *, timeout_s: float) -> None:
        """Connect to the monitor of a QEMU that runs already."""
        self._socket = qmp_socket
        process = await in_thread(lambda: QemuProcess.adopt(identity, self._log), name="adopt")
        await self._control(process, qmp_socket, timeout_s)
        status = (await self.monitor.execute("query-status", timeout_s=timeout_s))["status"]
        if status == "shutdown":
            await self.stop(timeout_s=timeout_s)
            raise WherryError("its guest has powered off")
        if status == "io-error":
            self._set_paused(_NO_SPACE)

    async def release(self) -> None:
        """Leave the monitor, and QEMU running."""
        if self._exit is not None:
            self._exit.cancel()
            await asyncio.gather(self._exit, return_exceptions=True)
        if self._monitor is not None:
            await self._monitor.close()

    @property
    def paused(self) -> str:
        """Why the guest does not execute; empty when it does."""
        return self._paused

    async def wait_paused(self) -> str:
        """Wait until the guest stops executing, and return why."""
        await self._pausing.wait()
        return self._paused

    async def resume(self) -> None:
        """Have QEMU try again what failed, and the guest go on."""
        reason = self._paused
        self._set_paused("")  # before: if it fails again, there is another event
        try:
            await self.monitor.execute("cont")
        except WherryError:
            self._set_paused(reason)
            raise

    def _set_paused(self, reason: str) -> None:
        self._paused = reason
        if reason:
            self._pausing.set()
        else:
            self._pausing.clear()

    async def _control(self, process: QemuProcess, socket: Path, timeout_s: float) -> None:
        monitor = Monitor("wherry", self._on_event)
        try:
            await monitor.connect(
                lambda: self._platform.connect_unix(socket),
                timeout_s=timeout_s,
                still_alive=lambda: process.alive,
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
        elif name == "BLOCK_IO_ERROR" and data.get("action") == "stop":
            # A disk's default werror is "enospc": the guest waits, and learns of nothing.
            self._set_paused(_NO_SPACE if data.get("nospace") else str(data.get("reason")))
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
            await in_thread(self._process.kill, name="qemu kill")

    async def _await_exit(self, process: QemuProcess) -> Exit:
        reason = await process.wait()
        if self._panicked and not self._stopping:
            return Exit(False, "the guest's kernel crashed or reset")
        if self._guest_shut_down:
            return Exit(True, "the guest powered off", powered_off=not self._panicked)
        if self._stopping:
            return Exit(True, reason)
        return Exit(False, reason)
