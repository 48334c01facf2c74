"""When the disks are flushed, by a clock of the test's own."""

from __future__ import annotations

from typing import cast

import pytest

from wherry.sync import flushing
from wherry.sync.core.cycle import Cycle
from wherry.sync.flushing import Flushing


class Clock:
    """Stands for the module ``time``."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Disks:
    """A cycle's flushes; it notes what it is asked."""

    met = True
    done = False

    def __init__(self) -> None:
        self.calls: list[str] = []

    def begin_flush(self) -> None:
        self.calls.append("begin")

    def flushed(self) -> bool:
        self.calls.append("ask")
        return self.done


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(flushing, "time", found)
    return found


class Steps:
    """A :class:`Flushing` with its clock and its disks."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.disks = Disks()
        self.flushing = Flushing()

    def after(self, seconds: float, *, calm: bool = True) -> bool:
        self.clock.now += seconds
        return self.flushing.step(cast(Cycle, self.disks), calm=calm)


def test_once_it_is_calm(clock: Clock) -> None:
    steps = Steps(clock)
    assert steps.flushing.step_at == 0
    assert not steps.after(100)
    steps.flushing.changed()
    assert not steps.after(3)
    steps.flushing.changed()
    assert steps.flushing.step_at == clock.now + 2
    assert not steps.after(2)
    assert (steps.disks.calls, steps.flushing.step_at) == (["begin"], clock.now + 1)
    # Asked now and then, however often there is a round.
    for _ in range(10):
        assert not steps.after(0.5)
    assert steps.disks.calls == ["begin", *["ask"] * 5]
    steps.disks.done = True
    assert steps.after(1)
    assert steps.flushing.is_idle


def test_in_the_end_though_it_never_is(clock: Clock) -> None:
    steps = Steps(clock)
    for _ in range(30):
        steps.flushing.changed()
        assert not steps.disks.calls
        steps.after(1, calm=False)
    assert steps.disks.calls == ["begin"]


def test_what_changed_meanwhile_is_flushed_too(clock: Clock) -> None:
    steps = Steps(clock)
    steps.flushing.changed()
    steps.after(5)
    steps.flushing.changed()
    steps.disks.done = True
    assert steps.after(1)
    assert not steps.flushing.is_idle
    steps.after(4)
    assert steps.disks.calls == ["begin", "ask", "begin"]


def test_what_was_lost_is_begun_anew(clock: Clock) -> None:
    steps = Steps(clock)
    steps.flushing.lost()
    assert steps.flushing.is_idle
    steps.flushing.changed()
    steps.after(5)
    steps.flushing.lost()
    assert not steps.flushing.is_idle
    steps.after(5)
    assert steps.disks.calls == ["begin", "begin"]


def test_not_while_the_root_is_halted(clock: Clock) -> None:
    steps = Steps(clock)
    steps.disks.met = False
    steps.flushing.changed()
    steps.after(5)
    assert (steps.disks.calls, steps.flushing.is_idle) == ([], True)
