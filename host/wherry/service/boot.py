"""Bringing a machine's VM up, or taking over one that runs: the guest's part of a start."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import shutil
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from wherry.config.layout import Layout, MachinePaths
from wherry.config.load import load, load_for
from wherry.config.model import Config
from wherry.core.bridge import in_thread
from wherry.core.errors import StageError, WherryError
from wherry.core.files import write_atomic
from wherry.service import console, engine, space, state
from wherry.service.engine_settings import EngineSettings
from wherry.service.stages import Bounds, Stages
from wherry.service.trust import Trust
from wherry.tunnel.tunnel import Tunnel
from wherry.vm import disk, image
from wherry.vm.driver import MachineSpec, ProcessIdentity
from wherry.vm.qemu import probe, programs
from wherry.vm.qemu.driver import QemuDriver
from wherry.vm.qemu.process import QemuProcess, find

T = TypeVar("T")

log = logging.getLogger(__name__)

BOOT_TRIES = 3
"""QEMU before 8.1 rarely emulates a self-modifying kernel wrongly with several processors
(its commit deba78709a mends that); the kernel then panics, mostly early, before it has written
anything, or when the engine has it load modules. Another try is as good as the first."""

_QUIT_S = 10.0
_ENGINE_RETRY_S = 0.1
_CONSOLE_HINT = "see: wherry logs --source console"
_BUSY_HINT = "the computer may be busy: repeat the command"


class Boot:
    """One bringing-up; its attributes tell how far it came, also when it is cancelled.

    :param trust: what the host trusts, for the guest.
    :param before: what an earlier service noted of a QEMU that it perhaps left running.
    :param launched: called when QEMU runs and before the guest has booted.
    :param engine_settings: gives a guest that boots those of its engine.
    """

    def __init__(
        self,
        layout: Layout,
        paths: MachinePaths,
        bounds: Bounds,
        stages: Stages,
        trust: Trust,
        *,
        before: state.Record,
        launched: Callable[[], None],
        engine_settings: EngineSettings,
    ) -> None:
        self._layout = layout
        self._paths = paths
        self._bounds = bounds
        self._stages = stages
        self._trust = trust
        self._launched = launched
        self._engine_settings = engine_settings
        self.accelerator = before.accelerator
        self.warning = before.warning
        self.image = before.image
        self.config: Config | None = None
        """The settings that the VM runs with."""
        self.driver: QemuDriver | None = None
        self._new_disk = False
        self.adopted = False
        """Whether the VM was there before us: containers may run in it."""

    @property
    def bounds(self) -> Bounds:
        """The bounds for what the guest does: an emulated one gets more time."""
        return self._bounds.for_accelerator(self.accelerator)

    @property
    def must_live(self) -> bool:
        """Whether the VM has to go on whatever fails here: it was there before, and well."""
        return self.adopted and not console.explain(console.read(self._paths.console_log))

    async def run(self) -> QemuDriver:
        """Take over the VM that an earlier service left, or start one.

        :raises WherryError: a stage failed, which the message names.
        """
        orphan = await in_thread(lambda: state.find_orphan(self._paths), name="find QEMU")
        driver = None if orphan is None else await self._adopt(orphan)
        if driver is None:
            driver = await self._launch()
        else:
            await self._await_ssh(driver)
        # The guest has mounted its disk by now.
        self._paths.new_disk.unlink(missing_ok=True)
        return driver

    async def _adopt(self, orphan: ProcessIdentity) -> QemuDriver | None:
        """Take over a QEMU; None if it ended, or its guest had.

        Nothing of it depends on today's settings or images, which may have changed.

        :raises WherryError: it does not answer. It is left alone, as it may yet.
        """
        paths = self._paths
        self.adopted = True
        self.driver = driver = QemuDriver(paths.qemu_log, self._layout.platform)
        try:
            await self._stages.run(
                "adopt",
                lambda: driver.adopt(paths.qmp_socket, orphan, timeout_s=self._bounds.adopt_s),
                timeout_s=self._bounds.adopt_s + 1,
                hint="end it: wherry stop --force, then: wherry start",
            )
        except StageError as error:
            if await in_thread(lambda: find(orphan), name="find QEMU") is not None:
                raise
            log.info("QEMU (process %d): %s", orphan.pid, error)
            self.adopted = False
            return None
        self.config = self._adopted_config()
        if driver.paused:
            await self._make_room(driver)
        self._launched()
        return driver

    def _adopted_config(self) -> Config:
        """Return the settings of a VM that is adopted: its hardware is as it was launched.

        The rest is as the settings say now, unless they cannot be read.
        """
        paths, platform = self._paths, self._layout.platform
        if not paths.launched_config.exists():
            return load(paths.config, platform)
        launched = load(paths.launched_config, platform)
        try:
            now = load(paths.config, platform)
        except WherryError as error:
            log.warning("the settings of the start are kept: %s", error)
            return launched
        return replace(
            now,
            cpus=launched.cpus,
            memory_bytes=launched.memory_bytes,
            disk_bytes=launched.disk_bytes,
            accelerator=launched.accelerator,
            image=launched.image,
        )

    async def _make_room(self, driver: QemuDriver) -> None:
        """Have a guest that waits for space go on, if there is some now."""
        if space.is_scarce(self._paths.directory):
            raise WherryError(driver.paused, hint=space.HINT)
        await driver.resume()

    async def _launch(self) -> QemuDriver:
        layout, paths, stages, bounds = self._layout, self._paths, self._stages, self._bounds
        total = shutil.disk_usage(paths.directory).total
        self.config = config = load_for(paths.config, layout.platform, disk_total=total)
        chosen = image.choose(layout, config.image, layout.platform.architecture())
        self.image = {"version": chosen.version, "sha256": chosen.sha256}
        tools = await in_thread(
            lambda: programs.find(chosen.architecture, layout.platform), name="find QEMU"
        )
        await stages.run(
            "image",
            lambda: in_thread(lambda: image.verify(chosen), name="verify image"),
            timeout_s=bounds.image_s,
            hint=_BUSY_HINT,
        )
        await self._choose_accelerator(config, chosen, tools)
        await stages.run(
            "disk",
            lambda: in_thread(
                lambda: disk.grow(paths.data_disk, config.disk_bytes, qemu_img=tools.img),
                name="check disk",
            ),
            timeout_s=bounds.disk_s,
            hint=_BUSY_HINT,
        )
        self._new_disk = await in_thread(
            lambda: disk.may_format(paths.data_disk, paths.new_disk, qemu_img=tools.img),
            name="new disk",
        )
        self._engine_settings.write(config)
        # No file is one that changes no default.
        settings = paths.config.read_bytes() if paths.config.exists() else b""
        write_atomic(paths.launched_config, settings)
        trusted = await in_thread(lambda: self._trust.firmware(chosen), name="certificates")
        for tries_left in reversed(range(BOOT_TRIES)):
            paths.console_log.unlink(missing_ok=True)  # what it says is believed to be of this boot
            self.driver = driver = QemuDriver(paths.qemu_log, layout.platform, tools.system)
            try:
                await stages.run(
                    "machine",
                    functools.partial(
                        driver.start,
                        self._spec(config, chosen, trusted),
                        timeout_s=bounds.machine_s,
                    ),
                    timeout_s=bounds.machine_s + 5,
                    hint="see: wherry logs",
                )
                self._launched()
                await self._await_ssh(driver)
                break
            except StageError as error:
                if not tries_left or not await self._mend(error, config, chosen, tools):
                    raise
                await driver.stop(timeout_s=_QUIT_S)
        return driver

    async def _choose_accelerator(
        self, config: Config, chosen: image.Image, tools: programs.Programs
    ) -> None:
        layout = self._layout
        self.accelerator, self.warning = config.accelerator, ""
        if config.accelerator == "auto":
            verdict = await self._stages.run(
                "accelerator",
                lambda: probe.choose(tools, chosen, layout.platform, layout.accelerators),
                timeout_s=self._bounds.accelerator_s,
                hint="choose one: wherry start --accel tcg",
            )
            self.accelerator, self.warning = verdict.accelerator, verdict.warning
        if self.warning:
            log.warning("%s", self.warning)

    async def _mend(
        self, error: StageError, config: Config, chosen: image.Image, tools: programs.Programs
    ) -> bool:
        """Return whether another try of a boot that failed is likely to do better."""
        if self.accelerator == "tcg":
            return self.may_boot_again()
        said = console.read(self._paths.console_log)
        if config.accelerator != "auto" or "wherry: init" in said:
            return False
        # What worked once may not work today: another host kernel, another user of it.
        log.warning("%s may have ceased to work: %s", self.accelerator, error)
        failed = self.accelerator
        probe.forget(self._layout.accelerators, failed)
        await self._choose_accelerator(config, chosen, tools)
        return self.accelerator != failed

    def may_boot_again(self) -> bool:
        """Whether a boot of ours failed in a way that the next one is likely not to; logs that."""
        if self.adopted or self.accelerator != "tcg":
            return False
        oops = console.emulation_oops(console.read(self._paths.console_log))
        if oops:
            log.warning("booting again: QEMU's emulation made the kernel fail: %s", oops)
        return bool(oops)

    async def _await_ssh(self, driver: QemuDriver) -> None:
        await self._stages.run(
            "boot",
            lambda: self.unless_exit(
                driver, console.wait_for_line(self._paths.console_log, "wherry: ssh")
            ),
            timeout_s=self.bounds.boot_s,
            hint=_CONSOLE_HINT,
        )

    async def await_engine(self, tunnel: Tunnel) -> str:
        """Ask until the engine answers, and return its version.

        Its socket is there before it listens. The caller sets the bound.

        :raises WherryError: the guest said that it cannot go on, and why.
        """
        timeout_s = self.bounds.engine_s
        while True:
            try:
                return await in_thread(
                    lambda: engine.ping(tunnel.open_unix(engine.SOCKET, timeout_s=timeout_s)),
                    name="engine ping",
                )
            except WherryError as error:
                log.info("the engine is not ready: %s", error)
                failure = console.explain(console.read(self._paths.console_log))
                if failure:
                    raise WherryError(failure, hint=_CONSOLE_HINT) from error
            await asyncio.sleep(_ENGINE_RETRY_S)

    async def unless_exit(self, driver: QemuDriver, work: Awaitable[T]) -> T:
        """Await ``work``; if the VM ends or is paused first, fail with the reason for that.

        :raises WherryError: the VM ended, or waits for space on the host's disk.
        """
        gone = asyncio.create_task(driver.wait(), name="vm exit")
        paused = asyncio.create_task(driver.wait_paused(), name="vm pause")
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({gone, paused, task}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if not gone.done():
                raise WherryError(paused.result(), hint=space.HINT)
            said = console.explain(console.read(self._paths.console_log))
            raise WherryError(said or gone.result().reason, hint=_CONSOLE_HINT)
        finally:
            for each in (gone, paused, task):
                each.cancel()

    def _spec(
        self, config: Config, chosen: image.Image, trusted: Mapping[str, Path]
    ) -> MachineSpec:
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
            new_disk=self._new_disk,
            console_log=paths.console_log,
            qmp_socket=paths.qmp_socket,
            firmware_files={
                "host_key": paths.keys / "host_ed25519",
                "authorized_key": paths.keys / "user_ed25519.pub",
                "machine.json": machine_file,
                "daemon.json": self._engine_settings.file,
                **trusted,
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
