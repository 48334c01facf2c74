"""The host's end of the session with the agent in the guest."""

from __future__ import annotations

import concurrent.futures
import ipaddress
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from wherry.core.errors import TunnelError, WherryError
from wherry.service.agent_bundle import AgentBundle
from wherry_wire import PROTOCOL
from wherry_wire.frames import Decoder, WireError
from wherry_wire.messages import (
    ClockReport,
    ClockSet,
    DatagramsListen,
    DatagramsListening,
    Done,
    EngineReport,
    EngineSet,
    Failure,
    HealthReport,
    HealthRequest,
    HealthWatch,
    Hello,
    HelloReply,
    ListenersReport,
    ListenersRequest,
    Message,
    NetworkSet,
    PortsHold,
    PowerOff,
    SyncChanged,
    SyncListen,
    SyncListening,
    Trim,
    TrimReport,
    pack,
    unpack,
)

HELLO_TIMEOUT_S = 60.0
"""The guest starts Python and compiles the agent, perhaps while the engine starts beside it."""

REQUEST_TIMEOUT_S = 20.0
ENGINE_TIMEOUT_S = 5.0
TRIM_TIMEOUT_S = 600.0
ENGINE_SET_TIMEOUT_S = 360.0
"""The agent's own bounds, for stopping and starting the engine, are shorter together."""

_CLOSE_TIMEOUT_S = 5.0
_RECEIVE_BYTES = 64 * 1024
_HINT = "see `wherry logs --source console`, or restart the machine"

_STREAM_ERRORS = (OSError, TunnelError)

M = TypeVar("M", bound=Message)


class Stream(Protocol):
    """What of :class:`wherry.tunnel.stream.Stream` a session needs; a pipe has no more."""

    def recv(self, size: int, /) -> bytes:
        """Wait for bytes and return up to ``size`` of them; ``b""`` at the end.

        :raises OSError, TunnelError: the stream is lost.
        """

    def sendall(self, data: bytes, /) -> None:
        """Send all of ``data``; returns once the transport holds it, or has found itself dead.

        :raises OSError, TunnelError: the stream is lost.
        """

    def close(self) -> None:
        """Release the stream and wake whoever waits in :meth:`recv`; safe to call twice."""


@dataclass(frozen=True)
class Health:
    """How the guest is, as the agent saw it.

    :ivar clock_offset_s: the guest's clock minus ours; as exact as the way here is short.
    :ivar load: the load average of the last minute.
    :ivar data_total_bytes: size of the filesystem on the data disk.
    :ivar engine_version: empty when it is not known.
    :ivar engine_problem: why the engine did not answer; empty when it did.
    """

    clock_offset_s: float
    uptime_s: float
    load: float
    memory_total_bytes: int
    memory_available_bytes: int
    data_total_bytes: int
    data_available_bytes: int
    engine_version: str
    engine_problem: str

    @property
    def engine_ready(self) -> bool:
        """Whether the engine answered."""
        return not self.engine_problem


