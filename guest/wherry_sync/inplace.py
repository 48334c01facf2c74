"""Changing a file's contents without replacing the file.

Needed where the inode is what somebody holds: a single file that is itself mounted, a file
with several hard links where all of these may be ours, and a file that only grew, for ``tail -f``
reads on in what it opened. Wanted where a file was saved so: who watches that one file, as
``node --watch`` does, hears nothing of another one that takes its place.

While that goes on, somebody may give the name to another file, or to none. What was written is not
there then, so it does not count: see :class:`Moved`.

Not atomic, so the stage's journal has it before the first byte is written, and
:meth:`~wherry_sync.replace.Replacer.finish_in_place` finishes it after a crash. A torn file is
therefore never taken for somebody's edit: see :func:`is_torn`.
"""

from __future__ import annotations

import errno
import os

from wherry_sync import handles, hashing, kernel
from wherry_sync.operation import Stale

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from wherry_sync.entry import Leaf
    from wherry_sync.stage import Stage

_STEP_BYTES = 1 << 20
_OLD_BYTES = 1 << 20
"""Of a file's old contents, that the journal has while it is written over."""


class Moved(Stale):
    """What has the name is not what was written to; that was written as a whole."""


def old_contents(fd: int, name: str, before: Leaf) -> bytes:
    """Return what a file has before it is written over, for the journal; nothing if it is much."""
    if before.size > _OLD_BYTES:
        return b""
    try:
        descriptor = handles.open_regular(fd, name)
    except OSError:
        # Whoever writes it finds out why.
        return b""
    try:
        return os.pread(descriptor, before.size, 0)
    finally:
        os.close(descriptor)


def is_torn(fd: int, name: str, stage: Stage, before: Leaf, after: Leaf, old: bytes) -> bool:
    """Whether a file is what a write in place that was interrupted has left, and nothing else.

    It begins as the new contents do, and goes on as the old ones, with zeros behind where space
    was reserved. Nobody has written to it since, but who wrote just that.

    :param old: what it had, as :func:`old_contents` said; nothing is known by it if it is not
        ``before``.
    :raises OSError: it cannot be read.
    """
    if len(old) != before.size or hashing.digest(old) != before.digest:
        old = b""
    target = handles.open_regular(fd, name)
    try:
        if not before.size <= os.fstat(target).st_size <= max(before.size, after.size):
            return False
        source = stage.open_contents(after)
        try:
            position = _common(target, source)
        finally:
            os.close(source)
        if position < before.size and not old:
            return False
        while data := os.pread(target, _STEP_BYTES, position):
            if data != old[position : position + len(data)].ljust(len(data), b"\0"):
                return False
            position += len(data)
        return True
    finally:
        os.close(target)


def _common(one: int, other: int) -> int:
    """Return how many bytes two files begin with that are the same."""
    position = 0
    while True:
        pieces = [os.pread(each, _STEP_BYTES, position) for each in (one, other)]
        pairs = enumerate(zip(*pieces, strict=False))
        same = next((at for at, (a, b) in pairs if a != b), min(map(len, pieces)))
        position += same
        if not same or any(len(piece) > same for piece in pieces):
            return position


def start(stage: Stage, before: Leaf, after: Leaf) -> int:
    """Return how many bytes may stay because the new contents begin with all the old ones.

    Zero if they do not; a pure append is what this is about.
    """
    if not 0 < before.size < after.size:
        return 0
    digest, size = stage.grown.get(after.digest, (b"", 0))
    if digest == before.digest:
        return size
    contents = stage.open_contents(after)
    try:
        digest, _ = hashing.read_digest(contents, before.size)
    finally:
        os.close(contents)
    return before.size if digest == before.digest else 0


def rewrite(
    fd: int,
    name: str,
    stage: Stage,
    after: Leaf,
    start: int,
    checkpoint: Callable[[str], None],
    expected: os.stat_result | None = None,
) -> int:
    """Write the staged contents over a file, from ``start`` on.

    :param expected: what the file's status must be when it is open; it is the last check.
    :returns: the time of modification that it has then, in ns.
    :raises Moved: the file was written and has that name no longer.
    :raises Stale: it is not; nothing was written.
    :raises OSError: it cannot be written.
    """
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    target = os.open(name, flags, dir_fd=fd)
    try:
        status = os.fstat(target)
        if expected is not None and _changed(status, expected):
            raise Stale("it was written at the last moment")
        source = stage.open_contents(after)
        try:
            _reserve(target, status.st_size, after.size)
            mtime_ns = _write(target, status.st_size, source, after, start, checkpoint)
        finally:
            os.close(source)
        _check_name(fd, name, status)
        return mtime_ns
    finally:
        os.close(target)


class InUse(Exception):
    """A file is not for us alone; nothing was written."""


