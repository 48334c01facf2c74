"""The machine's network: names of the host, and published ports.

Ports follow the engine's truth in rounds, and hooks on starts hold what has to wait.

A *round* lists the running containers and makes their forwards exist. The engine's
events, answers that were held, and a clock ask for one; requests that come while one
runs share the next.

A start is held twice. Before it goes on, the ports that are known by then are bound: a
port that something else has fails the start as the engine would, and nobody can take one
in between. From those that the engine chooses itself, what is in use here is taken away.
Before the client gets the answer, a round has made the rest, so that the client finds
what it asked for.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Coroutine, Iterable
from functools import partial
from typing import Any, TypeVar

from wherry.api.hooks import Hooks, Refusal, Request, Watch
from wherry.api.http import ResponseHead
from wherry.core.bridge import in_thread, post
from wherry.core.errors import WherryError
from wherry.names.forwarder import NameServer
from wherry.names.system import SystemNames
from wherry.platform.base import Platform
from wherry.ports import desired
from wherry.ports.choices import Choices
from wherry.ports.desired import Forward
from wherry.ports.keeper import PortKeeper, PortTaken
from wherry.ports.qemu import QemuForwards
from wherry.ports.reconcile import Route
from wherry.service import engine
from wherry.service.guest import Guest
from wherry.tunnel.tunnel import Tunnel
from wherry.vm.qemu.arguments import NETWORK_DEVICE
from wherry.vm.qemu.driver import QemuDriver

log = logging.getLogger(__name__)

_HOLD_S = 30.0
"""How long a request or its answer may be held; then it goes on, and events have to do."""

_AGAIN_S = 1.0
"""How much later than its event a change is in the engine's list of containers, at most."""

_VERIFY_S = 10.0
_LISTENERS_S = 1.0
_GUEST_S = 10.0
_NETWORK_CARD = "10.0.2.15"

_TAKE_ADDRESS = """
ip rule show pref 10 | grep -q . || { ip rule add pref 10 lookup local && ip rule del pref 0; }
ip route replace local ADDRESS dev lo
ip rule show pref 8 | grep -qw ADDRESS || ip rule add pref 8 iif eth0 to ADDRESS lookup local
ip rule show pref 9 | grep -qw ADDRESS || ip rule add pref 9 to ADDRESS lookup main
"""
"""Makes an address of the host the guest's own for what comes from the host alone: from
containers it still leads to the host (ip-rule(8); the local table is asked first unless
its rule is moved)."""

_TAKE_ADDRESS_6 = "ip -6 route replace local ADDRESS dev lo"

T = TypeVar("T")


