"""The host's end of the session, against streams that fail in every way."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import pytest

from wherry.core.errors import TunnelError, WherryError
from wherry.service.agent import AgentClient, Health
from wherry.service.agent_bundle import AgentBundle
from wherry_wire.messages import Done, Failure, HealthReport, Message, TrimReport, pack

BUNDLE = AgentBundle("agent-0.pyz", b"zipapp")
WAIT_S = 10.0
REPORT = HealthReport(
    time_s=0,
    uptime_s=1,
    load=0.5,
    memory_total_bytes=4,
    memory_available_bytes=3,
    data_total_bytes=2,
    data_available_bytes=1,
    engine_version="28\x1b[31m",
    engine_problem="",
)


class Wire:
    """A stream whose other end is the test."""

    def __init__(self, *, broken: bool = False) -> None:
        self.sent: queue.Queue[bytes] = queue.Queue()
        self.broken = broken
        self.closed = threading.Event()
        self._incoming: queue.Queue[bytes | Exception] = queue.Queue()

    def recv(self, size: int, /) -> bytes:
        arrived = self._incoming.get()
        if isinstance(arrived, Exception):
            raise arrived
        return arrived

    def sendall(self, data: bytes, /) -> None:
        if self.broken:
            raise TunnelError("the connection to the guest was lost")
        self.sent.put(data)

    def close(self) -> None:
        self.closed.set()
        self._incoming.put(TunnelError("the stream was closed"))

    def arrives(self, what: bytes | Exception) -> None:
        self._incoming.put(what)

    def answers(self, message: Message, id: int = 1) -> None:
        """Answer the first request once it is there."""
        assert self.sent.get(timeout=WAIT_S) == BUNDLE.data
        self.sent.get(timeout=WAIT_S)
        self.arrives(pack(message, id))


class Caller:
    """One call in a thread of its own."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self.error: WherryError | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except WherryError as error:
            self.error = error

    def result(self) -> WherryError | None:
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        return self.error


def test_a_lost_tunnel_fails_all_that_wait_and_is_told_once() -> None:
    wire = Wire()
    lost: queue.Queue[WherryError] = queue.Queue()
    client = AgentClient(wire, BUNDLE, lost=lost.put)
    callers = [Caller(client.health), Caller(client.fstrim), Caller(client.hello)]
    for _ in range(4):
        wire.sent.get(timeout=WAIT_S)
    wire.arrives(TunnelError("the connection to the guest was lost"))
    for caller in callers:
        assert "agent was lost: the connection to the guest was lost" in str(caller.result())
    assert "was lost" in lost.get(timeout=WAIT_S).message
    assert wire.closed.is_set()
    client.close()
    assert lost.empty()


def test_a_stream_that_takes_nothing_ends_the_session() -> None:
    wire = Wire()
    lost: queue.Queue[WherryError] = queue.Queue()
    client = AgentClient(wire, BUNDLE, lost=lost.put)
    wire.broken = True
    with pytest.raises(WherryError, match="connection to the agent was lost"):
        client.health()
    lost.get(timeout=WAIT_S)
    client.close()


def test_a_stream_broken_from_the_start_is_closed() -> None:
    wire = Wire(broken=True)
    with pytest.raises(WherryError, match="connection to the agent was lost"):
        AgentClient(wire, BUNDLE)
    assert wire.closed.is_set()


def test_closing_wakes_those_who_wait_and_is_not_a_loss() -> None:
    wire = Wire()
    lost: list[WherryError] = []
    client = AgentClient(wire, BUNDLE, lost=lost.append)
    caller = Caller(client.fstrim)
    for _ in range(2):
        wire.sent.get(timeout=WAIT_S)
    client.close()
    client.close()
    assert "was closed" in str(caller.result())
    assert lost == []


def test_poweroff_cut_off_counts_but_poweroff_never_asked_for_does_not() -> None:
    wire = Wire()
    client = AgentClient(wire, BUNDLE)
    caller = Caller(client.poweroff)
    for _ in range(2):
        wire.sent.get(timeout=WAIT_S)
    wire.arrives(b"")
    assert caller.result() is None
    with pytest.raises(WherryError, match="agent in the guest has ended"):
        client.poweroff()
    client.close()

    wire = Wire()
    client = AgentClient(wire, BUNDLE)
    wire.broken = True
    with pytest.raises(WherryError, match="connection to the agent was lost"):
        client.poweroff()
    client.close()


def test_a_reply_of_another_kind_fails_its_request_at_once() -> None:
    wire = Wire()
    client = AgentClient(wire, BUNDLE)
    caller = Caller(client.fstrim)
    wire.answers(Done())
    assert "broke the protocol: Done instead of TrimReport" in str(caller.result())
    client.close()


def test_what_the_guest_says_cannot_steer_a_terminal() -> None:
    wire = Wire()
    client = AgentClient(wire, BUNDLE)
    caller = Caller(client.fstrim)
    wire.answers(Failure(message="no\x1b[2J\nroom" + "x" * 10_000))
    error = caller.result()
    assert error is not None
    assert error.message.startswith("the agent in the guest failed: no?[2J?roomxxx")
    assert len(error.message) < 600
    client.close()


def test_replies_find_their_requests_in_any_order() -> None:
    wire = Wire()
    client = AgentClient(wire, BUNDLE)
    results: dict[int, int] = {}

    def ask(n: int) -> Callable[[], None]:
        def call() -> None:
            results[n] = client.fstrim()

        return call

    callers = []
    wire.sent.get(timeout=WAIT_S)
    for n in (1, 2, 3):
        callers.append(Caller(ask(n)))
        wire.sent.get(timeout=WAIT_S)
    wire.arrives(b"".join(pack(TrimReport(trimmed_bytes=n * 10), n) for n in (3, 1, 2)))
    assert [caller.result() for caller in callers] == [None] * 3
    assert results == {1: 10, 2: 20, 3: 30}
    client.close()


def test_reports_reach_the_callback() -> None:
    wire = Wire()
    reports: queue.Queue[Health] = queue.Queue()
    client = AgentClient(wire, BUNDLE, on_health=reports.put)
    wire.arrives(pack(REPORT, 0))
    health = reports.get(timeout=WAIT_S)
    assert (health.load, health.memory_total_bytes, health.data_available_bytes) == (0.5, 4, 1)
    assert health.engine_version == "28?[31m"
    assert health.engine_ready
    assert health.clock_offset_s < -1e9
    client.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_mistake_in_a_callback_leaves_nobody_waiting() -> None:
    def mistake(health: Health) -> None:
        raise ZeroDivisionError

    wire = Wire()
    client = AgentClient(wire, BUNDLE, on_health=mistake)
    caller = Caller(client.fstrim)
    wire.answers(REPORT, 0)
    assert caller.result() is not None
    client.close()


def test_the_session_can_be_closed_from_its_callbacks() -> None:
    wire = Wire()
    closed = threading.Event()

    def close(what: object) -> None:
        client.close()
        closed.set()

    client = AgentClient(wire, BUNDLE, on_health=close, lost=close)
    wire.arrives(pack(REPORT, 0))
    assert closed.wait(WAIT_S)
    client.close()
