"""One round: scan both sides, decide, transfer, apply, remember.

:meth:`Cycle.run` can be stopped at any point by any means and run again, by a new process too;
it goes on from what is on the two sides and in the store. The order is what makes that so:

1. Both sides are scanned.
2. What was rescued on either side is kept, then forgotten there. A root that cannot be believed
   ends the round.
3. After a loss of power the ancestor is changed (:mod:`recover`), once.
4. What is withheld is sifted out (:mod:`withhold`). All paths decided on are pending, on the disk.
5. What a conflict would overwrite is kept, on the disk. Contents are staged.
6. Both sides carry out their operations.
7. The ancestor takes the results of what both sides have done.

A path whose contents moved away under way is left out and comes up again in the next round.
"""

from __future__ import annotations

from collections.abc import (
    Callable,
    Collection,
    Container,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field

from wherry.sync.core import safety
from wherry.sync.core.keep import Keep
from wherry.sync.core.plan import ALONG_BYTES, SidePlan, Want, needs, parts, plan
from wherry.sync.core.reconcile import (
    GUEST,
    HOST,
    Agreement,
    Decision,
    Problem,
    Reconciliation,
    reconcile,
)
from wherry.sync.core.recover import recover, resume
from wherry.sync.core.store import Store
from wherry.sync.core.traits import Traits
from wherry.sync.core.transfer import Transfer
from wherry.sync.core.withhold import Withholding
from wherry.sync.endpoint import Endpoint
from wherry_sync import blocks
from wherry_sync.apply import no_fault
from wherry_sync.build import needed
from wherry_sync.diff import diff, shallow
from wherry_sync.entry import FILE, Entry, Leaf, is_file, lookup, share, updated
from wherry_sync.operation import DONE, FAILED, Arrival, Operation, Result
from wherry_sync.scan import Snapshot
from wherry_sync.stage import Gone

_WORTH = 0.75
"""Of the blocks of a file; if more of them have changed, all of it is sent."""

_CHANGED = "it changed meanwhile"

_BUILT_AT_ONCE = 2000
"""Each takes a kilobyte at either end until it is placed; each part takes a round trip."""

_LOCAL_AT_ONCE = 2000
"""Contents that a side takes from itself; each list of them is in memory at both ends, and takes
a round trip."""

_SAVED_AT_ONCE = 32
"""Files that people and their editors save; more at once is a program's work, for which the way
that is faster is right."""


@dataclass(slots=True)
class Outcome:
    """What a round came to.

    :ivar changed: whether anything was done, on either side or in the ancestor.
    :ivar conflicts: paths at which the guest's version was kept aside.
    :ivar problems: paths that are not equal on both sides now, and why.
    :ivar failed: paths at which a side refused what had to be done, and why.
    :ivar requeue: paths that changed under way: another round is due.
    :ivar late: those of them at which nothing was done.
    :ivar stuck: those that changed under way in each round since somebody asked.
    :ivar halt: why nothing was done, and on which side.
    """

    changed: bool = False
    conflicts: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    failed: list[Problem] = field(default_factory=list)
    requeue: set[str] = field(default_factory=set)
    stuck: set[str] = field(default_factory=set)
    late: list[Problem] = field(default_factory=list)
    halt: tuple[int, safety.Halt] | None = None

    @property
    def quiescent(self) -> bool:
        """Whether both sides are equal, but for the problems."""
        return not self.changed and not self.requeue and self.halt is None

    @property
    def unequal(self) -> list[Problem]:
        """All paths that are not equal on both sides now, those that were refused first."""
        return [*self.failed, *self.late, *self.problems]

    def lacked_by(self, side: int) -> Iterator[Problem]:
        """Yield the paths that a side has not as the other one has them, and for good.

        What somebody in the guest has written over meanwhile, as a database does all the time,
        is left to later rounds: a command that wrote something else must not fail for that. Nor
        must one for what was changed on the host, unless that went on in each round: else it
        came later than the command, as a file does that a compiler makes and removes.
        """
        late = self.requeue if side == HOST else self.requeue - self.stuck
        yield from (each for each in self.failed if side in each.lacking)
        for problem in (*self.late, *self.problems):
            if side in problem.lacking and problem.path not in late:
                yield problem

    def put_off(self, path: str, *lacking: int) -> None:
        """Take note that a path has changed under way."""
        self.requeue.add(path)
        self.stuck.add(path)
        self.late.append(Problem(path, _CHANGED, lacking))


class Cycle:
    """Keeps two endpoints equal. One thread at a time.

    :param conflicts: where the guest's versions go, and what is rescued.
    :param traits: of the host.
    :param checkpoint: called between any two steps that change something.
    """

    def __init__(
        self,
        host: Endpoint,
        guest: Endpoint,
        store: Store,
        conflicts: Keep,
        traits: Traits | None = None,
        checkpoint: Callable[[str], None] = no_fault,
    ) -> None:
        self._ends = (host, guest)
        self._store = store
        self._conflicts = conflicts
        self._traits = traits or Traits()
        self._checkpoint = checkpoint
        self._agreement = Agreement()
        self._ancestor = store.load()
        self._met = False
        self._flushed = 0
        # On the host, and not yet in the guest.
        self._saved_in_place: set[str] = set()
        # What was kept for conflicts that are not carried out yet.
        self._saved: dict[str, Leaf] = {}
        self._withholding = Withholding(store, guest)
        self.writes = True
        """Whether a container may write in the guest: see :mod:`withhold`."""
        self.first = False
        """Whether none may have done so before."""
        self.transfer: Transfer | None = None
        """What is being carried over, while a round does that."""

    def run(
        self,
        *,
        dirty: tuple[Collection[str] | None, Collection[str] | None] = (None, None),
    ) -> Outcome:
        """Do one round.

        :param dirty: for the scan of each side.
        :raises OSError: a side cannot be reached or its disk fails; run again later.
        """
        outcome = Outcome()
        host = self._ends[HOST].scan(dirty[HOST])
        guest = self._ends[GUEST].scan(dirty[GUEST], like=host.root)
        self._collect_rescued()
        outcome.requeue = host.requeue | guest.requeue
        outcome.stuck = set(outcome.requeue)
        self._saved_in_place |= host.written_over
        outcome.halt = self._meet(host, guest)
        if outcome.halt is not None:
            return outcome
        found = reconcile(self._ancestor, host.root, guest.root, self._traits, self._agreement)
        writes = self.writes
        self._withholding.sift(found, self._ancestor, guest.root, writes=writes, first=self.first)
        outcome.problems = found.problems
        if not writes and not guest.requeue and _owes_nothing(found):
            self._withholding.rest()
        self._saved_in_place.intersection_update(each.path for each in found.decisions)
        if self._saved:
            now = {each.path: each.saved for each in found.decisions}
            self._saved = {path: leaf for path, leaf in self._saved.items() if now.get(path)}
        if not found.decisions and not found.ancestor:
            return outcome
        _follow(found.decisions, self._saved_in_place)
        outcome.changed = True
        self._begin(found.decisions, found.ancestor)
        decisions = [decision for decision in found.decisions if self._save(decision, outcome)]
        changes = dict(found.ancestor)
        done = self._carry_out(decisions, outcome)
        self._withholding.carried(
            each.path for each in decisions if each.guest and each.path in done
        )
        self._saved_in_place.difference_update(done)
        for path in done.keys() & self._saved.keys():
            del self._saved[path]
        changes.update(done)
        new = updated(self._ancestor, changes)
        self._store.commit(diff(self._ancestor, new))
        self._ancestor = share(new, host.root)
        return outcome

    @property
    def met(self) -> bool:
        """Whether a round has found out what power was lost before this began."""
        return self._met

    def flush(self, side: int) -> None:
        """Have all that is done so far on a side's disk, and remember that it is."""
        ticket = self._store.ticket()
        self._ends[side].flush()
        self._store.confirm(side, ticket)

    def begin_flush(self) -> None:
        """Begin that on both sides. Between two rounds; more of them may come meanwhile."""
        self._flushed = self._store.ticket()
        for end in self._ends:
            end.begin_flush()

    def flushed(self) -> bool:
        """Whether what :meth:`begin_flush` began is done; remember that it is.

        :raises OSError: a side cannot be reached, or its disk has failed.
        """
        # Both are asked, as each tells of its failure once.
        if not all([end.flushed() for end in self._ends]):
            return False
        for side in (HOST, GUEST):
            self._store.confirm(side, self._flushed)
        return True

    def _collect_rescued(self) -> None:
        for end in self._ends:
            for rescued in end.rescued():
                if rescued.leaf.kind == FILE:
                    chunks: Iterable[bytes] = end.read_rescued(rescued.name)
                else:
                    chunks = ()
                if self._conflicts.save(rescued.path, rescued.leaf, chunks):
                    self._checkpoint("rescued")
                    end.forget_rescued(rescued.name)

    def _meet(self, host: Snapshot, guest: Snapshot) -> tuple[int, safety.Halt] | None:
        """Find out whether the two trees can be believed, and what power was lost."""
        store = self._store
        boots = (self._ends[HOST].boot, self._ends[GUEST].boot)
        lost = [not self._met and store.boot(side) not in ("", boots[side]) for side in (0, 1)]
        changes: dict[str, Entry | None] = {}
        if any(lost):
            changes = recover(
                self._ancestor,
                host.root,
                guest.root,
                host_lost=store.pending(HOST) if lost[HOST] else None,
                guest_lost=store.pending(GUEST) if lost[GUEST] else None,
            )
        elif not self._met:
            changes = resume(self._ancestor, host.root, guest.root, store.carried())
        ancestor = updated(self._ancestor, changes) if changes else self._ancestor
        for side, snapshot in enumerate((host, guest)):
            known_device, device_boot = store.device(side)
            known_inode = store.inode(side)
            halt = safety.check(
                ancestor,
                snapshot.root,
                device=snapshot.device,
                known_device=known_device,
                rebooted=device_boot != boots[side],
                replaced=bool(snapshot.inode) and known_inode not in (None, snapshot.inode),
                may_empty=side == GUEST,
            )
            if halt is not None:
                return side, halt
        if not self._met:
            if host.root is not None and guest.root is not None:
                if lost[HOST]:
                    self._withholding.owe()
                devices = (host.device, guest.device)
                store.meet(boots, devices, diff(self._ancestor, ancestor))
                self._met = True
            self._ancestor = share(ancestor, host.root)
        for side, snapshot in enumerate((host, guest)):
            if self._met and snapshot.inode and snapshot.inode != store.inode(side):
                store.identify(side, snapshot.inode)
        return None

    def _begin(self, decisions: Iterable[Decision], agreed: Mapping[str, Entry | None]) -> None:
        """Make all paths pending at which anything shall change, on a side or in the ancestor."""
        wanted = {decision.path: decision.result for decision in decisions}
        changes = {**wanted, **diff(self._ancestor, updated(self._ancestor, {**agreed, **wanted}))}
        origins = {
            decision.path: HOST if decision.host is None else GUEST
            for decision in decisions
            if (decision.host is None) != (decision.guest is None)
        }
        self._store.begin(
            {
                path: (shallow(lookup(self._ancestor, path)), entry)
                for path, entry in changes.items()
            },
            origins,
        )

    def _save(self, decision: Decision, outcome: Outcome) -> bool:
        """Keep what a conflict overwrites; False if it has changed already."""
        saved = decision.saved
        if saved is None:
            return True
        chunks: Iterable[bytes] = ()
        before = self._saved.get(decision.path)
        try:
            if saved.kind == FILE:
                # Not a part of it, if it grows: each round would keep another one.
                chunks = self._ends[GUEST].read(decision.path)[1]
            kept = self._conflicts.save(decision.path, saved, chunks, again=before == saved)
        except Gone:
            kept = False
        if kept:
            if before is not None and before != saved:
                # Nothing was overwritten by us: who wrote that has gone on with it.
                self._conflicts.drop(decision.path, before)
            self._saved[decision.path] = saved
            self._checkpoint("saved")
            outcome.conflicts.append(decision.path)
        else:
            outcome.put_off(decision.path, HOST)
        return kept

    def _carry_out(self, decisions: list[Decision], outcome: Outcome) -> dict[str, Entry | None]:
        """Transfer and apply; return the ancestor's changes for what both sides have done."""
        plans = (
            plan(decisions, lambda decision: decision.host),
            plan(decisions, lambda decision: decision.guest),
        )
        sizes = [leaf.size for todo in plans for leaf in todo.contents()]
        self.transfer = Transfer(len(sizes), sum(sizes))
        try:
            undone = self._carry(plans, outcome)
        finally:
            self.transfer = None
        return {
            decision.path: decision.result for decision in decisions if decision.path not in undone
        }

    def _carry(self, plans: tuple[SidePlan, SidePlan], outcome: Outcome) -> set[str]:
        """Transfer and apply; return the paths at which that was not done."""
        undone: set[str] = set()
        for side in (HOST, GUEST):
            undone |= self._transfer(side, plans[side], outcome)
        for side in (HOST, GUEST):
            undone |= self._note(side, self._apply(side, plans[side], undone), outcome)
        for side in (HOST, GUEST):
            undone |= self._note(side, self._build(side, plans[side].builds), outcome)
        return undone

    def _apply(self, side: int, todo: SidePlan, undone: Container[str]) -> Iterable[Result]:
        """Have one side carry out operations, while the other one sends what is sent along."""
        operations = [found for found in todo.operations if found.path not in undone]
        if not operations:
            return ()
        numbers: dict[bytes, int] = {}
        wanted = []
        for number, operation in enumerate(operations):
            digest = needs(operation)
            if digest in todo.along:
                after = operation.after
                assert isinstance(after, Leaf)
                numbers[digest] = number
                wanted.append((operation.path, after))
        contents = (
            Arrival(numbers[leaf.digest], mtime_ns, chunks)
            for leaf, mtime_ns, chunks in self._watched(self._ends[1 - side], wanted)
        )
        return self._ends[side].apply(operations, contents if wanted else ())

    def _transfer(self, side: int, todo: SidePlan, outcome: Outcome) -> set[str]:
        """Stage what one side needs; return the paths for which that was not possible."""
        end, other = self._ends[side], self._ends[1 - side]
        wants = {want.leaf.digest: want for want in todo.wants}
        if not wants:
            return set()
        missing = [wants[leaf.digest] for leaf in end.missing(want.leaf for want in todo.wants)]
        local = self._transfer_local(side, missing)
        wanted: list[tuple[str, Leaf]] = []
        for want in missing:
            if want.leaf.digest in local:
                continue
            self._checkpoint("transfer")
            if not self._transfer_blocks(side, want):
                wanted.append((want.path, want.leaf))
        if not wanted:
            return set()
        taken = end.stage_all(self._watched(other, wanted))
        absent = {leaf.digest for _, leaf in wanted} - taken
        if not absent:
            return set()
        paths = {operation.path for operation in todo.operations if needs(operation) in absent}
        for path in sorted(paths):
            outcome.put_off(path, side)
        return paths

    def _transfer_local(self, side: int, wants: Iterable[Want]) -> set[bytes]:
        """Stage what one side has at other paths; return the digests for which that was so."""
        paths = [(want.local, want.leaf) for want in wants if want.local is not None]
        taken: set[bytes] = set()
        for start in range(0, len(paths), _LOCAL_AT_ONCE):
            self._checkpoint("transfer")
            taken |= self._ends[side].stage_local(paths[start : start + _LOCAL_AT_ONCE])
        return taken

    def _transfer_blocks(self, side: int, want: Want) -> bool:
        """Stage what one side needs by those blocks that it has not; False if that failed."""
        end, other = self._ends[side], self._ends[1 - side]
        leaf, base = want.leaf, want.base
        if base is None or min(leaf.size, base.size) < blocks.LEAST_BYTES:
            return False
        # Who sends has read the old version too, if it had it before.
        old = other.recall(base) or end.sums(want.path, base)
        new = other.sums(want.path, leaf) if old else b""
        numbers = blocks.changed(old, new)
        if not new or len(numbers) > _WORTH * blocks.count(leaf.size):
            return False
        try:
            mtime_ns, chunks = other.read_blocks(want.path, leaf, numbers)
        except Gone:
            return False
        assert self.transfer is not None
        self.transfer.begin(want.path)
        self._checkpoint("transfer")
        done = end.stage_blocks(leaf, want.path, base, numbers, mtime_ns, chunks)
        if done:
            self.transfer.end(leaf.size)
        return done

    def _watched(
        self, end: Endpoint, wanted: Sequence[tuple[str, Leaf]]
    ) -> Iterator[tuple[Leaf, int, Iterable[bytes]]]:
        """Yield contents that one side reads."""
        assert self.transfer is not None
        for leaf, mtime_ns, chunks in self.transfer.watch(wanted, end.read_all(wanted)):
            self._checkpoint("transfer")
            yield leaf, mtime_ns, _first(chunks, leaf.size)

    def _build(self, side: int, operations: Sequence[Operation]) -> Iterator[Result]:
        """Have one side make what is new, in parts."""
        for some in parts(operations, _BUILT_AT_ONCE):
            yield from self._build_some(side, some)

    def _build_some(self, side: int, operations: Sequence[Operation]) -> Iterable[Result]:
        """Have one side make what is new, while the other one sends it."""
        wanted = []
        numbers: dict[int, int] = {}
        for number in needed(operations):
            after = operations[number].after
            assert isinstance(after, Leaf)
            # By identity: several files may be alike.
            own = Leaf(after)
            numbers[id(own)] = number
            wanted.append((operations[number].path, own))
        contents = (
            (numbers[id(leaf)], mtime_ns, chunks)
            for leaf, mtime_ns, chunks in self._watched(self._ends[1 - side], wanted)
        )
        return self._ends[side].build(operations, contents)

    def _note(self, side: int, results: Iterable[Result], outcome: Outcome) -> set[str]:
        undone: set[str] = set()
        for result in results:
            path = result.operation.path
            if result.status != DONE:
                undone.add(path)
                if result.status == FAILED:
                    outcome.failed.append(Problem(path, result.reason, (side,)))
                elif side == GUEST and path in self._saved:
                    # Somebody there goes on writing to what the host's version shall replace.
                    outcome.put_off(path)
                else:
                    outcome.put_off(path, side)
        return undone


def _owes_nothing(found: Reconciliation) -> bool:
    """Whether nothing is to come to the host, nor would if it could."""
    return all(each.host is None for each in found.decisions) and not any(
        HOST in each.lacking for each in found.problems
    )


def _first(chunks: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Yield a file's first bytes: what is appended to a log meanwhile is the next round's."""
    for chunk in chunks:
        yield chunk[:size]
        size -= len(chunk)
        if size <= 0:
            return


def _follow(decisions: Iterable[Decision], saved_in_place: Container[str]) -> None:
    """Have files that were saved in place on the host be written in place in the guest.

    Who opens them waits for that, so only small ones; and no programs, as one that is executed at
    that moment would fail with ETXTBSY.
    """
    saved = [
        operation
        for decision in decisions
        if (operation := decision.guest) is not None
        and decision.path in saved_in_place
        and _is_small_data(operation.before)
        and _is_small_data(operation.after)
    ]
    if len(saved) <= _SAVED_AT_ONCE:
        for operation in saved:
            operation.in_place = True


def _is_small_data(entry: Entry | None) -> bool:
    return (
        isinstance(entry, Leaf)
        and is_file(entry)
        and entry.size <= ALONG_BYTES
        and not entry.executable
    )
