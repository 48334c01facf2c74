"""The agent in the guest: sent and started over each new connection of the tunnel."""

from __future__ import annotations

import logging
import threading

from wherry.core.errors import WherryError
from wherry.service.agent import AgentClient, Health
from wherry.service.agent_bundle import build
from wherry.tunnel.tunnel import Tunnel

log = logging.getLogger(__name__)

_CLOCK_THRESHOLD_S = 0.5
_START_TIMEOUT_S = 60.0
_JOIN_S = 5.0


class Guest:
    """Keeps an agent running in the guest as long as there is a tunnel.

    The agent is no condition for using the engine, so it starts in the background,
    and a failure of it is logged and does not end the machine.
    """

    def __init__(self, tunnel: Tunnel) -> None:
        self._tunnel = tunnel
        self._bundle = build()
        self._agent: AgentClient | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Send the agent, in the background."""
        with self._lock:
            if self._closed:
                return
            self._thread = threading.Thread(target=self._connect, name="agent", daemon=True)
            self._thread.start()

    def reconnected(self) -> None:
        """Send it again: the old one ended with the old connection."""
        self.start()

    def health(self) -> Health:
        """Ask the guest how it is.

        :raises WherryError: there is no agent, or it does not answer.
        """
        agent = self._agent
        if agent is None:
            raise WherryError("the agent in the guest is not running yet")
        return agent.health()

    def close(self) -> None:
        """End the agent; safe to call twice."""
        with self._lock:
            self._closed = True
            agent, self._agent = self._agent, None
        if agent is not None:
            agent.close()
        if self._thread is not None:
            self._thread.join(_JOIN_S)

    def _connect(self) -> None:
        try:
            process = self._tunnel.exec(self._bundle.command(), timeout_s=_START_TIMEOUT_S)
            agent = AgentClient(process.stdio, self._bundle, lost=self._lost)
            boot_id = agent.hello(timeout_s=_START_TIMEOUT_S)
            drift = agent.sync_clock(_CLOCK_THRESHOLD_S)
            log.info("agent ready; boot %s; clock was off by %.3f s", boot_id, drift)
        except WherryError as error:
            log.warning("the agent did not start: %s", error)
            return
        with self._lock:
            if self._closed:
                agent.close()
            else:
                self._agent = agent

    def _lost(self, error: WherryError) -> None:
        log.warning("the agent ended: %s", error)
        self._agent = None
