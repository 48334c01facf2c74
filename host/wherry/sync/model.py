"""What a session is about, where it keeps what it knows, and how it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from wherry.sync.core.reconcile import Problem
from wherry.sync.core.transfer import Transfer
from wherry.sync.remote import Place


@dataclass(frozen=True)
class Root:
    """What is kept equal.

    :ivar number: in the store.
    :ivar path: on the host: a directory, or a file if :attr:`place` is ``single``.
    """

    number: int
    path: Path
    place: Place


def id_of(number: int) -> str:
    """Return the id by which the guest knows the root of a number."""
    return f"r{number}"


@dataclass(frozen=True)
class Paths:
    """Where a session keeps what it knows.

    :ivar state: a directory of its own.
    :ivar database: which all roots of a machine share.
    """

    state: Path
    database: Path


@dataclass
class Status:
    """How a root is; a copy that does not change.

    :ivar state: connecting, scanning, sending, watching, halted, disconnected. It is scanning in
        the first round after it was connected, and sending while any carries something over.
    :ivar bytes_moved: contents that were sent or received since the session began.
    :ivar problems: paths that are not equal on both sides, and why.
    :ivar transfer: what is being carried over now.
    """

    root: Root
    state: str
    reason: str = ""
    rounds: int = 0
    bytes_moved: int = 0
    problems: list[Problem] = field(default_factory=list)
    conflicts: int = 0
    watch_problem: str = ""
    transfer: Transfer | None = None