class AgentClient:
    """A session with the agent; the methods may be called from any thread.

    Construct it with the stream of a channel that runs ``bundle.command()``; it owns the
    stream from then on and sends the agent through it. Every request has a bound; one that
    is late does not end the session.

    :param lost: called once, in a thread of ours, when the session ends without
        :meth:`close`: with the error that waiting requests get too.
    :param on_health: called in the same thread for each report of :meth:`watch_health`.
    :param on_changed: called in the same thread with the id of a synchronised root in which
        the guest's watch has seen something.
    :param data_path: the path in the guest whose filesystem is looked after.
    :param engine_socket: the engine's socket in the guest.
    :raises WherryError: the stream is lost already.
    """

    def __init__(
        self,
        stream: Stream,
        bundle: AgentBundle,
        *,
        lost: Callable[[WherryError], object] = lambda error: None,
        on_health: Callable[[Health], object] = lambda health: None,
        on_changed: Callable[[str], object] = lambda root: None,
        data_path: str = "/var/lib/docker",
        engine_socket: str = "/run/docker.sock",
    ) -> None:
        self._stream = stream
        self._bundle = bundle
        self._lost = lost
        self._on_health = on_health
        self._on_changed = on_changed
        self._settings = Hello(protocol=PROTOCOL, data_path=data_path, engine_socket=engine_socket)
        self._sending = threading.Lock()
        # Guards the three below.
        self._state = threading.Lock()
        self._waiting: dict[int, tuple[type[Message], concurrent.futures.Future[Message]]] = {}
        self._last_id = 0
        self._end: WherryError | None = None
        try:
            stream.sendall(bundle.data)
        except _STREAM_ERRORS as error:
            stream.close()
            raise _stream_error(error) from error
        self._reader = threading.Thread(target=self._read, name="agent", daemon=True)
        self._reader.start()

    def hello(self, *, timeout_s: float = HELLO_TIMEOUT_S) -> str:
        """Begin the session and return the guest's boot id; the other requests come after it.

        :raises WherryError: the agent did not start in time, or is not the one we sent.
        """
        reply = self._request(self._settings, HelloReply, timeout_s)
        if (reply.protocol, reply.agent) != (PROTOCOL, self._bundle.name):
            raise WherryError(
                f"the agent in the guest is {reply.agent} with protocol {reply.protocol},"
                f" not {self._bundle.name} with protocol {PROTOCOL}",
                hint=_HINT,
            )
        return reply.boot_id

    def health(
        self,
        *,
        engine_timeout_s: float = ENGINE_TIMEOUT_S,
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> Health:
        """Ask how the guest is.

        :param engine_timeout_s: how long the engine may take to answer; 0 to not ask it.
        :raises WherryError: the agent did not answer in time, or is lost.
        """
        request = HealthRequest(engine_timeout_s=engine_timeout_s)
        return _health(self._request(request, HealthReport, timeout_s + engine_timeout_s))

    def watch_health(
        self,
        interval_s: float,
        *,
        engine_timeout_s: float = ENGINE_TIMEOUT_S,
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> None:
        """Have the agent report every ``interval_s`` seconds from now on; 0 for no more.

        :raises WherryError: the agent did not answer in time, or is lost.
        """
        request = HealthWatch(interval_s=interval_s, engine_timeout_s=engine_timeout_s)
        self._request(request, Done, timeout_s)

    def sync_clock(self, threshold_s: float, *, timeout_s: float = REQUEST_TIMEOUT_S) -> float:
        """Set the guest's clock by ours if it is off by more than ``threshold_s`` seconds.

        Return by how many seconds it was ahead of ours and was corrected; 0 if it was not.

        :raises WherryError: the agent could not, did not answer in time, or is lost.
        """
        request = ClockSet(time_s=time.time(), threshold_s=threshold_s)
        report = self._request(request, ClockReport, timeout_s)
        return report.offset_s if report.corrected else 0.0

    def fstrim(self, *, timeout_s: float = TRIM_TIMEOUT_S) -> int:
        """Give the free blocks of the data disk back, and return how many bytes they are.

        :raises WherryError: the disk cannot, the agent did not answer in time, or is lost.
        """
        return self._request(Trim(), TrimReport, timeout_s).trimmed_bytes

    def listen_sync(self, directory: str, *, timeout_s: float = REQUEST_TIMEOUT_S) -> str:
        """Have the agent listen for synchronised roots; return its socket's path in the guest.

        :param directory: on the data disk, for their copies.
        :raises WherryError: the kernel cannot watch, the agent did not answer in time, or is
            lost.
        """
        return self._request(SyncListen(directory=directory), SyncListening, timeout_s).socket

    def listen_datagrams(self, *, timeout_s: float = REQUEST_TIMEOUT_S) -> str:
        """Have the agent listen for UDP ports; return its socket's path in the guest.

        :raises WherryError: the agent could not, did not answer in time, or is lost.
        """
        return self._request(DatagramsListen(), DatagramsListening, timeout_s).socket

    def listeners(
        self, containers: Iterable[str], *, timeout_s: float = REQUEST_TIMEOUT_S
    ) -> list[tuple[str, str, str, int]]:
        """Return what these host-network containers listen on.

        :returns: container, protocol, address and port.
        :raises WherryError: the agent could not, did not answer in time, or is lost.
        """
        request = ListenersRequest(containers=" ".join(containers))
        report = self._request(request, ListenersReport, timeout_s)
        try:
            found = [line.split(" ") for line in report.listeners.splitlines()]
            return [
                (id, protocol, str(ipaddress.ip_address(address)), int(port))
                for id, protocol, address, port in found
                if protocol in ("tcp", "udp") and 0 < int(port) < 65536
            ]
        except ValueError as error:
            raise WherryError("the agent in the guest told listeners that are none") from error

    def hold_ports(
        self, ports: Iterable[tuple[str, int]], *, timeout_s: float = REQUEST_TIMEOUT_S
    ) -> None:
        """Have these ports in use in the guest, by protocol, and no others that were held.

        :raises WherryError: the agent could not, did not answer in time, or is lost.
        """
        lines = "\n".join(f"{protocol} {port}" for protocol, port in sorted(ports))
        self._request(PortsHold(ports=lines), Done, timeout_s)

    def set_network(
        self, names_port: int, *, host_open: bool, timeout_s: float = REQUEST_TIMEOUT_S
    ) -> None:
        """Set what leads from the guest to the host.

        :param names_port: on the host's loopback, of a server that answers the guest's
            queries of names as long as the session lasts; 0 for none.
        :param host_open: whether containers may connect to services on the host's loopback.
        :raises WherryError: the agent could not, did not answer in time, or is lost.
        """
        request = NetworkSet(names_port=names_port, host_open=host_open)
        self._request(request, Done, timeout_s)

    def set_engine(
        self, settings: str, *, live: bool, timeout_s: float = ENGINE_SET_TIMEOUT_S
    ) -> tuple[bool, str]:
        """Have the engine work with other settings.

        :param settings: the text of ``daemon.json``.
        :param live: whether running containers can go on under them.
        :returns: whether it was done, and what the user should know. It is not done when
            containers would have to be stopped for it.
        :raises WherryError: the engine refuses them and goes on with what it had, the agent
            did not answer in time, or is lost.
        """
        report = self._request(EngineSet(settings=settings, live=live), EngineReport, timeout_s)
        if report.refused:
            raise WherryError(
                f"the engine refuses this: {_printable(report.refused)}",
                hint="it goes on with what it had",
            )
        return report.applied, _printable(report.note)

    def poweroff(self, *, timeout_s: float = REQUEST_TIMEOUT_S) -> None:
        """Have the guest shut itself down; returns when it has begun to.

        The session may end before the agent's answer is here, so that counts as an answer.
        Whether the guest does power off, only the virtual machine's end tells.

        :raises WherryError: the guest refused, the agent did not answer in time, or was lost
            before it was asked.
        """
        try:
            self._request(PowerOff(), Done, timeout_s)
        except _CutOff:
            pass

    def close(self) -> None:
        """End the session; safe to call twice, and from the callbacks."""
        self._finish(WherryError("the session with the agent was closed"), tell=False)
        if threading.current_thread() is not self._reader:
            self._reader.join(_CLOSE_TIMEOUT_S)

    def _request(self, request: Message, kind: type[M], timeout_s: float) -> M:
        future: concurrent.futures.Future[Message] = concurrent.futures.Future()
        with self._state:
            if self._end is not None:
                raise WherryError(self._end.message, hint=self._end.hint) from self._end
            self._last_id += 1
            id = self._last_id
            self._waiting[id] = (kind, future)
        try:
            with self._sending:
                self._stream.sendall(pack(request, id))
        except _STREAM_ERRORS as error:
            # Wakes the reader, which ends the session.
            self._stream.close()
            raise _stream_error(error) from error
        try:
            reply = future.result(timeout_s)
        except TimeoutError as error:
            raise WherryError(
                f"the agent in the guest did not answer {type(request).__name__}"
                f" within {timeout_s:g} s",
                hint=_HINT,
            ) from error
        finally:
            with self._state:
                self._waiting.pop(id, None)
        if isinstance(reply, Failure):
            raise WherryError(f"the agent in the guest failed: {_printable(reply.message)}")
        assert isinstance(reply, kind)
        return reply

    def _read(self) -> None:
        decoder = Decoder()
        end = WherryError("the agent in the guest has ended", hint=_HINT)
        try:
            while data := self._stream.recv(_RECEIVE_BYTES):
                for frame in decoder.feed(data):
                    self._take(unpack(frame), frame.id)
        except _STREAM_ERRORS as error:
            end = _stream_error(error)
            end.__cause__ = error
        except WireError as error:
            end = WherryError(f"the agent in the guest broke the protocol: {error}", hint=_HINT)
            end.__cause__ = error
        finally:
            # Also after a mistake in a callback: nobody may be left waiting.
            self._finish(end)

    def _take(self, message: Message, id: int) -> None:
        if id == 0:
            if isinstance(message, HealthReport):
                self._on_health(_health(message))
                return
            if isinstance(message, SyncChanged):
                self._on_changed(message.root)
                return
            if isinstance(message, Failure):
                raise WireError(f"it says {_printable(message.message)}")
            raise WireError(f"{type(message).__name__} answers nothing")
        with self._state:
            if id > self._last_id:
                raise WireError(f"{type(message).__name__} answers a request never made")
            if id not in self._waiting:
                return  # The reply to a request that has timed out is nobody's.
            kind, future = self._waiting[id]
            # A request stays in the table until it is answered, to fail with the session.
            if not isinstance(message, (kind, Failure)):
                raise WireError(f"{type(message).__name__} instead of {kind.__name__}")
            del self._waiting[id]
        future.set_result(message)

    def _finish(self, end: WherryError, *, tell: bool = True) -> None:
        with self._state:
            if self._end is not None:
                return
            self._end = end
            waiting = list(self._waiting.values())
            self._waiting.clear()
        for _, future in waiting:
            cut_off = _CutOff(end.message, hint=end.hint)
            cut_off.__cause__ = end
            future.set_exception(cut_off)
        self._stream.close()
        if tell:
            self._lost(end)


class _CutOff(WherryError):
    """The session ended after the request was sent and before it was answered."""


def _stream_error(error: Exception) -> WherryError:
    return WherryError(f"the connection to the agent was lost: {error}", hint=_HINT)


def _health(report: HealthReport) -> Health:
    return Health(
        clock_offset_s=report.time_s - time.time(),
        uptime_s=report.uptime_s,
        load=report.load,
        memory_total_bytes=report.memory_total_bytes,
        memory_available_bytes=report.memory_available_bytes,
        data_total_bytes=report.data_total_bytes,
        data_available_bytes=report.data_available_bytes,
        engine_version=_printable(report.engine_version),
        engine_problem=_printable(report.engine_problem),
    )


def _printable(text: str) -> str:
    """Return text from the guest without what would steer a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text[:500])
