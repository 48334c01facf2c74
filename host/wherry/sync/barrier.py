"""The wait that makes both sides of roots equal before something goes on.

Why a barrier holds. :meth:`Session.ask` takes a number; the thread looks at the last number
before the scans of a round begin, and a round answers all numbers up to that one. So both scans
begin after the barrier was asked for, and

* the host's scan looks at every file's status if it has to be ``fresh``, whatever a watch has
  seen or lost: what a finished system call had done before the question is in what it reads.
  Where the system queues a change's event within the system call, as Linux does, the watch is
  *exact* and it is enough to look where it points, and where files are that have another name:
  a write by a name outside of the root makes no event in it;
* the guest's scan looks where the guest's watch saw changes. The kernel puts an event into the
  watch's queue within the system call that it is about, and the agent empties the queue when the
  scan begins; a queue that ran over makes it a full scan.

Then the differences are applied, and the barrier's answer comes after the last operation's
result. Where something moved away under a round, up to three more rounds follow. A halted root
and a lost connection fail the barrier, and so does a path that the round leaves unequal, by name:
one that could not be written or read, whose name the host cannot have, or that changed on the
host under all of these rounds. A file that is written over in the guest under all of them is left
to later ones: whoever goes on writing is not who waits. What was appended to a file meanwhile is
not missed: what it had before came.

Nor does it wait without a bound. A round is finite: so is what is on either side when its scans
begin, and a file that does not hold still is read three times and left to the next round. Who waits
is told of a failure when the session has made no progress for a minute, or when the guest has been
at work on the same path for ten, by that path's name if it has one; the session goes on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from wherry.core.errors import WherryError
from wherry.sync.core.reconcile import GUEST, HOST

if TYPE_CHECKING:
    from wherry.sync.core.cycle import Outcome
    from wherry.sync.session import Session

STALL_S = 60.0
"""How long a synchronisation that somebody waits for may make no progress."""

BUSY_STALL_S = 600.0
"""How long the guest may be at work on one path, or on what has none, while somebody waits: a file
of 36 GB is read in that time in emulation. One that is written all the time is read again and
again."""

_SLICE_S = 1.0
_TRIES = 5
"""As often as roots around each other may begin one after the other while somebody waits."""


class Ticket:
    """One barrier: :attr:`done` is set when it holds, or when it failed."""

    def __init__(self, number: int, fresh: bool) -> None:
        self.number = number
        self.fresh = fresh
        self.asked_at = time.monotonic()
        self.done = threading.Event()
        self.tried = False
        self._error: WherryError | None = None
        self._sides: tuple[WherryError | None, WherryError | None] = (None, None)

    def answer(self, root: Path, outcome: Outcome) -> None:
        """Let whoever waits go on after a round: it may lack something all the same.

        :param root: on the host.
        """
        self._sides = (failure(root, outcome, HOST), failure(root, outcome, GUEST))
        self.done.set()

    def finish(self, error: WherryError | None) -> None:
        """Let whoever waits go on; with nothing certain, if there is an error."""
        self._error = error
        self.done.set()

    def check(self, side: int | None = None) -> None:
        """Return when the barrier held.

        :param side: the one that has to have all that the other one had; None for both.
        :raises WherryError: it did not; the message names the path.
        """
        sides = self._sides if side is None else (self._sides[side],)
        for error in (self._error, *sides):
            if error is not None:
                raise WherryError(error.message, hint=error.hint) from error


def failure(root: Path, outcome: Outcome, wanted: int | None = None) -> WherryError | None:
    """Return why a side, or any, has not all that the other one has after a round.

    :param root: on the host.
    """
    if outcome.halt is not None:
        side, halt = outcome.halt
        where = root if side == HOST else f"the copy of {root} in the guest"
        return WherryError(
            f"the synchronisation of {root} is halted: {where}: {halt.value}",
            hint=f"bring it back, or: wherry sync remove {root}",
        )
    for side in (HOST, GUEST) if wanted is None else (wanted,):
        for problem in outcome.lacked_by(side):
            where = "on this computer" if side == HOST else "in the guest"
            return WherryError(
                f"{root / problem.path} cannot be brought up to date {where}: {problem.reason}",
                hint="see: wherry sync status",
            )
    return None


def hold(
    sessions: Iterable[Session],
    *,
    fresh: bool,
    side: int | None = None,
    wait: Callable[[threading.Event, float], bool] = threading.Event.wait,
) -> None:
    """Wait for a barrier of each session, all at once.

    :param fresh: see :meth:`Session.ask <wherry.sync.session.Session.ask>`.
    :param side: the one that has to have all that the other one had; None for both.
    :param wait: waits for an event for some seconds, and tells whether it was set.
    :raises WherryError: one does not hold, or makes no progress.
    """
    asked = [(session, session.ask(fresh=fresh)) for session in dict.fromkeys(sessions)]
    for session, ticket in asked:
        while not wait(ticket.done, _SLICE_S):
            # While nobody asked it had no reason to make any. And others who ask meanwhile are
            # no progress, or they would keep each other waiting for ever.
            waited_s = time.monotonic() - ticket.asked_at
            if min(session.idle_s, waited_s) > STALL_S or (
                min(session.busy_s, waited_s) > BUSY_STALL_S
            ):
                raise WherryError(
                    f"the synchronisation of {session.root.path} makes no progress{session.where}",
                    hint="see: wherry sync status",
                )
        ticket.check(side)


def hold_required(
    require: Callable[[], Iterable[Session]],
    *,
    fresh: bool,
    side: int | None = None,
    wait: Callable[[threading.Event, float], bool] = threading.Event.wait,
) -> None:
    """Likewise, of those that have some paths; of others, once a root around them begins.

    That takes their place, for another container perhaps that is made at the same time.

    :param require: returns those that have the paths now.
    :raises WherryError: one does not hold, makes no progress, or cannot be had.
    """
    for tries_left in reversed(range(_TRIES)):
        sessions = list(require())
        try:
            hold(sessions, fresh=fresh, side=side, wait=wait)
        except WherryError:
            if not tries_left or not any(session.is_closed for session in sessions):
                raise
        else:
            return