class Networking:
    """Owns the machine's ports from the engine's first answer to the end.

    :param hooks: gets the hooks on starts and ends; they wait for :meth:`start`.
    """

    def __init__(self, hooks: Hooks, platform: Platform) -> None:
        self._platform = platform
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = threading.Event()
        self._keeper: PortKeeper | None = None
        self._choices: Choices | None = None
        self._tunnel: Tunnel | None = None
        self._driver: QemuDriver | None = None
        self._guest: Guest | None = None
        self._watch: engine.ContainerWatch | None = None
        self._rounds: asyncio.Task[None] | None = None
        self._asked = asyncio.Event()
        self._again: asyncio.TimerHandle | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self._names: NameServer | None = None
        self._host_network: dict[str, str] = {}
        self._verified = 0.0
        hooks.on("POST", "/containers/{id}/start", self._on_start)
        hooks.on("POST", "/containers/{id}/restart", self._on_start)
        hooks.on("POST", "/containers/{id}/stop", self._on_end)
        hooks.on("POST", "/containers/{id}/kill", self._on_end)
        hooks.on("POST", "/containers/{id}/wait", self._on_end)
        hooks.on("DELETE", "/containers/{id}", self._on_end)
        hooks.on("POST", "/networks/{id}/connect", self._on_network)
        hooks.on("POST", "/networks/{id}/disconnect", self._on_network)

    def answer_names(self, guest: Guest) -> None:
        """Answer the guest's queries of names; before its agent starts.

        Without, only what QEMU's own resolver knows has a name there.
        """
        system = SystemNames(self._platform.hosts_file)
        try:
            self._names = NameServer(system.hosts, self._platform.resolvers)
        except OSError as error:
            log.warning("queries of names are left to QEMU: %s", error)
            return
        self._names.start()
        guest.names_port = self._names.port

    async def start(
        self, driver: QemuDriver, tunnel: Tunnel, guest: Guest, ssh: tuple[str, int] | None
    ) -> None:
        """Begin to keep ports, from those that QEMU forwards already.

        :param ssh: the forward that is not ours to remove.
        """
        self._loop = asyncio.get_running_loop()
        self._driver, self._tunnel, self._guest, self._ssh = driver, tunnel, guest, ssh
        self._keeper = PortKeeper(
            QemuForwards(driver.monitor.human, NETWORK_DEVICE, self._lengthen_queue),
            self._platform,
            {forward: route for forward, route in await self._forwarded()},
            open_guest=tunnel.begin_tcp,
            open_datagrams=guest.open_datagrams,
            prepare=self._take_address,
        )
        self._choices = Choices(guest.hold_ports)
        self._rounds = asyncio.create_task(self._run(), name="ports")
        loop = self._loop
        self._watch = engine.ContainerWatch(
            lambda: tunnel.open_unix(engine.SOCKET), lambda: post(loop, self._changed)
        )
        self._ready.set()

    async def _lengthen_queue(self, forward: Forward) -> None:
        """Have QEMU keep more than one client waiting, where the system lets us."""
        identity = self._driver.identity if self._driver is not None else None
        if identity is None:
            return
        try:
            await in_thread(
                lambda: self._platform.lengthen_queue(identity.pid, forward.address, forward.port),
                name="longer queue",
            )
        except OSError as error:
            log.debug("the queue of %s stays short: %s", forward, error)

    async def close(self) -> None:
        """End the rounds and what we relay; QEMU's forwards end with QEMU."""
        if self._watch is not None:
            await in_thread(self._watch.close, name="container watch close")
        if self._again is not None:
            self._again.cancel()
        if self._rounds is not None:
            self._rounds.cancel()
            await asyncio.gather(self._rounds, return_exceptions=True)
        if self._keeper is not None:
            await self._keeper.close()
        if self._names is not None:
            await in_thread(self._names.close, name="names close")

    def describe(self) -> list[dict[str, Any]]:
        """Return what ``wherry ports --json`` prints."""
        if self._keeper is None:
            return []
        return [
            {
                "protocol": each.forward.protocol,
                "address": each.forward.address,
                "port": each.forward.port,
                "container": each.owner.name,
                "container_id": each.owner.id,
                "container_port": each.owner.port,
                "host_network": each.owner.host_network,
                "kind": each.kind,
                "state": "failed" if each.problem else "open" if each.kind else "pending",
                "reason": each.problem,
            }
            for each in self._keeper.published()
        ]

    def _changed(self) -> None:
        """Have a round done, and another one soon.

        The engine tells that a container has left a network before its list of containers does.
        """
        self._asked.set()
        if self._again is not None:
            self._again.cancel()
        self._again = asyncio.get_running_loop().call_later(_AGAIN_S, self._asked.set)

    # -- rounds ------------------------------------------------------------------------------

    async def _settled(self) -> None:
        """Wait for the end of a round that begins from now on.

        :raises WherryError: it failed.
        """
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self._asked.set()
        await waiter

    async def _run(self) -> None:
        """Do a round when one is asked for; look after things in between."""
        assert self._keeper is not None
        while True:
            pause_s = _LISTENERS_S if self._host_network else _VERIFY_S
            try:
                await asyncio.wait_for(self._asked.wait(), pause_s)
            except TimeoutError:
                await self._look_after()
                continue
            # However often there is an event.
            if self._is_due():
                await self._look_after()
            self._asked.clear()
            waiters, self._waiters = self._waiters, []
            failure: WherryError | None = None
            try:
                await self._round()
            except WherryError as error:
                failure = error
                log.info("ports: %s", error)
            except Exception as error:
                log.exception("a round of the ports failed")
                failure = WherryError(f"an internal error: {error!r}")
            for waiter in waiters:
                if waiter.done():
                    continue
                if failure is None:
                    waiter.set_result(None)
                else:
                    waiter.set_exception(failure)

    async def _round(self) -> None:
        assert self._keeper is not None
        found = await in_thread(
            lambda: engine.containers(self._open_engine()), name="list of containers"
        )
        await self._keeper.update(desired.running(found))
        self._host_network = desired.host_network(found)
        await self._look_for_listeners()

    async def _look_after(self) -> None:
        """Repair what died, and follow host-network containers."""
        assert self._keeper is not None
        try:
            await self._look_for_listeners()
            if self._is_due():
                self._verified = time.monotonic()
                await self._keeper.verify(self._forwarded_now)
        except WherryError as error:
            log.info("ports: %s", error)
        except Exception:
            log.exception("looking after the ports failed")

    def _is_due(self) -> bool:
        return time.monotonic() - self._verified >= _VERIFY_S

    async def _look_for_listeners(self) -> None:
        assert self._keeper is not None
        assert self._guest is not None
        names, guest = self._host_network, self._guest
        if not names:
            await self._keeper.update_listening({})
            return
        try:
            found = await in_thread(lambda: guest.listeners(names), name="listeners")
        except WherryError as error:
            log.info("listeners of host-network containers: %s", error)
            return
        await self._keeper.update_listening(desired.listening(found, names))

    async def _forwarded(self) -> list[tuple[Forward, Route]]:
        assert self._driver is not None
        return [
            (
                Forward(each.protocol, each.address, each.port),
                Route("hostfwd", "" if each.guest_address == _NETWORK_CARD else each.guest_address),
            )
            for each in await self._driver.host_forwards()
            if (each.address, each.port) != self._ssh
        ]

    async def _forwarded_now(self) -> Iterable[Forward]:
        return [forward for forward, _ in await self._forwarded()]

    async def _take_address(self, address: str) -> None:
        assert self._tunnel is not None
        tunnel = self._tunnel
        script = _TAKE_ADDRESS_6 if ":" in address else _TAKE_ADDRESS
        done = await in_thread(
            lambda: tunnel.run(script.replace("ADDRESS", address), timeout_s=_GUEST_S),
            name="address",
        )
        if done.status != 0:
            raise WherryError(
                f"the guest does not take the address {address}: "
                f"{done.stderr.decode(errors='replace').strip()}"
            )

    def _open_engine(self) -> Any:
        assert self._tunnel is not None
        return self._tunnel.open_unix(engine.SOCKET)

    # -- hooks, in threads of connections ------------------------------------------------------

    def _on_start(self, request: Request) -> Watch | None:
        """Bind what the container will publish, or refuse; hold the answer."""
        if not request.wait(self._ready, _HOLD_S):
            return None
        try:
            found = engine.while_wanted(
                request.wait,
                self._open_engine,
                lambda stream: engine.inspect(stream, request.params["id"]),
            )
        except WherryError:
            found = None
        running = found is not None and (found.get("State") or {}).get("Running")
        if found is None or (running and request.path.endswith("/start")):
            return None  # the engine will tell the client itself
        plan = desired.planned(found)
        host = (found.get("HostConfig") or {}).get("NetworkMode") == "host"
        if not plan.fixed and not plan.chosen and not host:
            return None
        keeper, choices, token = self._keeper, self._choices, object()
        assert keeper is not None
        assert choices is not None
        id = str(found["Id"])
        endpoint = f"{str(found.get('Name')).lstrip('/')} ({id})"
        settled = False

        def release() -> None:
            nonlocal settled
            if not settled:
                settled = True
                assert self._loop is not None
                for each in (keeper.release(token), choices.release(token)):
                    asyncio.run_coroutine_threadsafe(each, self._loop)

        def head(answer: ResponseHead) -> None:
            if answer.status != 204:
                return  # it did not start; the end releases
            try:
                self._wait(request, self._settled())
            except WherryError as error:
                log.warning("ports of %s: %s", endpoint, error)
                return
            problems = keeper.problems_of(id)
            if problems:
                self._stop_container(id)
                raise _refusal(endpoint, problems[0])

        try:
            try:
                self._wait(request, keeper.reserve(token, plan.fixed))
            except PortTaken:
                if self._publishes(request, found):
                    raise
            if plan.chosen:
                ours = [each.forward for each in keeper.published()]
                self._wait(request, choices.narrow(token, plan.chosen, ours))
        except PortTaken as error:
            raise _refusal(endpoint, str(error)) from error
        except WherryError as error:
            log.warning("ports of %s: %s", endpoint, error)
        except BaseException:
            release()
            raise
        return Watch(head=head, end=lambda complete: release())

    def _publishes(self, request: Request, container: dict[str, Any]) -> bool:
        """Whether the engine publishes a container's ports: not if all its networks are internal.

        Asked only when it matters, as it takes a question for each network.
        """
        networks = (container.get("NetworkSettings") or {}).get("Networks") or {}
        for name in networks:
            try:
                found = engine.while_wanted(
                    request.wait, self._open_engine, partial(engine.network, name=name)
                )
            except WherryError:
                return True
            if not (found and found.get("Internal")):
                return True
        return not networks

    def _on_end(self, request: Request) -> Watch | None:
        """Hold the answer until the ports of a container that ended are closed.

        Whether it has any is known then: a client may wait for its end before it starts it.
        """
        keeper = self._keeper
        if keeper is None:
            return None

        def settle(_: Any) -> None:
            if keeper.busy:
                self._settle(request)

        return Watch(line=settle) if request.path.endswith("/wait") else Watch(head=settle)

    def _on_network(self, request: Request) -> Watch | None:
        """Hold the answer until the ports are those of the networks that a container is in."""
        if self._keeper is None:
            return None
        return Watch(head=lambda _: self._settle(request))

    def _settle(self, request: Request) -> None:
        try:
            self._wait(request, self._settled())
        except WherryError as error:
            log.info("ports: %s", error)

    def _stop_container(self, id: str) -> None:
        try:
            engine.stop(self._open_engine(), id)
        except WherryError as error:
            log.warning("container %s without its ports goes on: %s", id, error)

    def _wait(self, request: Request, coroutine: Coroutine[Any, Any, T]) -> T:
        """Have the loop run a coroutine, and wait as long as the client does.

        It goes on without a client: what QEMU was told half-way nobody would know of.

        :raises WherryError: it took too long.
        """
        assert self._loop is not None
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        done = threading.Event()
        future.add_done_callback(lambda _: done.set())
        if not request.wait(done, _HOLD_S):
            raise WherryError(f"the ports were not settled within {_HOLD_S:g} s")
        return future.result()


def _refusal(endpoint: str, problem: str) -> Refusal:
    """Return a failed start in the engine's own words (moby, ``libnetwork``)."""
    return Refusal(
        500,
        "failed to set up container networking: driver failed programming external "
        f"connectivity on endpoint {endpoint}: {problem}",
    )
