"""Whether what a scan found may be believed at all.

A tree that is not there, because a disk was not mounted or a folder was moved away, looks like
one in which everything was deleted. Then nothing is done to the other side and the root is
halted with a reason, until its user says what happened.
"""

from __future__ import annotations

import enum

from wherry_sync.entry import Directory, Entry, is_untracked


class Halt(enum.Enum):
    """Why a root is halted; the value is for people."""

    VANISHED = "it is not there any more"
    KIND = "it was a directory and is a file now, or the other way round"
    EMPTIED = "all that was in it is gone"
    DEVICE = "it is on another disk than before"
    REPLACED = "another directory is in its place, with nothing of what was in it"


def check(
    ancestor: Entry | None,
    found: Entry | None,
    *,
    device: int,
    known_device: int | None,
    rebooted: bool,
    replaced: bool,
    may_empty: bool,
) -> Halt | None:
    """Return why one side's tree must not be believed, or None if it may.

    :param ancestor: what both sides had last.
    :param found: what the scan of this side gave.
    :param device: that it is on, and ``known_device`` that it was on before.
    :param rebooted: whether that was in another boot. The numbers of btrfs, NFS, NVMe and device
        mapper are given anew in each, so another one halts only a tree that has nothing in
        common with the one before, as what is below a disk that was not mounted.
    :param replaced: whether the root is another directory than before, by its inode. It is all
        the same where it has something of what was in it, as after ``mv src old`` and ``git
        clone`` to ``src``: then the difference is an edit.
    :param may_empty: whether this side may lose all of several children at once. A container
        may do that, for the files go to the host's trash; that a person on the host meant it
        cannot be told from a disk that is not mounted. The only child may go, as by ``rm -r``: it
        is the same directory on the same disk still, and what was changed in the guest stays.
    """
    if ancestor is None:
        return None
    if found is None:
        return Halt.VANISHED
    if known_device not in (None, device) and not (rebooted and _is_like(ancestor, found)):
        return Halt.DEVICE
    if isinstance(ancestor, Directory) != isinstance(found, Directory):
        return Halt.KIND
    if isinstance(ancestor, Directory) and isinstance(found, Directory):
        left = any(not is_untracked(child) for child in found.children.values())
        if len(ancestor.children) >= 2 and not left and not may_empty:
            return Halt.EMPTIED
    if replaced and not _is_like(ancestor, found):
        return Halt.REPLACED
    return None


def _is_like(ancestor: Entry, found: Entry) -> bool:
    """Whether one tree may be the other one after some changes."""
    if not isinstance(ancestor, Directory) or not isinstance(found, Directory):
        return True
    there = (found.children.get(name) for name in ancestor.children)
    return not ancestor.children or any(
        child is not None and not is_untracked(child) for child in there
    )
