"""What the service has an agent do for as long as it is there."""

from __future__ import annotations

import json
import threading
from typing import Any, cast

import pytest
from click.testing import CliRunner

from wherry.cli.status import status
from wherry.config.layout import Layout, MachinePaths
from wherry.core.errors import WherryError
from wherry.service import guest
from wherry.service.agent import Health
from wherry.service.guest import Guest
from wherry.service.state import Record, State
from wherry.service.status import describe


class Agent:
    def __init__(self, ended: threading.Event) -> None:
        self.clocks = 0
        self.trims = 0
        self._ended = ended

    def sync_clock(self, threshold_s: float) -> float:
        self.clocks += 1
        return 0.0

    def fstrim(self) -> int:
        self.trims += 1
        if self.trims == 1:
            raise WherryError("the disk cannot")
        self._ended.set()
        return 0


def test_it_is_told_when_an_agent_has_ended_and_before_there_is_another() -> None:
    """Which tells nothing of roots until these are opened anew."""
    said: list[str] = []

    class Ends(Guest):
        def _connect(self, ended: threading.Event) -> Any:
            said.append("connect")
            if "told" in said:
                self._closed = True
                return None
            ended.set()
            return Closes()

    class Closes:
        def close(self) -> None:
            said.append("closed")

    Ends(cast(Any, None), agent_ended=lambda: said.append("told"))._keep()
    assert said == ["connect", "closed", "told", "connect"]


def test_the_disk_s_free_space_is_given_back_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That it cannot be is no reason for another agent."""
    monkeypatch.setattr(guest, "_CLOCK_S", 0.001)
    monkeypatch.setattr(guest, "_TRIM_S", 0.02)
    ended = threading.Event()
    agent = Agent(ended)
    Guest(cast(Any, None))._look_after(cast(Any, agent), ended)
    assert agent.trims == 2
    assert agent.clocks > agent.trims


MISSING = "[Errno 2] No such file or directory"


@pytest.mark.parametrize(
    ("told", "health", "problem", "line"),
    [
        ("", "healthy", "", "28.5.2, healthy"),
        (MISSING, "unhealthy", MISSING, f"28.5.2, unhealthy ({MISSING})"),
        ("timed out", "unhealthy", "timed out", "28.5.2, unhealthy (timed out)"),
        (
            WherryError("the agent is lost"),
            None,
            "the agent is lost",
            "28.5.2, health not known (the agent is lost)",
        ),
    ],
)
def test_status_tells_whether_the_engine_is_healthy(
    told: str | WherryError,
    health: str | None,
    problem: str,
    line: str,
    layout: Layout,
    paths: MachinePaths,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ask(*, engine_timeout_s: float, timeout_s: float) -> Health:
        assert (engine_timeout_s, timeout_s) == (2, 3)
        if isinstance(told, WherryError):
            raise told
        return Health(0.0, 1.0, 0.5, 4, 3, 2, 1, "" if told else "28.5.2", told)

    keeper = Guest(cast(Any, None))
    keeper._agent = cast(Any, type("Agent", (), {"health": staticmethod(ask)}))
    fields = describe(layout, paths, Record(State.RUNNING), engine_version="28.5.2")
    assert (fields["engine_health"], fields["engine_problem"]) == (None, "")
    fields |= keeper.describe(3, 2)
    assert (fields["guest"] is None) == isinstance(told, WherryError)
    monkeypatch.setattr("wherry.cli.status.layout", lambda: layout)
    monkeypatch.setattr("wherry.control.client.call", lambda *args, **kwargs: fields)
    paths.config.touch()
    shown = CliRunner().invoke(status, ["default"], catch_exceptions=False).output
    assert f"Engine:      {line}\n" in shown
    given = CliRunner().invoke(status, ["default", "--json"], catch_exceptions=False).output
    assert json.loads(given)["engine_health"] == health
    assert json.loads(given)["engine_problem"] == problem


def test_an_agent_that_is_not_there_tells_no_health() -> None:
    found = Guest(cast(Any, None)).describe(3, 2)
    assert found["engine_health"] is None
    assert found["engine_problem"] == "the agent in the guest is not running yet"
