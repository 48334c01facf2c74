"""A machine's service: the only place where its parts are wired together.

One process per machine, from its start to its stop. It owns QEMU, the tunnel, the
endpoint and the control socket, and closes them in the opposite order. State lives
on the event loop; what blocks runs in threads and posts messages back.

A service that is killed leaves QEMU running, and containers in it. The next one finds it
and adopts it, so that never two run on one disk. When that fails it leaves it as it was:
only the user may decide to pull the plug.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from wherry.api.hooks import Hooks
from wherry.api.server import Endpoint
from wherry.config.layout import Layout, MachinePaths
from wherry.config.model import Config
from wherry.control.server import ControlServer, Emit
from wherry.core.bridge import in_thread, post
from wherry.core.errors import TunnelError, WherryError
from wherry.service import console, engine, shutdown, space, state, status, syncing
from wherry.service.boot import BOOT_TRIES, Boot, end_orphan
from wherry.service.changes import Changes
from wherry.service.default_socket import DefaultSocket
from wherry.service.engine_settings import EngineSettings
from wherry.service.files import Files
from wherry.service.guest import Guest
from wherry.service.networking import Networking
from wherry.service.ssh_agent import SshAgent
from wherry.service.stages import DEFAULT_BOUNDS, Bounds, Stages
from wherry.service.state import State
from wherry.service.trust import Trust
from wherry.tunnel.connection import Connection, Watcher
from wherry.tunnel.keys import MachineKeys, load_keys
from wherry.tunnel.stream import Stream
from wherry.tunnel.tunnel import Tunnel
from wherry.vm.driver import Exit
from wherry.vm.qemu.driver import QemuDriver

log = logging.getLogger(__name__)

_LOG_HINT = "see: wherry logs"

_LINGER_S = 5.0
"""How long a failed start is kept for the command that began it to ask."""

_HEALTH_S = 2.0
"""``wherry status`` does not wait longer for what the guest says of itself."""

_ENGINE_S = 2.0
"""Nor, besides, for what the engine answers the guest; both are less than the command's bound."""

_QUIT_S = 10.0
_DRAIN_S = 2.0


