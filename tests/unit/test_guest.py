"""What the service has an agent do for as long as it is there."""

from __future__ import annotations

import threading
from typing import Any, cast

import pytest

from wherry.core.errors import WherryError
from wherry.service import guest
from wherry.service.guest import Guest


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
