"""QEMU's monitor: the few commands wherry needs, with its errors and time limits."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError

from wherry.core.errors import WherryError

_COMMAND_TIMEOUT_S = 10.0
_RETRY_S = 0.02
_CLOSE_TIMEOUT_S = 5.0
"""The library waits until all that it has to say is written, to whoever may not read it."""


class Monitor:
    """A QMP connection.

    :param on_event: called on the loop with each event's name and data.
    """

    def __init__(self, name: str, on_event: Callable[[str, Mapping[str, Any]], None]) -> None:
        self._client = QMPClient(name)
        # The library logs what we raise ourselves, with tracebacks.
        self._client.logger.disabled = True
        self._on_event = on_event
        self._events: asyncio.Task[None] | None = None

    async def connect(
        self,
        open_socket: Callable[[], socket.socket],
        *,
        timeout_s: float,
        still_alive: Callable[[], bool],
    ) -> None:
        """Connect as soon as QEMU listens, and negotiate.

        :param open_socket: connects to where QEMU shall listen; OSError if it does not yet.
        :param still_alive: whether QEMU runs: it ends the wait when it does not.
        :raises WherryError: QEMU ended, or did not answer in time.
        """
        listener = EventListener()
        self._client.register_listener(listener)
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        await self._connect(open_socket())
                        break
                    except (QMPError, OSError) as error:
                        if not still_alive():
                            raise WherryError("QEMU ended before its monitor answered") from error
                    await asyncio.sleep(_RETRY_S)
        except TimeoutError as error:
            raise WherryError(f"QEMU's monitor did not answer within {timeout_s:g} s") from error
        self._events = asyncio.create_task(self._watch(listener), name="qmp events")

    async def _connect(self, connection: socket.socket) -> None:
        try:
            await self._client.connect(connection)
        except BaseException:
            connection.close()
            raise

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout_s: float = _COMMAND_TIMEOUT_S,
    ) -> Any:
        """Run one QMP command and return its result.

        :raises WherryError: QEMU refused it, went away, or took too long.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self._client.execute(command, dict(arguments) if arguments else None)
        except ExecuteError as error:
            raise WherryError(f"QEMU refused {command}: {error}") from error
        except (QMPError, OSError, EOFError) as error:
            raise WherryError(f"QEMU went away during {command}") from error
        except TimeoutError as error:
            raise WherryError(f"QEMU did not answer {command} within {timeout_s:g} s") from error

    async def human(self, line: str) -> str:
        """Run one line of the human monitor, for what QMP has no command for."""
        return str(await self.execute("human-monitor-command", {"command-line": line}))

    async def close(self) -> None:
        """Leave the monitor; QEMU goes on. Safe to call twice."""
        if self._events is not None:
            self._events.cancel()
            await asyncio.gather(self._events, return_exceptions=True)
            self._events = None
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await self._client.disconnect()
        except (QMPError, OSError, EOFError, TimeoutError):
            pass  # QEMU closed it first, or does not answer any more

    async def _watch(self, listener: EventListener) -> None:
        async for event in listener:
            data = event.get("data")
            self._on_event(str(event["event"]), data if isinstance(data, Mapping) else {})


_FORWARD = re.compile(
    r"^\s*(?P<protocol>TCP|UDP)\[HOST_FORWARD\]\s+\d+\s+"
    r"(?P<address>\S+)\s+(?P<port>\d+)\s+(?P<guest>\S+)\s+(?P<guest_port>\d+)\s",
    re.MULTILINE,
)


class HostForward(NamedTuple):
    """A port of the host that QEMU forwards."""

    protocol: str
    address: str
    port: int
    guest_port: int
    guest_address: str


def host_forwards(usernet: str) -> list[HostForward]:
    """Read the forwards from the output of ``info usernet``."""
    return [
        HostForward(
            match["protocol"].lower(),
            # An address that is not set prints as the name of all addresses.
            "0.0.0.0" if match["address"] == "*" else match["address"],
            int(match["port"]),
            int(match["guest_port"]),
            match["guest"],
        )
        for match in _FORWARD.finditer(usernet)
    ]
