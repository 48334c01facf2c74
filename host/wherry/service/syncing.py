"""What ``wherry sync`` asks of the service."""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wherry.core.bridge import in_thread
from wherry.core.errors import UsageError, WherryError
from wherry.sync import restore
from wherry.sync.barrier import hold
from wherry.sync.core.keep import Keep, Kept
from wherry.sync.core.transfer import Transfer
from wherry.sync.roots import Roots
from wherry.sync.session import Session


def handlers(
    roots: Callable[[], Roots],
) -> dict[str, Callable[[Mapping[str, Any], Any], Awaitable[Any]]]:
    """Return the control requests by name.

    :param roots: gives the running machine's, or raises WherryError.
    """

    def threaded(function: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
        def handle(params: Mapping[str, Any], emit: Any) -> Awaitable[Any]:
            return in_thread(lambda: function(roots(), **params), name=function.__name__)

        return handle

    def telling(function: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
        def handle(params: Mapping[str, Any], emit: Any) -> Awaitable[Any]:
            return in_thread(lambda: function(roots(), emit, **params), name=function.__name__)

        return handle

    return {
        "sync_list": threaded(_list),
        "sync_add": telling(_add),
        "sync_remove": threaded(_remove),
        "sync_flush": telling(_flush),
        "sync_conflicts": threaded(_conflicts),
        "sync_resolve": threaded(_resolve),
    }


def _list(roots: Roots) -> list[dict[str, Any]]:
    return [describe(session) for session in roots.all()]


def describe(session: Session) -> dict[str, Any]:
    """Return a root's state as ``wherry sync list --json`` has it."""
    status = session.status()
    return {
        "path": str(session.root.path),
        "state": status.state,
        "reason": status.reason,
        "rounds": status.rounds,
        "bytes_moved": status.bytes_moved,
        "conflicts": status.conflicts,
        "problems": [
            {"path": problem.path, "reason": problem.reason} for problem in status.problems
        ],
        "watch_problem": status.watch_problem,
        "transfer": tell(status.transfer, time.monotonic()) if status.transfer else None,
    }


def tell(transfer: Transfer, now_s: float) -> dict[str, Any]:
    """Return how far a transfer is, as ``--json`` has it."""
    return {
        "path": transfer.path,
        "files": transfer.total_files,
        "files_done": transfer.done_files,
        "bytes": transfer.total_bytes,
        "bytes_done": transfer.done_bytes,
        "bytes_per_s": transfer.rate(now_s),
        "left_s": transfer.left_s(now_s),
    }


def _hold(sessions: list[Session], emit: Callable[[dict[str, Any]], object]) -> None:
    """Wait for barriers, and tell now and then how far they are."""

    def wait(event: threading.Event, timeout_s: float) -> bool:
        if event.wait(timeout_s):
            return True
        for session in sessions:
            emit(describe(session))
        return False

    hold(sessions, fresh=True, wait=wait)


def _add(
    roots: Roots,
    emit: Callable[[dict[str, Any]], object],
    path: str,
    ignore: Sequence[str] = (),
) -> dict[str, Any]:
    if not Path(path).exists():
        raise UsageError(f"{path} does not exist")
    if ignore:
        if not Path(path).is_dir():
            raise UsageError(f"{path} is a file, of which nothing can be left out")
        roots.ignore(path, ignore)
    session = roots.require(path)
    roots.keep(str(session.root.path))
    _hold([session], emit)
    return describe(session)


def _remove(roots: Roots, path: str) -> None:
    roots.remove(path)


def _flush(
    roots: Roots, emit: Callable[[dict[str, Any]], object], path: str | None = None
) -> list[dict[str, Any]]:
    sessions = roots.all()
    if path is not None:
        session = roots.holding(path)
        if session is None:
            raise WherryError(f"{path} is not synchronised", hint="see: wherry sync list")
        sessions = [session]
    _hold(sessions, emit)
    return [describe(session) for session in sessions]


def _conflicts(roots: Roots) -> list[dict[str, Any]]:
    found = []
    for session in roots.all():
        root = session.root
        for kept in session.do(list):
            found.append(
                {
                    "id": f"{root.number}.{kept.number}",
                    "path": str(root.path / kept.path) if kept.path else str(root.path),
                    "time": kept.time_s,
                    "size": kept.leaf.size,
                }
            )
    return found


def _resolve(roots: Roots, id: str, action: str, target: str = "") -> str:
    """Do with a kept file what the user wants; return the path that was written, if any.

    :param action: ``restore`` it where it was, ``save`` it as ``target``, or ``discard`` it.
    """
    for session in roots.all():
        number = str(session.root.number)
        if id.partition(".")[0] != number:
            continue

        def act(conflicts: Keep, session: Session = session) -> str:
            for kept in conflicts:
                if id == f"{session.root.number}.{kept.number}":
                    written = _act(conflicts, kept, session, action, target)
                    conflicts.forget(kept)
                    return written
            raise WherryError(f"there is no conflict {id}", hint="see: wherry sync conflicts")

        return session.do(act)
    raise WherryError(f"there is no conflict {id}", hint="see: wherry sync conflicts")


def _act(conflicts: Keep, kept: Kept, session: Session, action: str, target: str) -> str:
    if action == "discard":
        return ""
    if action == "save":
        return str(restore.save(conflicts, kept, Path(target)))
    return str(restore.restore(conflicts, kept, session.root.path))