class Service:
    """One machine's service.

    :param bounds: how long each stage may take.
    """

    def __init__(
        self, layout: Layout, paths: MachinePaths, bounds: Bounds = DEFAULT_BOUNDS
    ) -> None:
        self._layout = layout
        self._paths = paths
        self._bounds = bounds
        self._stages = Stages()
        self._engine_settings = EngineSettings(paths)
        self._trust = Trust(layout, paths)
        # What an earlier service knew of a QEMU that this one may adopt.
        before = state.read(paths)
        self._record = replace(
            before, state=State.STARTING, reason="", service=state.ourselves(), started=0.0
        )
        self._assemble()
        self._stop_asked = False
        self._force = False
        self._left: WherryError | None = None
        """Why the VM is left running though this service ends; None when it is not."""
        self._event_listeners: list[Emit] = []

    def _assemble(self) -> None:
        """Make what serves one boot of the guest."""
        layout, paths = self._layout, self._paths
        self._boot = Boot(
            layout,
            paths,
            self._bounds,
            self._stages,
            self._trust,
            before=self._record,
            launched=self._launched,
            engine_settings=self._engine_settings,
        )
        self._ssh_agent = SshAgent(layout, paths)
        self._engine_version = ""
        self._tunnel: Tunnel | None = None
        # Filled before the endpoint listens.
        self._hooks = Hooks()
        self._endpoint: Endpoint | None = None
        self._guest: Guest | None = None
        self._files = Files(layout, paths, self._hooks)
        self._networking = Networking(self._hooks, layout.platform)
        self._space: asyncio.Task[None] | None = None
        self._ssh: tuple[str, int] | None = None

    async def run(self) -> int:
        """Start the machine, serve it until it ends, and return the exit status."""
        loop = asyncio.get_running_loop()
        self._stop_wanted = asyncio.Event()
        self._stopped: asyncio.Future[None] = loop.create_future()
        self._started: asyncio.Future[None] = loop.create_future()
        self._force_wanted = asyncio.Event()
        self._asked = asyncio.Event()
        # A failure that nobody waits for is in the log and the state all the same.
        self._started.add_done_callback(lambda future: future.cancelled() or future.exception())
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                loop.add_signal_handler(number, self._stop_wanted.set)
            except NotImplementedError:
                pass  # Windows: the control socket is the only way
        self._save()
        changes = Changes(
            self._paths.name,
            self._trust,
            self._engine_settings,
            self._running_tunnel,
            lambda: self._boot.image or {},
        )
        control = ControlServer(
            self._layout.platform.listen_local(self._paths.control_socket),
            {
                "hello": self._on_hello,
                "status": self._on_status,
                "wait_running": self._on_wait_running,
                "stop": self._on_stop,
                "wait_stopped": self._on_wait_stopped,
                "events": self._on_events,
                "ports": self._on_ports,
                "engine_settings": changes.on_engine_settings,
                "certificates": changes.on_certificates,
                **syncing.handlers(lambda: self._files.roots),
            },
            loop,
        )
        try:
            return await self._live()
        finally:
            if not self._stopped.done():
                self._stopped.set_result(None)
            await control.drain(_DRAIN_S)
            await in_thread(control.close, name="control close")

    async def _live(self) -> int:
        """Start, wait for the end, clean up; every path ends with nothing left running."""
        start = asyncio.create_task(self._start(), name="start")
        wanted = asyncio.create_task(self._stop_wanted.wait(), name="stop wanted")
        forced = asyncio.create_task(self._force_wanted.wait(), name="force wanted")
        try:
            await asyncio.wait({start, wanted}, return_when=asyncio.FIRST_COMPLETED)
            if self._boot.adopted and self._stop_asked:
                # Containers run in it: it is stopped in order as soon as it is taken over.
                await asyncio.wait({start, forced}, return_when=asyncio.FIRST_COMPLETED)
            interrupted = not start.done()
            if interrupted:
                start.cancel()
                await asyncio.gather(start, return_exceptions=True)
                error: BaseException | None = WherryError("the start was interrupted")
            else:
                error = start.exception()
            if error is None:
                ended = await self._await_end(wanted)
                if ended is not None and not ended.expected:
                    await self._tear_down(force=True)
                    self._transition(State.BROKEN, ended.reason)
                    return 1
            else:
                log.error("%s", error, exc_info=error)
                if self._boot.must_live and not self._force:
                    error = self._left = self._left_alone(error)
                self._fail_start(error)
                if self._left is not None or not interrupted:
                    await self._tear_down(force=True, leave=self._left is not None)
                    self._transition(State.BROKEN, getattr(error, "message", str(error)))
                    await self._linger(wanted)
                    return 1
            await self._tear_down(force=self._force)
            self._transition(State.STOPPED)
            return 0
        finally:
            wanted.cancel()
            forced.cancel()

    def _left_alone(self, error: BaseException) -> WherryError:
        what = getattr(error, "message", str(error))
        return WherryError(
            f"{what}; the virtual machine, which ran before, goes on",
            hint="repeat the command, or end it like pulling the plug: "
            f"wherry stop --force {self._paths.name}",
        )

    async def _linger(self, wanted: asyncio.Task[bool]) -> None:
        """Stay until the command that began this has asked how it went."""
        asked = asyncio.create_task(self._asked.wait(), name="asked")
        await asyncio.wait({asked, wanted}, return_when=asyncio.FIRST_COMPLETED, timeout=_LINGER_S)
        asked.cancel()

    def _fail_start(self, error: BaseException) -> None:
        if isinstance(error, OSError):
            error = WherryError(str(error), hint="see: wherry logs")
        if not isinstance(error, WherryError):
            error = WherryError(f"an internal error: {error!r}", hint="see: wherry logs")
        if not self._started.done():
            self._started.set_exception(error)

    async def _await_end(self, wanted: asyncio.Task[bool]) -> Exit | None:
        """Wait until the VM ends by itself, which is returned, or a stop is asked for."""
        assert self._boot.driver is not None
        gone = asyncio.create_task(self._boot.driver.wait(), name="vm exit")
        try:
            await asyncio.wait({gone, wanted}, return_when=asyncio.FIRST_COMPLETED)
            return gone.result() if gone.done() else None
        finally:
            gone.cancel()

    async def _start(self) -> None:
        keys = load_keys(self._paths.keys)
        for tries_left in reversed(range(BOOT_TRIES)):
            driver = await self._boot.run()
            try:
                await self._connect(driver, keys)
            except WherryError:
                if not tries_left or not self._boot.may_boot_again():
                    raise
            else:
                return
            # Nobody was told that it runs; what it has begun is as after a loss of power.
            await self._tear_down(force=True)
            self._assemble()

    def _launched(self) -> None:
        """Note the QEMU that runs now: whoever finds us killed will look for it."""
        boot = self._boot
        self._record = replace(
            self._record,
            qemu=boot.driver.identity if boot.driver is not None else None,
            image=boot.image,
            accelerator=boot.accelerator,
            warning=boot.warning,
        )
        self._save()

    async def _connect(self, driver: QemuDriver, keys: MachineKeys) -> None:
        """Connect to the guest, open the endpoint, wait for the engine."""
        paths, stages, boot = self._paths, self._stages, self._boot
        bounds = boot.bounds
        self._ssh = address = await driver.ssh_address()

        def connect(watcher: Watcher) -> Connection:
            connection = Connection.connect(
                address,
                user_key=keys.user,
                host_public=keys.host.public,
                timeout_s=bounds.tunnel_s,
                watcher=watcher,
            )
            self._ssh_agent.offer(connection)
            return connection

        tunnel = self._tunnel = Tunnel(connect, changed=self._tunnel_changed())
        tunnel.start()
        await stages.run(
            "tunnel",
            lambda: boot.unless_exit(
                driver, in_thread(lambda: tunnel.wait(bounds.tunnel_s), name="tunnel wait")
            ),
            timeout_s=bounds.tunnel_s + 1,
            hint="see: wherry logs --source console",
        )
        image = boot.image or {}
        await in_thread(lambda: self._trust.catch_up(tunnel, image), name="certificates")
        config = boot.config
        assert config is not None
        guest = self._guest = Guest(tunnel, self._files.changed, self._files.unheard)
        self._files.serve(tunnel, guest, config)
        self._networking.answer_names(guest)
        guest.host_open = config.host_access
        # Its agent starts beside the engine.
        guest.start()
        self._endpoint = Endpoint(
            self._layout.platform.listen_local(paths.docker_socket, paths.docker_context),
            lambda: self._open_engine(tunnel),
            prepare=lambda: tunnel.prepare_unix(engine.SOCKET),
            hooks=self._hooks,
        )
        self._endpoint.start()
        self._engine_version = await stages.run(
            "engine",
            lambda: boot.unless_exit(driver, boot.await_engine(tunnel)),
            timeout_s=bounds.engine_s + 1,
            hint="see: wherry logs --source console",
        )
        self._engine_settings.warning = console.warnings(console.read(paths.console_log))
        self._claim_default_socket(config)
        self._engine_settings.attach(guest)
        await stages.run(
            "names",
            lambda: boot.unless_exit(driver, in_thread(guest.settle, name="names")),
            timeout_s=bounds.names_s,
            hint=_LOG_HINT,
        )
        await stages.run(
            "files",
            lambda: boot.unless_exit(driver, self._files.restore(bounds.files_s)),
            timeout_s=bounds.files_s + 1,
            hint="see: wherry sync status, and: wherry logs",
        )
        await stages.run(
            "ports",
            lambda: boot.unless_exit(
                driver, self._networking.start(driver, tunnel, guest, address)
            ),
            timeout_s=bounds.ports_s,
            hint=_LOG_HINT,
        )
        self._space = asyncio.create_task(
            space.keep_running(driver, paths.directory, self._on_paused), name="space"
        )
        self._record = replace(self._record, started=time.time())
        self._transition(State.RUNNING)
        self._files.start_tidying()
        self._started.set_result(None)

    def _on_paused(self, reason: str) -> None:
        """Tell that the guest stands still, or, with an empty reason, that it goes on."""
        self._record = replace(self._record, reason=reason)
        self._save()
        self._tell({"event": "paused" if reason else "resumed", "reason": reason})

    def _open_engine(self, tunnel: Tunnel) -> Stream:
        self._engine_settings.wait()
        return tunnel.begin_unix(engine.SOCKET)

    def _claim_default_socket(self, config: Config) -> None:
        """Claim it where the settings say so; a machine without it runs all the same."""
        place = DefaultSocket.of(self._layout, self._paths)
        try:
            if config.default_socket:
                place.claim()
            else:
                place.release()
        except WherryError as error:
            log.warning("%s", error)

    def _tunnel_changed(self) -> Any:
        loop = asyncio.get_running_loop()

        def changed(new: Any, error: TunnelError | None) -> None:
            post(loop, self._on_tunnel, str(new.value), error)

        return changed

    def _on_tunnel(self, new: str, error: TunnelError | None) -> None:
        if error is not None:
            log.warning("tunnel %s: %s", new, error)
        self._tell({"event": "tunnel", "state": new, "reason": error.message if error else ""})
        if new == "connected" and self._guest is not None:
            self._guest.reconnected()
            self._files.reconnected()

    async def _tear_down(self, *, force: bool, leave: bool = False) -> None:
        """Close everything, the newest first; the guest is shut down unless ``force``.

        :param leave: leave the VM running; only with ``force``.
        """
        if self._space is not None:
            self._space.cancel()
            await asyncio.gather(self._space, return_exceptions=True)
        if self._record.state is State.RUNNING and not force:
            self._transition(State.STOPPING)
        endpoint, guest, tunnel, driver = (
            self._endpoint,
            self._guest,
            self._tunnel,
            self._boot.driver,
        )
        if endpoint is not None:
            try:
                DefaultSocket.of(self._layout, self._paths).release()
            except WherryError as error:
                # Made by somebody else for us, it stays for the next start.
                log.info("%s", error)
            await in_thread(endpoint.close, name="endpoint close")
        await self._networking.close()
        await self._files.close(None if force else tunnel)
        if guest is not None:
            await in_thread(guest.close, name="agent close")
        if driver is not None and driver.paused and not force:
            log.warning("the guest cannot shut down: %s", driver.paused)
            force = True
        if driver is not None and driver.identity is not None and tunnel is not None and not force:
            self._stages.tell("stop", "begin")
            ended = await shutdown.power_off(driver, tunnel, self._bounds.guest_stop_s)
            if ended and guest is not None:
                await self._files.guest_ended(guest.boot_id)
            self._stages.tell("stop", "end")
        if tunnel is not None:
            await in_thread(tunnel.close, name="tunnel close")
        await self._files.settle()
        await in_thread(self._ssh_agent.close, name="ssh agent close")
        if driver is not None and leave:
            await driver.release()
        elif driver is not None:
            await driver.stop(timeout_s=_QUIT_S)
            orphan = await in_thread(lambda: state.find_orphan(self._paths), name="find QEMU")
            if orphan is not None:  # its adoption was interrupted
                await end_orphan(self._paths, orphan)

    def _transition(self, new: State, reason: str = "") -> None:
        log.info("state %s %s", new, reason)
        record = replace(self._record, state=new, reason=reason)
        if new in (State.STOPPED, State.BROKEN):
            gone = self._left is None and self._boot.driver is not None
            qemu = None if gone else record.qemu
            record = replace(record, service=None, qemu=qemu, started=0.0)
        self._record = record
        self._save()
        self._tell({"event": "state", "state": str(new), "reason": reason})

    def _save(self) -> None:
        try:
            state.write(self._paths, self._record)
        except OSError as error:
            # A full disk is no reason to lose the machine, least of all when it stops.
            log.warning("%s cannot be written: %s", self._paths.state, error)

    def _tell(self, event: Mapping[str, Any]) -> None:
        for emit in list(self._event_listeners):
            emit({"time": round(time.time(), 3), "machine": self._paths.name, **event})

    async def _on_hello(self, params: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
        """Tell that we live, and whether we are about to leave."""
        return {"stopping": self._stop_wanted.is_set()}

    async def _on_status(self, params: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
        guest, driver = self._guest, self._boot.driver
        health: dict[str, Any] = {}
        if guest is not None and driver is not None and not driver.paused:
            health = await in_thread(
                lambda: guest.describe(_HEALTH_S, _ENGINE_S), name="guest health"
            )
        return self._status() | health

    async def _on_ports(self, params: Mapping[str, Any], emit: Emit) -> list[dict[str, Any]]:
        return self._networking.describe()

    def _running_tunnel(self) -> Tunnel | None:
        return self._tunnel if self._record.state is State.RUNNING else None

    async def _on_wait_running(self, params: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
        self._ssh_agent.follow(str(params.get("ssh_auth_sock", "")))
        silence = self._stages.listen(emit)
        self._asked.set()
        try:
            await asyncio.shield(self._started)
        finally:
            silence()
        if self._stop_wanted.is_set() or self._record.state is not State.RUNNING:
            raise WherryError(
                f"machine {self._paths.name} was stopped meanwhile", hint="repeat the command"
            )
        return self._status()

    async def _on_stop(self, params: Mapping[str, Any], emit: Emit) -> None:
        driver = self._boot.driver
        if params.get("force"):
            self._force = True
            self._force_wanted.set()
        elif driver is not None and driver.paused:
            name = self._paths.name
            raise WherryError(
                f"machine {name} cannot be stopped in order: {driver.paused}",
                hint=f"{space.HINT}; or lose what it has not written: wherry stop --force {name}",
            )
        self._stop_asked = True
        self._stop_wanted.set()
        await self._on_wait_stopped(params, emit)
        if self._left is not None:
            raise self._left

    async def _on_wait_stopped(self, params: Mapping[str, Any], emit: Emit) -> None:
        silence = self._stages.listen(emit)
        try:
            await asyncio.shield(self._stopped)
        finally:
            silence()

    async def _on_events(self, params: Mapping[str, Any], emit: Emit) -> None:
        self._event_listeners.append(emit)
        try:
            await asyncio.shield(self._stopped)
        finally:
            self._event_listeners.remove(emit)

    def _status(self) -> dict[str, Any]:
        warnings = (self._record.warning, self._engine_settings.warning)
        live: dict[str, Any] = {
            "warning": "; ".join(filter(None, warnings)),
            "certificate_problems": list(self._trust.problems),
        }
        if self._engine_version:
            live["engine_version"] = self._engine_version
        if self._endpoint is not None:
            live["idle_s"] = round(self._endpoint.idle_s, 1)
        if self._ssh is not None:
            live["ssh"] = {"host": self._ssh[0], "port": self._ssh[1]}
        config = self._boot.config
        return status.describe(self._layout, self._paths, self._record, config, **live)
