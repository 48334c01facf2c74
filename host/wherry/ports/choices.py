"""Ports that the engine chooses: kept from being ones that something here has.

The engine looks only at the guest when it chooses, and on Linux it would look at this
computer. So what is in use here is in use there as well, as long as a start lasts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable

from wherry.core.bridge import in_thread
from wherry.ports.conflicts import in_use
from wherry.ports.desired import Choice, Forward

Ports = set[tuple[str, int]]
"""Protocol and port."""

_MOST = 500
"""So many sockets the guest's agent may open. The engine chooses upwards, so the lowest count."""


class Choices:
    """Narrows what the engine may choose from; lives on the loop.

    :param hold: has ports in use in the guest, and no others that it had; waits.
    """

    def __init__(self, hold: Callable[[Ports], None]) -> None:
        self._hold = hold
        self._held: dict[object, Ports] = {}
        self._changing = asyncio.Lock()

    async def narrow(
        self, token: object, choices: Collection[Choice], ours: Iterable[Forward]
    ) -> None:
        """Take what is in use here from the choices of a start.

        :param ours: what the engine has given away itself, and must be able to bind.
        :raises WherryError: the guest does not hold them.
        """
        async with self._changing:
            here = await in_thread(in_use, name="ports in use")
            here -= {(each.protocol, each.port) for each in ours}
            found = sorted(port for port in here if any(port in choice for choice in choices))
            self._held[token] = set(found[:_MOST])
            await self._apply()

    async def release(self, token: object) -> None:
        """Forget a start.

        :raises WherryError: the guest does not let go.
        """
        async with self._changing:
            if self._held.pop(token, None):
                await self._apply()

    async def _apply(self) -> None:
        ports = {port for each in self._held.values() for port in each}
        await in_thread(lambda: self._hold(ports), name="hold ports")
