"""Keeps the host's listeners equal to what containers publish.

What is wanted comes from three sources: containers that run, containers that are about
to start (reservations), and what host-network containers listen on. A port that cannot
be bound is a problem, which is tried again at every round.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass

from wherry.core.bridge import in_thread
from wherry.platform.base import Platform
from wherry.ports.conflicts import explain, try_bind
from wherry.ports.datagrams import DatagramRelay
from wherry.ports.desired import ALL_IPV6, Forward, Owner, Wanted, sibling
from wherry.ports.guest_datagrams import GuestDatagramRelay
from wherry.ports.qemu import QemuForwards
from wherry.ports.reconcile import Route, reconcile
from wherry.ports.streams import StreamRelays, to_local
from wherry.tunnel.stream import Stream

log = logging.getLogger(__name__)

_ATTEMPTS = 3
"""QEMU does not say why it cannot bind, so the answer may have changed when we look."""


class PortTaken(Exception):
    """A container's ports cannot all be bound; the text is the engine's kind of message."""


@dataclass(frozen=True)
class Published:
    """A forward as ``wherry ports`` shows it.

    :ivar problem: why it does not work; empty when it does.
    """

    forward: Forward
    owner: Owner
    kind: str
    problem: str


class PortKeeper:
    """Owns all forwards of a machine; lives on the loop.

    :param present: forwards that exist already, in a QEMU that an earlier service left.
    :param open_guest: connects to an address and port in the guest, through the tunnel.
    :param open_datagrams: connects to the agent in the guest, for datagrams.
    :param prepare: makes an address of the host one that the guest takes packets for.
    """

    def __init__(
        self,
        qemu: QemuForwards,
        platform: Platform,
        present: Mapping[Forward, Route],
        *,
        open_guest: Callable[[str, int], Stream],
        open_datagrams: Callable[[], Stream],
        prepare: Callable[[str], Awaitable[None]],
    ) -> None:
        self._qemu = qemu
        self._platform = platform
        self._open_guest = open_guest
        self._open_datagrams = open_datagrams
        self._prepare = prepare
        self._present: dict[Forward, Route] = dict(present)
        self._streams = StreamRelays()
        self._datagrams: dict[Forward, DatagramRelay | GuestDatagramRelay] = {}
        self._running: Wanted = {}
        self._listening: Wanted = {}
        self._reserved: dict[object, Wanted] = {}
        self._problems: dict[Forward, str] = {}
        self._changing = asyncio.Lock()

    @property
    def busy(self) -> bool:
        """Whether there is any forward."""
        return bool(self._present or self._problems)

    async def close(self) -> None:
        """End what we relay; QEMU's forwards end with QEMU, or are adopted."""
        async with self._changing:
            for relay in self._datagrams.values():
                await in_thread(relay.close, name="datagram relay close")
            await in_thread(self._streams.close, name="stream relays close")

    def published(self) -> list[Published]:
        """Return all forwards that are wanted, in order."""
        wanted = self._wanted()
        return [
            Published(
                forward,
                wanted[forward],
                self._present[forward].kind if forward in self._present else "",
                self._problems.get(forward, ""),
            )
            for forward in sorted(wanted)
        ]

    def problems_of(self, container: str) -> list[str]:
        """Return what is wrong with the ports that a container publishes.

        What it listens on in the host's network is no part of it: that may be refused later.
        """
        wanted = self._wanted()
        return [
            why
            for each, why in list(self._problems.items())
            if (owner := wanted.get(each)) and owner.id == container and not owner.host_network
        ]

    async def update(self, wanted: Wanted) -> None:
        """Make the forwards of the running containers exist."""
        async with self._changing:
            self._running = wanted
            await self._apply()

    async def update_listening(self, wanted: Wanted) -> None:
        """Make the forwards of the host-network containers exist."""
        async with self._changing:
            if wanted != self._listening:
                self._listening = wanted
                await self._apply()

    async def reserve(self, token: object, wanted: Wanted) -> None:
        """Bind the ports of a container that is about to start; all of them, or none.

        A port that another container has is left to the engine, which refuses it.

        :raises PortTaken: something else has one of them, or the system forbids it.
        """
        async with self._changing:
            others = [
                each
                for each, owner in self._wanted().items()
                if owner.id not in {mine.id for mine in wanted.values()}
            ]
            mine = {
                each: owner
                for each, owner in wanted.items()
                if not any(each.overlaps(other) for other in others)
            }
            self._reserved[token] = mine
            await self._apply()
            problems = [self._problems[each] for each in sorted(mine) if each in self._problems]
            if problems:
                del self._reserved[token]
                await self._apply()
                raise PortTaken(problems[0])

    async def release(self, token: object) -> None:
        """Forget a reservation: the container runs, or did not start."""
        async with self._changing:
            if self._reserved.pop(token, None):
                await self._apply()

    async def verify(self, ask: Callable[[], Awaitable[Iterable[Forward]]]) -> None:
        """Make again what QEMU no longer has, or we, and try again what could not be made.

        What it has and should not, as after an answer of its that was lost, is removed.

        :param ask: tells what QEMU forwards now.
        """
        async with self._changing:
            has = set(await ask())
            ours = {each for each, route in self._present.items() if route.kind == "hostfwd"}
            for forward in ours - has:
                log.warning("port %s was no longer forwarded", forward)
                del self._present[forward]
            for forward in has - ours:
                log.warning("port %s was forwarded for nobody", forward)
                await self._qemu.remove(forward)
            for forward in self._present.keys() - ours - self._relayed():
                log.warning("port %s was no longer relayed", forward)
                await self._remove(forward)
            await self._apply()

    def _relayed(self) -> set[Forward]:
        datagrams = {each for each, relay in self._datagrams.items() if relay.alive}
        return datagrams | self._streams.forwards()

    def _wanted(self) -> Wanted:
        published: Wanted = {}
        for each in list(self._reserved.values()):  # other threads ask for it as well
            published.update(each)
        published.update(self._running)
        # What the engine has published nobody in the guest listens on any more, though that
        # may not be known here yet.
        listening = {
            forward: owner
            for forward, owner in self._listening.items()
            if not any(forward.overlaps(other) for other in self._running)
        }
        return listening | published

    async def _apply(self) -> None:
        wanted = self._wanted()
        self._problems = {each: why for each, why in self._problems.items() if each in wanted}
        changes = reconcile(wanted, self._present)
        for forward in changes.remove:
            await self._remove(forward)
        for forward, route in changes.add:
            leads_to = sibling(forward, wanted) if route.kind == "relay" else None
            if leads_to is not None and leads_to not in self._present:
                # What answers there is the host's own, and not for all who reach this port.
                problem: str | None = self._problems[leads_to]
            else:
                problem = await self._add(forward, route)
            if problem is None:
                continue
            if problem:
                if self._problems.get(forward) != problem:
                    log.warning("port %s: %s", forward, problem)
                self._problems[forward] = problem
            else:
                self._problems.pop(forward, None)
                self._present[forward] = route

    async def _add(self, forward: Forward, route: Route) -> str | None:
        """Make a forward; return what is wrong, nothing, or None when it cannot matter."""
        if route.kind == "hostfwd":
            await self._prepare_guest(forward)
            return await self._add_qemu(forward, route)
        try:
            if forward.protocol == "tcp":
                if route.kind == "relay":
                    self._streams.add(forward, to_local(forward.port), pushes=False)
                else:
                    await self._prepare_guest(forward)
                    guest = route.guest
                    self._streams.add(
                        forward, lambda: self._open_guest(guest, forward.port), pushes=True
                    )
            else:
                relay: DatagramRelay | GuestDatagramRelay
                if route.kind == "relay":
                    relay = DatagramRelay(forward, ("127.0.0.1", forward.port))
                else:
                    await self._prepare_guest(forward)
                    inside = (route.guest, forward.port)
                    relay = GuestDatagramRelay(forward, inside, self._open_datagrams)
                relay.start()
                self._datagrams[forward] = relay
        except OSError as error:
            absent = error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
            if absent and forward.address == ALL_IPV6:
                return None  # no IPv6 here; the engine publishes on it all the same
            return await self._explain(forward, error)
        return ""

    async def _prepare_guest(self, forward: Forward) -> None:
        address = ipaddress.ip_address(forward.address)
        if not address.is_unspecified and not address.is_loopback:
            await self._prepare(forward.address)

    async def _add_qemu(self, forward: Forward, route: Route) -> str:
        for _ in range(_ATTEMPTS):
            said = await self._qemu.add(forward, route.guest)
            if not said:
                return ""
            error = try_bind(forward)
            if error is not None:
                return await self._explain(forward, error)
        return f"failed to bind host port {forward}: {said}"

    async def _explain(self, forward: Forward, error: OSError) -> str:
        return await in_thread(
            lambda: explain(forward, error, self._platform), name="port conflict"
        )

    async def _remove(self, forward: Forward) -> None:
        route = self._present.pop(forward)
        if route.kind == "hostfwd":
            await self._qemu.remove(forward)
        elif (relay := self._datagrams.pop(forward, None)) is not None:
            await in_thread(relay.close, name="datagram relay close")
        else:
            await in_thread(lambda: self._streams.remove(forward), name="stream relay close")
