"""One root, kept equal by a thread of its own.

The thread does rounds of :class:`~wherry.sync.core.cycle.Cycle`: when a watch saw something, when
somebody needs a *barrier* (:mod:`wherry.sync.barrier`), and now and then all the same.

The disk: rounds do not wait for it. What was applied is pending in the store until both disks
were flushed, which the thread does when things have calmed down.
"""

from __future__ import annotations

import concurrent.futures
import logging
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import closing
from dataclasses import replace
from typing import Any, TypeVar

from wherry.core.errors import WherryError
from wherry.platform import current
from wherry.sync.barrier import Ticket, failure
from wherry.sync.conflicts import DIRECTORY, Conflicts
from wherry.sync.core.cycle import Cycle, Outcome
from wherry.sync.core.keep import Keep
from wherry.sync.core.reconcile import GUEST, HOST
from wherry.sync.core.store import Store
from wherry.sync.core.traits import Traits
from wherry.sync.flushing import Flushing
from wherry.sync.model import Paths, Root, Status, id_of
from wherry.sync.progress import Progress
from wherry.sync.remote import Place, RemoteEndpoint
from wherry.sync.watch import HostWatch
from wherry_sync.apply import Policy
from wherry_sync.local import LocalEndpoint

log = logging.getLogger(__name__)

_TRIES = 3
_SETTLE_S = 0.01
_CHECK_S = 900.0
_POLL_S = 5.0
"""How often everything is looked at where the host's changes cannot be watched."""

_UNSETTLED_S = 10.0
"""How soon it is tried again what could not be done, as nothing tells when it can: a program has
closed a file, or there is room on a disk."""

_REWATCH_S = 30.0
# While very much changes, as in an installation in a container, rounds that nobody waits for take
# half of the time at most, so that they do not hold up what they follow.
_SHORT_S = 0.25
_LONGEST_REST_S = 2.0
_RETRY_S = (0.2, 1.0, 5.0)
_JOIN_S = 30.0
_CALL_S = 30.0
_TRASH_BYTES = 1 << 30
_TRASH_FILES = 10_000

_ORDERED = "ended in order"

T = TypeVar("T")
Connect = Callable[[Place, bool, Callable[[int], None]], RemoteEndpoint]


