"""Forwards through QEMU's own ``hostfwd``, which carries the bytes in C.

``hostfwd_add`` and ``hostfwd_remove`` are commands of the human monitor (QEMU's
documentation, "QEMU Monitor"); they answer with nothing, or with what went wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from wherry.core.errors import WherryError
from wherry.ports.desired import Forward, desired
from wherry.ports.reconcile import reconcile

log = logging.getLogger(__name__)

Human = Callable[[str], Awaitable[str]]
"""Runs a line of QEMU's human monitor and returns what it prints."""


class Forwarder:
    """Keeps the host's listeners equal to what containers publish; lives on the loop.

    :param human: QEMU's human monitor.
    :param network: id of the user-mode network device.
    :param present: forwards that exist already, in a QEMU that an earlier service left.
    """

    def __init__(self, human: Human, network: str, present: Iterable[Forward] = ()) -> None:
        self._human = human
        self._network = network
        self.present: set[Forward] = set(present)
        self.problems: dict[Forward, str] = {}
        """Forwards that could not be made, and why."""

    async def update(self, containers: Iterable[Mapping[str, Any]]) -> None:
        """Make the forwards of these containers exist, and no others."""
        wanted = desired(containers)
        self.problems = {key: why for key, why in self.problems.items() if key in wanted}
        changes = reconcile(wanted, self.present)
        for forward in changes.remove:
            await self._remove(forward)
        for forward in changes.add:
            await self._add(forward)

    async def _add(self, forward: Forward) -> None:
        rule = f"{forward.protocol}:{forward.address}:{forward.port}-:{forward.port}"
        answer = await self._ask(f"hostfwd_add {self._network} {rule}")
        if answer:
            if self.problems.get(forward) != answer:
                log.warning("port %s/%d: %s", forward.protocol, forward.port, answer)
            self.problems[forward] = answer
            return
        self.problems.pop(forward, None)
        self.present.add(forward)

    async def _remove(self, forward: Forward) -> None:
        rule = f"{forward.protocol}:{forward.address}:{forward.port}"
        answer = await self._ask(f"hostfwd_remove {self._network} {rule}")
        if "not found" in answer:
            log.warning("port %s/%d was not forwarded: %s", forward.protocol, forward.port, answer)
        self.present.discard(forward)

    async def _ask(self, line: str) -> str:
        try:
            return (await self._human(line)).strip()
        except WherryError as error:
            return error.message
