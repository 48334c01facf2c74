"""Bringing a machine's VM up, to the point where its sshd listens."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import shutil
from collections.abc import Awaitable, Callable
from typing import TypeVar

from wherry.config.layout import Layout, MachinePaths
from wherry.config.load import load_for
from wherry.config.model import Config
from wherry.core.bridge import in_thread
from wherry.core.errors import StageError, WherryError
from wherry.service import console, state
from wherry.service.engine_settings import EngineSettings
from wherry.service.stages import Bounds, Stages
from wherry.vm import disk, image
from wherry.vm.driver import MachineSpec, ProcessIdentity
from wherry.vm.qemu import probe, programs
from wherry.vm.qemu.driver import QemuDriver
from wherry.vm.qemu.process import QemuProcess

T = TypeVar("T")

log = logging.getLogger(__name__)

_BOOT_TRIES = 3
"""QEMU before 8.1 rarely emulates a self-modifying kernel wrongly with several processors
(its commit deba78709a mends that); the kernel then panics early, before it has written
anything, and another try is as good as the first."""

_QUIT_S = 10.0
_CONSOLE_HINT = "see: wherry logs --source console"


class Boot:
    """One bringing-up; its attributes tell how far it came, also when it is cancelled.

    :param accelerator: what an earlier service used, for a QEMU that it left running.
    :param warning: what that service warned of.
    :param launched: called when QEMU runs and before the guest has booted.
    :param engine_settings: gives a guest that boots those of its engine.
    """

    def __init__(
        self,
        layout: Layout,
        paths: MachinePaths,
        bounds: Bounds,
        stages: Stages,
        *,
        accelerator: str,
        warning: str,
        launched: Callable[[], None],
        engine_settings: EngineSettings,
    ) -> None:
        self._layout = layout
        self._paths = paths
        self._bounds = bounds
        self._stages = stages
        self._launched = launched
        self._engine_settings = engine_settings
        self.accelerator = accelerator
        self.warning = warning
        self.image: image.Image | None = None
        self.driver: QemuDriver | None = None

    @property
    def bounds(self) -> Bounds:
        """The bounds for what the guest does: an emulated one gets more time."""
        return self._bounds.for_accelerator(self.accelerator)

    async def run(self) -> QemuDriver:
        """Take over the VM that an earlier service left, or start one.

        :raises WherryError: a stage failed, which the message names.
        """
        layout, paths = self._layout, self._paths
        total = shutil.disk_usage(paths.directory).total
        config = load_for(paths.config, layout.platform, disk_total=total)
        chosen = image.choose(layout, config.image, layout.platform.architecture())
        self.image = chosen
        tools = programs.find(chosen.architecture, layout.platform)
        orphan = state.find_orphan(paths)
        if orphan is not None:
            adopted = await self._adopt(orphan, config, chosen, tools)
            if adopted is not None:
                await self._await_ssh(adopted)
                return adopted
        return await self._launch(config, chosen, tools)

    async def _adopt(
        self,
        orphan: ProcessIdentity,
        config: Config,
        chosen: image.Image,
        tools: programs.Programs,
    ) -> QemuDriver | None:
        """Take over a QEMU; one that does not answer is ended, so that a new one can be started."""
        self.driver = driver = QemuDriver(tools, self._paths.qemu_log)
        spec = self._spec(config, chosen)
        try:
            await self._stages.run(
                "adopt",
                lambda: driver.adopt(spec, orphan, timeout_s=self._bounds.adopt_s),
                timeout_s=self._bounds.adopt_s + 1,
            )
        except StageError as error:
            log.warning("QEMU (process %d) is ended: %s", orphan.pid, error)
            await end_orphan(self._paths, orphan)
            return None
        self._launched()
        return driver

    async def _launch(
        self, config: Config, chosen: image.Image, tools: programs.Programs
    ) -> QemuDriver:
        layout, paths, stages, bounds = self._layout, self._paths, self._stages, self._bounds
        await stages.run(
            "image",
            lambda: in_thread(lambda: image.verify(chosen), name="verify image"),
            timeout_s=bounds.image_s,
        )
        self.accelerator, self.warning = config.accelerator, ""
        if config.accelerator == "auto":
            verdict = await stages.run(
                "accelerator",
                lambda: probe.choose(tools, chosen, layout.platform, layout.accelerators),
                timeout_s=bounds.accelerator_s,
            )
            self.accelerator, self.warning = verdict.accelerator, verdict.warning
        if self.warning:
            log.warning("%s", self.warning)
        await stages.run(
            "disk",
            lambda: in_thread(
                lambda: disk.grow(paths.data_disk, config.disk_bytes, qemu_img=tools.img),
                name="check disk",
            ),
            timeout_s=bounds.disk_s,
        )
        self._engine_settings.write(config)
        spec = self._spec(config, chosen)
        for tries_left in reversed(range(_BOOT_TRIES)):
            self.driver = driver = QemuDriver(tools, paths.qemu_log)
            await stages.run(
                "machine",
                functools.partial(driver.start, spec, timeout_s=bounds.machine_s),
                timeout_s=bounds.machine_s + 5,
            )
            self._launched()
            try:
                await self._await_ssh(driver)
                break
            except StageError:
                oops = console.emulation_oops(console.read(paths.console_log))
                if self.accelerator != "tcg" or not oops or not tries_left:
                    raise
                log.warning("booting again: QEMU's emulation made the kernel fail: %s", oops)
                await driver.stop(timeout_s=_QUIT_S)
        return driver

    async def _await_ssh(self, driver: QemuDriver) -> None:
        await self._stages.run(
            "boot",
            lambda: self.unless_exit(
                driver, console.wait_for_line(self._paths.console_log, "wherry: ssh")
            ),
            timeout_s=self.bounds.boot_s,
            hint=_CONSOLE_HINT,
        )

    async def unless_exit(self, driver: QemuDriver, work: Awaitable[T]) -> T:
        """Await ``work``; if the VM ends first, fail with the reason for that.

        :raises WherryError: the VM ended.
        """
        gone = asyncio.create_task(driver.wait(), name="vm exit")
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({gone, task}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            said = console.explain(console.read(self._paths.console_log))
            raise WherryError(said or gone.result().reason, hint=_CONSOLE_HINT)
        finally:
            gone.cancel()
            task.cancel()

    def _spec(self, config: Config, chosen: image.Image) -> MachineSpec:
        paths = self._paths
        machine_file = paths.directory / "machine.json"
        machine_file.write_text(
            json.dumps({"hostname": paths.docker_context, "memory_bytes": config.memory_bytes})
        )
        return MachineSpec(
            name=paths.name,
            image=chosen,
            cpus=config.cpus,
            memory_bytes=config.memory_bytes,
            accelerator=self.accelerator or "tcg",
            data_disk=paths.data_disk,
            console_log=paths.console_log,
            qmp_socket=paths.qmp_socket,
            firmware_files={
                "host_key": paths.keys / "host_ed25519",
                "authorized_key": paths.keys / "user_ed25519.pub",
                "machine.json": machine_file,
                "daemon.json": self._engine_settings.file,
            },
        )


async def end_orphan(paths: MachinePaths, orphan: ProcessIdentity) -> None:
    """End a QEMU that no service controls.

    :raises WherryError: the system cannot end it.
    """
    try:
        process = QemuProcess.adopt(orphan, paths.qemu_log)
    except WherryError:
        return  # it ended by itself
    await in_thread(process.kill, name="end the orphan")