class Session:
    """Keeps one root equal until it is closed.

    :param connect: opens a connection to the guest's end: told the place, whether it was
        parted from in order, and what to call with the bytes moved.
    :param boot: id of this boot of the host.
    :param pins: see :meth:`pin`; these hold in the first round, which may replace them else.
    :param writes: whether changes in the guest come to the host; see :meth:`allow_writes`.
    :param first: see there.
    """

    def __init__(
        self,
        root: Root,
        paths: Paths,
        connect: Connect,
        *,
        boot: str,
        traits: Traits | None = None,
        pins: Iterable[str] = (),
        writes: bool = False,
        first: bool = False,
    ) -> None:
        self.root = root
        self._paths = paths
        self._stage = paths.state / "stage"
        self._connect = connect
        self._boot = boot
        self._traits = traits
        self._lock = threading.Condition()
        self._closing = self._closed = False
        self._gone = f"{root.path} is not synchronised any more"
        self._tickets: list[Ticket] = []
        self._number = 0
        self._host_changed = False
        self._guest_changed = False
        self._follow_up = False
        self._progress = Progress()
        self._status = Status(root, "connecting")
        self._remote: RemoteEndpoint | None = None
        self._cycle: Cycle | None = None
        self._watch: HostWatch | None = None
        self._watched_at = 0.0
        self._rested_at = 0.0
        self._flushing = Flushing()
        self._missed = False
        # Whether there was a round since the guest was connected.
        self._looked = False
        self._unsettled = False
        self._checked_at = 0.0
        self._ended_at = 0.0
        self._failures = 0
        self._mounted = False
        self._writes = writes
        self._first = first
        # When somebody needed that last.
        self._allowed_at = time.monotonic()
        self._conflicts = Conflicts(root.path)
        # Whether the guest's end knows it.
        self._pins = dict.fromkeys(pins, False)
        self._calls: list[tuple[Callable[[Keep], Any], concurrent.futures.Future[Any]]] = []
        self._thread = threading.Thread(target=self._run, name=f"sync {root.path}", daemon=True)
        self._thread.start()

    def ask(self, *, fresh: bool) -> Ticket:
        """Ask for a barrier; wait for the ticket's event.

        :param fresh: whether changes on the host up to now have to be in the guest.
            Changes in the guest up to now are always on the host afterwards.
        """
        with self._lock:
            self._number += 1
            ticket = Ticket(self._number, fresh)
            if self._closing:
                ticket.finish(WherryError(self._gone))
            else:
                self._tickets.append(ticket)
                self._lock.notify()
        return ticket

    def pin(self, path: str) -> None:
        """Have a file of the root rewritten in place in the guest, from the next round on."""
        with self._lock:
            self._pins.setdefault(path, False)

    def allow_writes(self, *, first: bool = False) -> None:
        """Bring changes in the guest to the host from now on: not all mounts are read-only.

        :param first: whether the container for whose sake this is has not written yet, nor any
            other one since the root was written; see :mod:`wherry.sync.core.withhold`.
        """
        with self._lock:
            self._allowed_at = time.monotonic()
            self._first = first and (self._first or not self._writes)
            if not self._writes:
                self._writes = True
                self._guest_changed = True
                self._lock.notify()

    def forbid_writes(self, idle_s: float) -> None:
        """Leave changes in the guest there once all up to now are on the host.

        :param idle_s: not if somebody needed them so shortly ago.
        """
        with self._lock:
            if self._writes and time.monotonic() - self._allowed_at >= idle_s:
                self._writes = False
                self._guest_changed = True
                self._lock.notify()

    @property
    def writes(self) -> bool:
        """Whether changes in the guest come to the host: see :meth:`allow_writes`."""
        return self._writes

    def guest_changed(self) -> None:
        """Learn that the guest's watch has seen something."""
        with self._lock:
            self._guest_changed = True
            self._lock.notify()

    def do(self, function: Callable[[Keep], T]) -> T:
        """Call a function with the files that conflicts left, in the session's thread.

        :raises WherryError: the session has ended, or it does not come to it in time.
        """
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        with self._lock:
            if self._closing:
                raise WherryError(self._gone)
            self._calls.append((function, future))
            self._lock.notify()
        try:
            found: T = future.result(_CALL_S)
        except TimeoutError as error:
            raise WherryError(f"the synchronisation of {self.root.path} is busy") from error
        return found

    def disconnect(self) -> None:
        """Learn that the tunnel was lost or is new; another connection is made."""
        remote = self._remote
        if remote is not None:
            remote.close()
        # Nothing else may happen for long, and what the guest has changed meanwhile has to come.
        self.guest_changed()

    def status(self) -> Status:
        """Return how the root is."""
        cycle = self._cycle
        transfer = cycle.transfer if cycle is not None else None
        with self._lock:
            found = self._status
            copied = {name: getattr(found, name) for name in found.__dataclass_fields__}
        copied["transfer"] = replace(transfer) if transfer is not None else None
        if transfer is not None:
            copied["state"] = "sending"
        return Status(**copied)

    @property
    def is_troubled(self) -> bool:
        """Whether the next barrier may well fail."""
        return self._status.state in ("halted", "disconnected") or bool(self._status.reason)

    @property
    def is_over(self) -> bool:
        """Whether it has ended: closed, or by a failure of this computer."""
        return not self._thread.is_alive()

    @property
    def is_closed(self) -> bool:
        """Whether :meth:`close` was called: another one may have its files now."""
        return self._closed

    @property
    def conflict_count(self) -> int:
        """How many files conflicts have left, ever; for :meth:`conflicts_since`."""
        return self._conflicts.last

    def conflicts_since(self, count: int) -> list[str]:
        """Return the paths of the conflicts after so many, as far as they are not resolved."""
        return self._conflicts.since(count)

    @property
    def where(self) -> str:
        """What it is at, as the end of a sentence that says that it is stalled."""
        return self._progress.where(self.status().transfer)

    @property
    def idle_s(self) -> float:
        """Seconds since it last made progress, or the guest said that it is at work."""
        return self._progress.idle_s

    @property
    def busy_s(self) -> float:
        """Seconds since it last made progress; the guest may be at work on one path since."""
        return self._progress.busy_s

    def close(self) -> None:
        """Stop: what is not on both disks yet is flushed, with a bound; safe to call twice."""
        with self._lock:
            self._closing = self._closed = True
            self._lock.notify()
        self._thread.join(_JOIN_S)
        if self._thread.is_alive():
            # The guest does not answer: cut it off.
            self.disconnect()
            self._thread.join(_JOIN_S)

    # The thread

    def _run(self) -> None:
        try:
            self._paths.state.mkdir(mode=0o700, parents=True, exist_ok=True)
            with (
                closing(Store(self._paths.database, self.root.number)) as store,
                closing(Keep(self._paths.state / DIRECTORY)) as conflicts,
                closing(
                    Keep(
                        self._paths.state / "trash",
                        limit_bytes=_TRASH_BYTES,
                        limit_files=_TRASH_FILES,
                    )
                ) as trash,
            ):
                # Those from earlier are no news.
                self._conflicts.last = conflicts.last
                self._look_at(conflicts)
                self._serve(store, conflicts, trash)
        except Exception as error:
            log.exception("%s is not synchronised any more", self.root.path)
            with self._lock:
                self._gone = f"{self.root.path} cannot be synchronised: {error}"
                self._closing = True
        finally:
            with self._lock:
                self._closing = True
            self._fail(WherryError(self._gone))
            for _, future in self._calls:
                future.set_exception(WherryError(self._gone))
            if self._watch is not None:
                self._watch.close()
            if self._remote is not None:
                self._remote.close()

    def _serve(self, store: Store, conflicts: Keep, trash: Keep) -> None:
        host = self._open_host(store, trash)
        with closing(host):
            while self._await_work(connected=self._cycle is not None):
                if self._call(conflicts):
                    continue
                try:
                    if self._cycle is None:
                        self._cycle = self._open_guest(host, store, conflicts)
                    self._work(self._cycle, host, conflicts)
                except (OSError, WherryError) as error:
                    self._cycle = None
                    self._drop(error)
            parted = self._cycle is not None and self._part(self._cycle, host, store)
        if parted and self._stage.parent == self.root.path:
            self._remove_stage()

    def _remove_stage(self) -> None:
        """Leave nothing of ours in the user's directory; but what was rescued is not ours."""
        try:
            if {path.name for path in self._stage.iterdir()} <= {"journal"}:
                shutil.rmtree(self._stage)
        except OSError as error:
            log.warning("%s stays: %s", self._stage, error)

    def _open_host(self, store: Store, trash: Keep) -> LocalEndpoint:
        root = self.root
        stage = self._stage
        place = root.path.parent if root.place.single else root.path
        if not root.place.single and place.is_dir():
            stage.mkdir(mode=0o700, parents=True, exist_ok=True)
            if stage.stat().st_dev != place.stat().st_dev:
                # A rename does not lead from one filesystem to another.
                stage = place / ".wherry-stage"
        self._stage = stage
        return LocalEndpoint(
            str(root.path),
            str(stage),
            self._boot,
            ignore=root.place.ignore,
            policy=Policy(keep=trash.take, links_stay=False),
            checkpoint=self._progress.moved,
            progress=self._progress.moved,
            single=root.place.single or None,
            cache=str(self._paths.state / "cache"),
            trust=_ORDERED if store.boot(HOST) == "" else self._boot,
        )

    def _open_guest(self, host: LocalEndpoint, store: Store, conflicts: Keep) -> Cycle:
        self._tell("connecting")
        self._rewatch()
        ordered = store.boot(GUEST) == ""
        self._remote = remote = self._connect(self.root.place, ordered, self._on_bytes)
        remote.on_busy = self._progress.busy
        self._looked = False
        try:
            if not remote.has(id_of(number) for number in store.copies()):
                store.forget()
            return Cycle(host, remote, store, conflicts, self._traits, self._progress.moved)
        except BaseException:
            remote.close()
            raise

    def _rewatch(self) -> None:
        """Watch the host; again, now and then, if that has failed."""
        now = time.monotonic()
        if self._watch is not None:
            if not self._watch.problem or now < self._watched_at + _REWATCH_S:
                return
            self._watch.close()
        self._watch = HostWatch(self.root.path, self._on_host_change, ignore=self.root.place.ignore)
        self._watched_at = now

    def _await_work(self, *, connected: bool) -> bool:
        """Wait until there is something to do; False when there is not, ever more."""
        with self._lock:
            deadline = time.monotonic() + self._patience(connected)
            while not self._closing:
                now = time.monotonic()
                changed = connected and (
                    self._host_changed or self._guest_changed or self._follow_up
                )
                if self._tickets or (changed and now >= self._rested_at):
                    break
                if self._calls:
                    return True
                if now >= deadline and not changed:
                    return True
                self._lock.wait((self._rested_at if changed else deadline) - now)
            if self._closing:
                return False
            hurried = bool(self._tickets)
        if not hurried:
            time.sleep(_SETTLE_S)
        return True

    def _call(self, conflicts: Keep) -> bool:
        """Do what :meth:`do` was called for; whether there was anything."""
        with self._lock:
            calls, self._calls = self._calls, []
        for function, future in calls:
            try:
                future.set_result(function(conflicts))
            except BaseException as error:
                future.set_exception(error)
        if calls:
            self._look_at(conflicts)
        return bool(calls)

    def _look_at(self, conflicts: Keep) -> None:
        """Take note of what conflicts have left: files that a round has kept, too, that failed."""
        self._conflicts.update(conflicts)
        self._status.conflicts = len(self._conflicts)

    def _patience(self, connected: bool) -> float:
        if not connected:
            # A barrier does not wait for this: see _await_work.
            return 0.0 if not self._failures else _RETRY_S[min(self._failures, len(_RETRY_S)) - 1]
        due = self._round_at()
        if self._flushing.step_at:
            due = min(due, self._flushing.step_at)
        return max(0.0, due - time.monotonic())

    def _round_at(self) -> float:
        """Return when a round is due though nothing tells of a change."""
        if self._watch is not None and self._watch.problem:
            return self._ended_at + _POLL_S
        if self._unsettled:
            return self._ended_at + _UNSETTLED_S
        return self._checked_at + _CHECK_S

    def _work(self, cycle: Cycle, host: LocalEndpoint, conflicts: Keep) -> None:
        """Do what is due: rounds, or the flush after them."""
        with self._lock:
            tickets, self._tickets = self._tickets, []
            host_changed, self._host_changed = self._host_changed, False
            news = bool(tickets) or host_changed or self._guest_changed
            following = self._follow_up and not news
            guest_changed = self._guest_changed or self._follow_up
            self._guest_changed = self._follow_up = False
        first = self._status.rounds == 0
        # After a connection was lost a round comes first: nothing tells of what changed meanwhile.
        due = tickets or host_changed or guest_changed or first or not self._looked
        if not due and time.monotonic() < self._round_at():
            self._flush(cycle, host, calm=True)
            return
        self._rewatch()
        # Not all that mends what is a problem is told by an event.
        exact = self._watch is not None and self._watch.exact and not self._status.reason
        fresh = any(ticket.fresh for ticket in tickets)
        # However much happens all the time.
        check = first or time.monotonic() >= self._checked_at + _CHECK_S
        begun = time.monotonic()
        try:
            try:
                outcome = self._rounds(
                    cycle,
                    full=check or (fresh and not exact),
                    full_guest=check,
                    also=host.with_links if fresh else (),
                )
            finally:
                if conflicts.last != self._conflicts.last:
                    self._look_at(conflicts)
        except BaseException as error:
            # A connection may have been dead for long before it was used: once more, then.
            with self._lock:
                self._tickets[:0] = [ticket for ticket in tickets if not ticket.tried]
            self._finish(
                [ticket for ticket in tickets if ticket.tried],
                WherryError(f"{self.root.path} is not synchronised: {error}"),
            )
            for ticket in tickets:
                ticket.tried = True
            raise
        # Another round, now that nobody waits: it looks at what this one has changed, so that the
        # next barrier need not. One, for what cannot be done would be tried for ever.
        self._follow_up = outcome.changed and not following
        took_s = time.monotonic() - begun
        if not tickets and took_s > _SHORT_S:
            self._rested_at = time.monotonic() + min(took_s, _LONGEST_REST_S)
        self._unsettled = bool(outcome.failed or outcome.requeue)
        if check:
            self._checked_at = time.monotonic()
        self._ended_at = time.monotonic()
        self._report(outcome)
        for ticket in tickets:
            ticket.answer(self.root.path, outcome)
        self._flush(cycle, host, calm=False)

    def _rounds(
        self, cycle: Cycle, *, full: bool, full_guest: bool = False, also: Collection[str] = ()
    ) -> Outcome:
        assert self._remote is not None
        assert self._watch is not None
        first = self._status.rounds == 0
        requeued = 0
        stuck: set[str] | None = None
        for path in [path for path, known in list(self._pins.items()) if not known]:
            self._remote.pin(path)
            self._pins[path] = True
        while True:
            # Taken before the scan: what changes from here on is news again.
            seen = self._watch.take()
            dirty: Collection[str] | None = None
            if seen is not None and not (full or requeued or self._missed):
                dirty = seen.union(also)
            # What was taken from the watch is lost if the round fails before the scan.
            self._missed = True
            with self._lock:
                cycle.writes, cycle.first = self._writes, self._first
            if self._status.state == "connecting":
                # Later rounds are short, and how the last one ended says more than that.
                self._tell("scanning")
            outcome = cycle.run(dirty=(dirty, None if full_guest and not requeued else ()))
            self._missed = False
            self._looked = True
            self._status.rounds += 1
            stuck = outcome.stuck if stuck is None else stuck & outcome.stuck
            outcome.stuck = stuck
            if outcome.changed:
                self._flushing.changed()
            if outcome.halt is None and (first or not self._mounted):
                self._remote.mount()
                self._mounted = True
            if outcome.halt is not None or not outcome.requeue or requeued == _TRIES:
                return outcome
            first = False
            requeued += 1
            time.sleep(_SETTLE_S)

    def _flush(self, cycle: Cycle, host: LocalEndpoint, *, calm: bool) -> None:
        if self._flushing.step(cycle, calm=calm):
            host.save_cache(self._boot)
            current().give_memory_back()

    def _part(self, cycle: Cycle, host: LocalEndpoint, store: Store) -> bool:
        """Carry over what is left, and end in order; whether that was possible.

        Not while the root is halted: what a loss of power has done to it may not be known yet.
        That the guest ended in order only its end can tell: see :meth:`Roots.guest_ended`.
        """
        assert self._remote is not None
        try:
            if self._rounds(cycle, full=False).halt is not None or not cycle.met:
                return False
            ticket = store.ticket()
            cycle.flush(HOST)
            self._remote.part()
            store.confirm(GUEST, ticket)
            host.save_cache(_ORDERED)
            store.part(HOST, ticket)
        except (OSError, WherryError) as error:
            log.warning("%s: %s", self.root.path, error)
            return False
        return True

    def _report(self, outcome: Outcome) -> None:
        unequal = failure(self.root.path, outcome)
        with self._lock:
            status = self._status
            status.state = "halted" if outcome.halt is not None else "watching"
            status.reason = unequal.message if unequal is not None else ""
            status.problems = outcome.unequal
            status.watch_problem = (self._watch.problem or "") if self._watch is not None else ""
        if unequal is None:
            self._failures = 0

    def _drop(self, error: Exception) -> None:
        """Give the connection up; the next try is later each time."""
        had_connection = self._remote is not None
        if self._remote is not None:
            self._remote.close()
            self._remote = None
        self._mounted = False
        self._flushing.lost()
        with self._lock:
            self._pins = dict.fromkeys(self._pins, False)
        self._failures += 1
        message = str(error)
        # An outage may last.
        news = had_connection or self._failures == 1
        log.log(logging.WARNING if news else logging.DEBUG, "%s: %s", self.root.path, message)
        self._tell("disconnected", message)
        if not had_connection:
            self._fail(WherryError(f"{self.root.path} is not synchronised: {message}"))

    def _fail(self, error: WherryError) -> None:
        with self._lock:
            tickets, self._tickets = self._tickets, []
        self._finish(tickets, error)

    def _finish(self, tickets: list[Ticket], error: WherryError) -> None:
        for ticket in tickets:
            ticket.finish(error)

    def _tell(self, state: str, reason: str = "") -> None:
        with self._lock:
            self._status.state = state
            self._status.reason = reason
        self._progress.moved(state)

    def _on_bytes(self, size: int) -> None:
        self._status.bytes_moved += size
        self._progress.moved("bytes")

    def _on_host_change(self) -> None:
        with self._lock:
            self._host_changed = True
            self._lock.notify()
