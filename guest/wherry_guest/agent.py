"""What the agent answers, and its start and end."""

from __future__ import annotations

import _thread
import os
import sys
import time

from wherry_guest import engine, network, sockets, system
from wherry_guest.session import Session
from wherry_wire import PROTOCOL
from wherry_wire.frames import WireError
from wherry_wire.messages import (
    ClockReport,
    ClockSet,
    DatagramsListen,
    DatagramsListening,
    Done,
    EngineReport,
    EngineSet,
    HealthReport,
    HealthRequest,
    HealthWatch,
    Hello,
    HelloReply,
    ListenersReport,
    ListenersRequest,
    NetworkSet,
    PortsHold,
    PowerOff,
    SyncListen,
    SyncListening,
    Trim,
    TrimReport,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from wherry_guest.datagrams import Datagrams
    from wherry_guest.sync import Roots


class Agent:
    """The requests that are about the guest as a whole."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._hello: Hello | None = None
        self._reporting = _thread.allocate_lock()
        self._roots: Roots | None = None
        self._datagrams: Datagrams | None = None
        self._held = sockets.Held()
        self.leads_names = 0
        """The host's port that queries of names go to; 0 if they do not."""
        self.finish: Callable[[], None] = lambda: None
        """Called at the end of the session, for what must not be left half done."""
        session.answer(Hello, self.hello)
        session.answer(HealthRequest, self.health, slow=True)
        session.answer(HealthWatch, self.watch)
        session.answer(ClockSet, self.set_clock)
        session.answer(Trim, self.trim, slow=True)
        session.answer(NetworkSet, self.set_network, slow=True)
        session.answer(ListenersRequest, self.listeners, slow=True)
        session.answer(EngineSet, self.set_engine, slow=True)
        session.answer(PortsHold, self.hold_ports)
        session.answer(PowerOff, self.power_off, slow=True)
        session.answer(SyncListen, self.listen)
        session.answer(DatagramsListen, self.listen_datagrams)

    @property
    def _settings(self) -> Hello:
        if self._hello is None:
            raise OSError("hello has to come first")
        return self._hello

    def hello(self, request: Hello) -> HelloReply:
        """Take the host's settings; after this all other requests can be answered."""
        self._hello = request
        return HelloReply(
            protocol=PROTOCOL,
            # Python puts a zipapp, and our bootstrap likewise, at the head of the path.
            agent=os.path.basename(sys.path[0]),
            boot_id=system.boot_id(),
        )

    def health(self, request: HealthRequest) -> HealthReport:
        """Say how the guest and its engine are."""
        version, problem = "", "not asked"
        if request.engine_timeout_s > 0:
            try:
                version = engine.ping(self._settings.engine_socket, request.engine_timeout_s)
                problem = ""
            except OSError as error:
                problem = str(error) or type(error).__name__
        memory_total, memory_available = system.memory()
        data_total, data_available = system.space(self._settings.data_path)
        return HealthReport(
            uptime_s=system.uptime_s(),
            load=system.load(),
            memory_total_bytes=memory_total,
            memory_available_bytes=memory_available,
            data_total_bytes=data_total,
            data_available_bytes=data_available,
            engine_version=version,
            engine_problem=problem,
            # Last, because the host takes it for the time at which the report was sent.
            time_s=time.time(),
        )

    def watch(self, request: HealthWatch) -> Done:
        """Report the guest's health every so often from now on, or no longer."""
        question = HealthRequest(engine_timeout_s=request.engine_timeout_s)

        def report() -> None:
            try:
                self._session.send(self.health(question), 0)
            finally:
                self._reporting.release()

        def tick() -> None:
            if self._reporting.acquire(False):
                _thread.start_new_thread(report, ())

        self._session.every(request.interval_s, tick if request.interval_s > 0 else None)
        return Done()

    def set_clock(self, request: ClockSet) -> ClockReport:
        """Correct the clock if it is off by more than the threshold."""
        offset_s = time.time() - request.time_s
        corrected = abs(offset_s) > request.threshold_s
        if corrected:
            system.set_clock(request.time_s)
        return ClockReport(offset_s=offset_s, corrected=corrected)

    def trim(self, request: Trim) -> TrimReport:
        """Discard the data disk's free blocks."""
        return TrimReport(trimmed_bytes=system.trim(self._settings.data_path))

    def listeners(self, request: ListenersRequest) -> ListenersReport:
        """Say what host-network containers listen on."""
        found = sockets.listeners(request.containers.split())
        lines = [f"{id} {protocol} {address} {port}" for id, protocol, address, port in found]
        return ListenersReport(listeners="\n".join(lines))

    def hold_ports(self, request: PortsHold) -> Done:
        """Have ports in use that are in use on the host."""
        lines = [line.split(" ") for line in request.ports.splitlines()]
        self._held.hold({(protocol, int(port)) for protocol, port in lines})
        return Done()

    def set_network(self, request: NetworkSet) -> Done:
        """Set what leads to the host."""
        network.allow_host(request.host_open)
        if request.names_port:
            # Noted first: at the end it is undone, however far it came.
            self.leads_names = request.names_port
            network.lead_names(request.names_port)
        return Done()

    def set_engine(self, request: EngineSet) -> EngineReport:
        """Have the engine work with other settings."""
        # Rarely needed, and what is imported at the start makes it slower.
        from wherry_guest import engine_settings

        self.finish = engine_settings.finish
        try:
            applied, note = engine_settings.change(
                request.settings, request.live, self._settings.engine_socket
            )
        except engine_settings.Refused as error:
            return EngineReport(applied=False, refused=str(error), note="")
        return EngineReport(applied=applied, refused="", note=note)

    def listen(self, request: SyncListen) -> SyncListening:
        """Be ready for the connections of synchronised roots."""
        if self._roots is None:
            # Not before there is something to synchronise: it costs memory and a second.
            from wherry_guest.sync import Roots

            self._roots = Roots(self._session.send)
        return self._roots.listen(request)

    def listen_datagrams(self, request: DatagramsListen) -> DatagramsListening:
        """Be ready for the connections of UDP ports."""
        if self._datagrams is None:
            from wherry_guest.datagrams import Datagrams

            self._datagrams = Datagrams()
        return self._datagrams.listen(request)

    def power_off(self, request: PowerOff) -> Done:
        """Begin to shut the guest down."""
        system.power_off()
        return Done()


def main() -> int:
    """Serve one session on standard input and output; return the exit status."""
    # A stray print, or a program that we start, must not get between the frames.
    source, sink = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    session = Session(source, sink)
    agent = Agent(session)
    try:
        session.run()
    except WireError as error:
        print(f"wherry agent: {error}", file=sys.stderr)
        return 1
    finally:
        if agent.leads_names:
            network.lead_names_back(agent.leads_names)
        agent.finish()
    return 0