def rewrite_alone(
    fd: int, name: str, stage: Stage, before: Leaf, after: Leaf, checkpoint: Callable[[str], None]
) -> int:
    """Likewise, but only if nobody else has the file open, or opens it meanwhile.

    So no write of somebody else's is lost, and nobody reads half of it.

    :raises InUse: somebody has, or it cannot be done for any other reason.
    :raises Moved: the file was written and has that name no longer.
    :raises Stale: it is not ``before`` any more; nothing was written.
    :raises OSError: it cannot be written, in the midst.
    """
    try:
        # What fails is done in the other way: a program that runs, say, can be replaced, but not
        # written over (ETXTBSY).
        target = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=fd)
    except OSError as error:
        raise InUse from error
    try:
        try:
            if not kernel.claim(target):
                raise InUse
            status = os.fstat(target)
            size = status.st_size
            found = hashing.read_digest(target, before.size)
            if size != before.size or found != (before.digest, before.size):
                raise Stale("it was written at the last moment")
            source = stage.open_contents(after)
        except OSError as error:
            raise InUse from error
        try:
            # That has taken a moment, however long.
            if not kernel.is_claimed(target):
                raise InUse
            try:
                _reserve(target, size, after.size)
            except OSError as error:
                raise InUse from error
            mtime_ns = _write(target, size, source, after, 0, checkpoint)
        finally:
            os.close(source)
        _check_name(fd, name, status)
        return mtime_ns
    finally:
        os.close(target)


def _write(
    target: int, size: int, source: int, after: Leaf, start: int, checkpoint: Callable[[str], None]
) -> int:
    position = start
    while data := os.pread(source, _STEP_BYTES, position):
        handles.write_at(target, data, position)
        position += len(data)
        checkpoint("written in place")
    if size > after.size:
        os.ftruncate(target, after.size)
    checkpoint("truncated")
    mtime_ns = os.fstat(source).st_mtime_ns
    os.utime(target, ns=(mtime_ns, mtime_ns))
    return mtime_ns


def append(fd: int, name: str, tail: bytes, mtime_ns: int, expected: os.stat_result) -> None:
    """Write something to a file's end.

    What somebody else appends at the same moment is not overwritten; both are in the file then.

    :param expected: what the file's status must be when it is open; it is the last check.
    :raises Moved: the file was written and has that name no longer.
    :raises Stale: it is not, or the file is longer now than it should be.
    :raises OSError: it cannot be written.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    target = os.open(name, flags, dir_fd=fd)
    try:
        status = os.fstat(target)
        if _changed(status, expected):
            raise Stale("it was written at the last moment")
        done = 0
        try:
            while done < len(tail):
                done += os.write(target, tail[done:] if done else tail)
        except OSError:
            # The disk is full, say: as it was before.
            if os.fstat(target).st_size == status.st_size + done:
                os.ftruncate(target, status.st_size)
            raise
        if os.fstat(target).st_size != status.st_size + done:
            raise Stale("it was written at the last moment")
        os.utime(target, ns=(mtime_ns, mtime_ns))
        _check_name(fd, name, status)
    finally:
        os.close(target)


def appended(fd: int, name: str, before: Leaf, limit: int) -> bytes | None:
    """Return what a file has behind the contents that it had before, or None if it lacks these.

    :param limit: bytes to return at most.
    :raises OSError: it cannot be read.
    """
    descriptor = handles.open_regular(fd, name)
    try:
        if hashing.read_digest(descriptor, before.size) != (before.digest, before.size):
            return None
        return os.pread(descriptor, limit, before.size)
    finally:
        os.close(descriptor)


def finish_append(fd: int, name: str, before: Leaf, tail: bytes) -> None:
    """Write what was to be appended to a file, and nothing after that."""
    target = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=fd)
    try:
        handles.write_at(target, tail, before.size)
        os.ftruncate(target, before.size + len(tail))
    finally:
        os.close(target)


def _changed(status: os.stat_result, expected: os.stat_result) -> bool:
    return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns) != (
        expected.st_ino,
        expected.st_size,
        expected.st_mtime_ns,
        expected.st_ctime_ns,
    )


def _check_name(fd: int, name: str, written: os.stat_result) -> None:
    """Find out whether what was written to still has its name.

    :raises Moved: it has not.
    """
    found = handles.status(fd, name)
    if found is None or not os.path.samestat(found, written):
        raise Moved("it was replaced or removed while it was written")


def _reserve(target: int, size: int, wanted: int) -> None:
    """Have the space before the old contents are touched, where the filesystem can do that.

    :raises OSError: there is none; the file is as it was.
    """
    if wanted <= size:
        return
    try:
        os.posix_fallocate(target, size, wanted - size)
    except (AttributeError, OSError) as error:
        os.ftruncate(target, size)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise


def copy(fd: int, name: str, to_fd: int, to_name: str) -> None:
    """Copy a regular file's contents into a new file.

    :raises OSError: it cannot be read, or the copy not written.
    """
    source = handles.open_regular(fd, name)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        target = os.open(to_name, flags, 0o600, dir_fd=to_fd)
        try:
            while data := os.read(source, _STEP_BYTES):
                handles.write_all(target, data)
        finally:
            os.close(target)
    finally:
        os.close(source)
