"""One change of one path, and what came of it.

An operation names what must be there (``before``) and what shall be (``after``), both without
children. It is carried out only where ``before`` holds at that moment; where ``after`` holds
already it is done, so repeating it is harmless.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from wherry_sync.entry import Entry

DONE, STALE, FAILED = "done", "stale", "failed"


class Stale(Exception):
    """Something else than expected is at the path."""


class Operation:
    """A change.

    :param path: from the root.
    :param before: what must be at the path; None for nothing.
    :param after: what shall be there. A directory that shall vanish but still holds
        something, untracked or new, is left as it is, and that counts as done; unless it is
        what was to be removed before.
    :param in_place: whether a file shall rather be written over than replaced by another one,
        as programs that watch this one file want it.
    """

    __slots__ = ("after", "before", "in_place", "path")

    def __init__(
        self, path: str, before: Entry | None, after: Entry | None, *, in_place: bool = False
    ) -> None:
        self.path = path
        self.before = before
        self.after = after
        self.in_place = in_place

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Operation):
            return NotImplemented
        mine, its = (self.path, self.before, self.after), (other.path, other.before, other.after)
        return mine == its

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Operation({self.path!r}, {self.before!r} -> {self.after!r})"


class Arrival:
    """Contents that come while operations are carried out, in the operations' order.

    :ivar number: of the operation that they are for.
    :ivar mtime_ns: time of modification that the file gets.
    :ivar start: so many bytes, all that the file has, stay; only what comes after them comes.
        Zero for a file that does not begin with its old contents, None where that is unknown.
    """

    __slots__ = ("chunks", "mtime_ns", "number", "start")

    def __init__(
        self, number: int, mtime_ns: int, chunks: Iterable[bytes], start: int | None = None
    ) -> None:
        self.number = number
        self.mtime_ns = mtime_ns
        self.chunks = chunks
        self.start = start


class Result:
    """What came of an operation.

    :ivar status: DONE; STALE if something else than ``before`` was there, so that the next
        scan has to decide anew; FAILED if the system refused it.
    :ivar reason: of a failure, for people.
    """

    __slots__ = ("operation", "reason", "status")

    def __init__(self, operation: Operation, status: str, reason: str = "") -> None:
        self.operation = operation
        self.status = status
        self.reason = reason

    def __repr__(self) -> str:
        return f"Result({self.operation.path!r}, {self.status}, {self.reason!r})"
