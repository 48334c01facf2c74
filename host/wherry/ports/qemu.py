"""Forwards through QEMU's own ``hostfwd``.

``hostfwd_add`` and ``hostfwd_remove`` are commands of the human monitor (QEMU's
documentation, "QEMU Monitor"); they answer with nothing, or with what went wrong, but
never with why: for that see :mod:`wherry.ports.conflicts`.

A guest address may be given. For the loopback's, QEMU asks the guest's network card for
127.0.0.1, and the guest answers and takes the packets: its ``route_localnet`` is on, so
what listens on the guest's loopback alone is reached without leaving C.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from wherry.core.errors import WherryError
from wherry.ports.desired import Forward

Human = Callable[[str], Awaitable[str]]
"""Runs a line of QEMU's human monitor and returns what it prints."""


class QemuForwards:
    """Adds and removes forwards; lives on the loop.

    :param network: id of the user-mode network device.
    :param listening: called with each forward of TCP that QEMU now listens for.
    """

    def __init__(
        self,
        human: Human,
        network: str,
        listening: Callable[[Forward], Awaitable[None]] | None = None,
    ) -> None:
        self._human = human
        self._network = network
        self._listening = listening

    async def add(self, forward: Forward, guest: str) -> str:
        """Have QEMU listen; return what is wrong, or nothing."""
        rule = f"{_host(forward)}-{guest}:{forward.port}"
        said = await self._ask(f"hostfwd_add {self._network} {rule}")
        if not said and forward.protocol == "tcp" and self._listening is not None:
            await self._listening(forward)
        return said

    async def remove(self, forward: Forward) -> None:
        """Have QEMU listen no more; connections go on until one side ends them."""
        await self._ask(f"hostfwd_remove {self._network} {_host(forward)}")

    async def _ask(self, line: str) -> str:
        try:
            return (await self._human(line)).strip()
        except WherryError as error:
            return error.message


def _host(forward: Forward) -> str:
    return f"{forward.protocol}:{forward.address}:{forward.port}"
