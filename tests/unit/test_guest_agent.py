"""Who keeps an agent in the guest: one at a time, and another when one fails."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from wherry.core.errors import WherryError
from wherry.service import guest
from wherry.service.guest import Guest

WAIT_S = 10.0


class Agent:
    """Sets the clock so many times, then it is late."""

    def __init__(self, good_for: int) -> None:
        self.good_for = good_for
        self.closed = threading.Event()
        self.open: list[bool] = []

    def set_network(self, names_port: int, *, host_open: bool) -> None:
        self.open.append(host_open)

    def sync_clock(self, threshold_s: float) -> float:
        self.good_for -= 1
        if self.good_for < 0:
            raise WherryError("the agent in the guest did not answer in time")
        return 0.0

    def close(self) -> None:
        self.closed.set()


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(guest, "_CLOCK_S", 0.001)
    monkeypatch.setattr(guest, "_FIRST_DELAY_S", 0.001)
    made = Guest(None)  # type: ignore[arg-type]
    yield made
    made.close()


def test_an_agent_that_is_late_or_does_not_start_is_replaced(
    kept: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the guest's clock is looked at again and again: the host may sleep."""
    agents: list[Agent | None] = [None, Agent(3), None, Agent(1 << 30)]
    row, last = iter(agents), threading.Event()

    def connect(ended: threading.Event) -> Any:
        found = next(row)
        if found is agents[-1]:
            last.set()
        return found

    monkeypatch.setattr(kept, "_connect", connect)
    kept.start()
    kept.start()  # as when a connection comes while it starts
    assert last.wait(WAIT_S)
    assert agents[1] is not None
    assert agents[1].good_for == -1
    assert agents[1].closed.is_set()
    kept.close()
    assert agents[-1] is not None
    assert agents[-1].closed.is_set()


@pytest.mark.parametrize("is_open", [True, False])
def test_when_the_engine_has_started_the_way_to_the_host_is_closed_again(
    kept: Guest, is_open: bool
) -> None:
    agent = Agent(0)
    kept.host_open, kept._agent = is_open, agent  # type: ignore[assignment]
    kept.settle()
    assert agent.open == ([] if is_open else [False])


def test_a_machine_without_an_agent_is_not_waited_for_without_end(
    kept: Guest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(guest, "_COMES_S", 0.01)
    kept.settle()
    assert "containers do not know this computer's names yet" in caplog.text


def test_a_new_connection_ends_the_pause_before_another_try(
    kept: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest, "_FIRST_DELAY_S", 3600.0)
    tried, again = threading.Event(), threading.Event()

    def connect(ended: threading.Event) -> None:
        (again if tried.is_set() else tried).set()

    monkeypatch.setattr(kept, "_connect", connect)
    kept.start()
    assert tried.wait(WAIT_S)
    for _ in range(1000):  # it may not have begun to wait when this is told
        kept.reconnected()
        if again.wait(0.01):
            break
    assert again.is_set()
