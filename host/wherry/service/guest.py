"""The agent in the guest: sent and started over each new connection of the tunnel."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from wherry.core.errors import WherryError
from wherry.service.agent import AgentClient
from wherry.service.agent_bundle import build
from wherry.tunnel.connection import Process
from wherry.tunnel.stream import Stream
from wherry.tunnel.tunnel import Tunnel

log = logging.getLogger(__name__)

_CLOCK_THRESHOLD_S = 0.5
_CLOCK_S = 60.0
_TRIM_S = 3600.0
"""How often the guest gives back what it has free, so that the data disk becomes smaller."""

_FIRST_DELAY_S = 0.5
_LONGEST_DELAY_S = 30.0
"""Between attempts to start an agent. One that lived longer is begun again at once."""

_START_TIMEOUT_S = 60.0
_COMES_S = 20.0
"""Requests wait for this: after the start of a machine or an outage the agent comes soon."""

_JOIN_S = 5.0

SYNC_DIRECTORY = "/data/sync"
"""Where the copies of synchronised files are in the guest, on its data disk."""


class Guest:
    """Keeps an agent running in the guest as long as there is a tunnel.

    The agent is no condition for using the engine, so it starts in the background, and a
    failure of it is logged and does not end the machine. One thread does it all, so that
    there is one agent at a time; when it ends, or is late, another is sent.

    :param root_changed: called with the id of a synchronised root in which something changed.
    :param agent_ended: called when an agent has ended, before another one is sent: nobody tells
        of changes until roots are opened there. Must not block.
    """

    def __init__(
        self,
        tunnel: Tunnel,
        root_changed: Callable[[str], object] = lambda root: None,
        agent_ended: Callable[[], object] = lambda: None,
    ) -> None:
        self._tunnel = tunnel
        self._root_changed = root_changed
        self._agent_ended = agent_ended
        self._bundle = build()
        self._agent: AgentClient | None = None
        self._lock = threading.Condition()
        self._closed = False
        self._trimmed = time.monotonic()
        self._tunnel_is_new = False
        self._thread: threading.Thread | None = None
        self.boot_id = ""
        """Of the boot that the guest is in; empty until an agent has told."""
        self.names_port = 0
        """Where the host answers queries of names; 0 for not at all. Set before :meth:`start`."""
        self.host_open = True
        """Whether containers may use the host's loopback. Set before :meth:`start`."""

    def start(self) -> None:
        """Keep an agent from now on, in the background."""
        with self._lock:
            if self._closed or self._thread is not None:
                return
            self._thread = threading.Thread(target=self._keep, name="agent", daemon=True)
            self._thread.start()

    def settle(self) -> None:
        """Wait until names lead to the host, and the way to it is open or closed as set.

        To be called when the engine has started. Without, the machine is of use all the same.
        """
        try:
            agent = self._awaited()
            if not self.host_open:
                # The engine has put its own rules before ours, unless the agent came later.
                agent.set_network(self.names_port, host_open=False)
        except WherryError as error:
            log.warning("containers do not know this computer's names yet: %s", error)

    def reconnected(self) -> None:
        """Learn that there is a new connection, over which another agent can come at once."""
        with self._lock:
            self._tunnel_is_new = True
            self._lock.notify_all()

    def describe(self, timeout_s: float, engine_timeout_s: float) -> dict[str, Any]:
        """Return the fields of ``wherry status --json`` that only the agent knows.

        :param timeout_s: how long the agent may take to answer, besides what the engine takes.
        :param engine_timeout_s: how long the engine may take to answer the agent.
        """
        try:
            health = self._running().health(engine_timeout_s=engine_timeout_s, timeout_s=timeout_s)
        except WherryError as error:
            log.info("how the guest is, is not known: %s", error)
            return {"guest": None, "engine_health": None, "engine_problem": error.message}
        guest = {
            "memory_total_bytes": health.memory_total_bytes,
            "memory_used_bytes": health.memory_total_bytes - health.memory_available_bytes,
            "disk_total_bytes": health.data_total_bytes,
            "disk_used_bytes": health.data_total_bytes - health.data_available_bytes,
            "clock_offset_s": round(health.clock_offset_s, 3),
            "load": health.load,
            "uptime_s": round(health.uptime_s, 1),
        }
        return {
            "guest": guest,
            "engine_health": "healthy" if health.engine_ready else "unhealthy",
            "engine_problem": health.engine_problem,
        }

    def listeners(self, containers: Iterable[str]) -> list[tuple[str, str, str, int]]:
        """See :meth:`AgentClient.listeners`.

        :raises WherryError: there is no agent, or it does not answer.
        """
        return self._running().listeners(containers)

    def set_engine(self, settings: str, *, live: bool) -> tuple[bool, str]:
        """See :meth:`AgentClient.set_engine`.

        :raises WherryError: also when there is no agent, and none comes in time.
        """
        agent = self._awaited()
        done = agent.set_engine(settings, live=live)
        # An engine that has started has put its own rules before ours.
        agent.set_network(self.names_port, host_open=self.host_open)
        return done

    def open_sync(self) -> Stream:
        """Open a connection for a synchronised root.

        :raises WherryError: there is no agent, and none comes in time.
        """
        return self._tunnel.open_unix(self._awaited().listen_sync(SYNC_DIRECTORY))

    def open_datagrams(self) -> Stream:
        """Open a connection for a UDP port.

        :raises WherryError: there is no agent, and none comes in time.
        """
        return self._tunnel.open_unix(self._awaited().listen_datagrams())

    def hold_ports(self, ports: Iterable[tuple[str, int]]) -> None:
        """See :meth:`AgentClient.hold_ports`.

        :raises WherryError: there is no agent, or it does not answer.
        """
        self._running().hold_ports(ports)

    def _running(self) -> AgentClient:
        agent = self._agent
        if agent is None:
            raise WherryError("the agent in the guest is not running yet")
        return agent

    def _awaited(self) -> AgentClient:
        with self._lock:
            self._lock.wait_for(lambda: self._agent is not None or self._closed, _COMES_S)
            agent = self._agent
        if agent is None:
            raise WherryError("the agent in the guest does not run", hint="see: wherry logs")
        return agent

    def close(self) -> None:
        """End the agent; safe to call twice."""
        with self._lock:
            self._closed = True
            agent, self._agent = self._agent, None
            self._lock.notify_all()
        if agent is not None:
            agent.close()
        if self._thread is not None:
            self._thread.join(_JOIN_S)

    def _keep(self) -> None:
        """Have an agent, look after it, and have another when it ends; the thread's body."""
        delay_s = _FIRST_DELAY_S
        while not self._closed:
            with self._lock:
                self._tunnel_is_new = False
            begun = time.monotonic()
            ended = threading.Event()
            agent = self._connect(ended)
            if agent is not None:
                self._look_after(agent, ended)
                agent.close()
                self._agent_ended()
            if time.monotonic() - begun > _LONGEST_DELAY_S:
                delay_s = _FIRST_DELAY_S
            with self._lock:
                self._lock.wait_for(lambda: self._closed or self._tunnel_is_new, delay_s)
            delay_s = min(2 * delay_s, _LONGEST_DELAY_S)

    def _look_after(self, agent: AgentClient, ended: threading.Event) -> None:
        """Let an agent be used until it or the connection ends; keep the guest's clock right."""
        with self._lock:
            self._agent = None if self._closed else agent
            self._lock.notify_all()
        while True:
            with self._lock:
                over = self._lock.wait_for(lambda: self._closed or ended.is_set(), _CLOCK_S)
            if over:
                break
            try:
                # The host may have slept, and the guest does not notice.
                drift = agent.sync_clock(_CLOCK_THRESHOLD_S)
            except WherryError as error:
                log.warning("the agent is replaced: %s", error)
                break
            if drift:
                log.info("the guest's clock is corrected by %.3f s", drift)
            if time.monotonic() - self._trimmed >= _TRIM_S:
                self._trimmed = time.monotonic()
                try:
                    agent.fstrim()
                except WherryError as error:
                    log.info("what the guest has free is not given back: %s", error)
        with self._lock:
            self._agent = None

    def _connect(self, ended: threading.Event) -> AgentClient | None:
        """Send an agent and begin a session with it; None if that fails.

        :param ended: set when the session has ended.
        """

        def lost(error: WherryError) -> None:
            log.warning("the agent ended: %s", error)
            with self._lock:
                ended.set()
                self._lock.notify_all()

        try:
            process = self._tunnel.exec(self._bundle.command(), timeout_s=_START_TIMEOUT_S)
            threading.Thread(
                target=_log_stderr, args=(process,), name="agent stderr", daemon=True
            ).start()
            agent = AgentClient(
                process.stdio, self._bundle, lost=lost, on_changed=self._root_changed
            )
            try:
                boot_id = agent.hello(timeout_s=_START_TIMEOUT_S)
                drift = agent.sync_clock(_CLOCK_THRESHOLD_S)
                agent.set_network(self.names_port, host_open=self.host_open)
            except BaseException:
                agent.close()
                raise
        except WherryError as error:
            if not self._closed:
                log.warning("the agent did not start: %s", error)
            return None
        self.boot_id = boot_id
        log.info("agent ready; boot %s; clock corrected by %.3f s", boot_id, drift)
        return agent


def _log_stderr(process: Process) -> None:
    """Keep what the agent, or the shell that should start it, has to say; ends with it."""
    try:
        while said := process.recv_stderr(4096):
            log.warning("agent: %s", said.decode(errors="replace").rstrip())
    except WherryError:
        pass  # the connection ended, which the session tells as well
