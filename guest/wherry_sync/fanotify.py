"""What has changed in trees of this machine, told by the Linux kernel (fanotify(7)).

One mark covers a whole filesystem, so there is no watch for each directory, no limit on them,
and no moment in which a new directory has no watch yet. An event names the directory, by its
file handle, and the name in it (``FAN_REPORT_DFID_NAME``, Linux 5.9). Needs CAP_SYS_ADMIN and
CAP_DAC_READ_SEARCH.

**What a drain is good for.** Let a process have ended, and :meth:`Watch.drain` be called
after that was seen: by wait(2), by a pidfd, or by whoever waited and says so. Then all that the
process did to a tree is in that drain's result or an earlier one's:

* The kernel queues the event of a system call before the call returns, and a dying process has
  returned from its last one. The queue is first in, first out, and has no limit; a drain reads
  at least as many events as there are in it at the start, or until it is empty.
* Stores to a mapped file make no event. But the mapping holds the open file, and when it goes,
  ``exit_mm`` drops it, the last reference is put by ``__fput``, which is work that the dying
  task itself does in ``exit_task_work``, before ``exit_notify`` lets anybody reap it
  (``kernel/exit.c``, ``do_exit``). ``__fput`` queues CLOSE_WRITE. A store into a page that is
  dirty already changes no time of the file, so such a file is in :attr:`Changes.files`, and
  its contents are to be read again whatever its record says.
* An event that equals one in the queue is merged with it and so comes earlier, at most; never
  one that was read already.
* An event is placed by asking where the directory of that handle is *now*, after all events of
  the drain were read. If it, or one above it, is renamed after that, the rename's event is in
  this drain or a later one. The last such rename is placed where its directory stays until the
  scan, in :attr:`Changes.arrived`: nothing that was known at that path holds, nor below it.
  That the inode's number is another one would not do: a filesystem gives a number that has
  become free to the next directory that is made (ext4, the very next), and a directory may be
  renamed, changed, and named as it was.
* A directory that is made where one was removed may have its number, too, so it is listed though
  nothing happened in it yet. What is made in it is told in the same way.
* What was found to lie in no tree is remembered, and forgotten as soon as a directory is moved
  anywhere. That needs the move's event, which is read in the same drain as any event that came
  after it, if the drain saw the queue empty; if not, nothing remembered is used.
* A handle that is stale is of a directory that was removed. The removal is an event of its
  parent, for which the same holds, up to a directory that exists, or to a tree's root.

**What is not covered.** Processes that live on with a dirty mapping: their file is told when
they close it, or when the page is written back and dirtied again (a change of its times). Memory
of a process that somebody else holds while it ends (a reader of ``/proc/PID/maps``): closed by
that one, a moment later. Work that the kernel does after the process's end, as the last of
io_uring. Files written through an overlay whose upper directory is in the tree: overlayfs opens
them so that no events are made. Another name of a hard-linked file: the event has the name that
was used. What other systems do to a filesystem that they share.
"""

from __future__ import annotations

import _thread
import ctypes
import errno
import fcntl
import os
import struct

from wherry_sync.entry import TEMPORARY_PREFIX, join

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# include/uapi/linux/fanotify.h
_CLOEXEC, _NONBLOCK, _UNLIMITED_QUEUE = 0x1, 0x2, 0x10
_REPORT_DFID_NAME = 0x400 | 0x800
_MARK_ADD, _MARK_FILESYSTEM = 0x1, 0x100
_MODIFY, _ATTRIB, _CLOSE_WRITE = 0x2, 0x4, 0x8
_MOVED_FROM, _MOVED_TO, _CREATE, _DELETE = 0x40, 0x80, 0x100, 0x200
_OVERFLOW, _ON_DIRECTORY = 0x4000, 0x40000000
_WRITTEN = _MODIFY | _CLOSE_WRITE
_MOVED = _MOVED_FROM | _MOVED_TO
# DELETE_SELF and MOVE_SELF would say again what the parent's event says with a name.
_EVENTS = _WRITTEN | _MOVED | _ATTRIB | _CREATE | _DELETE | _ON_DIRECTORY

# struct fanotify_event_metadata, and the first, and here only, information record: its header,
# the filesystem's id, and the beginning of a struct file_handle.
_METADATA_BYTES = 24
_EVENT = struct.Struct("=IBBHQiiBBHqIi")
_HANDLE_OFFSET = _EVENT.size - 8
_PADDING = bytes(_EVENT.size)
_WITH_NAME = 2
_KINDS = (_WITH_NAME, 3)

_FIONREAD = 0x541B
_READ_BYTES = 256 * 1024
_PREFIX = TEMPORARY_PREFIX.encode()
_HANDLE_BYTES = 128
_AT_FDCWD = -100
_DIRECTORY = os.O_DIRECTORY | os.O_CLOEXEC | getattr(os, "O_PATH", 0)
_KEPT_HANDLES = 16384

_library = ctypes.CDLL(None, use_errno=True)


def _check(result: int, reasons: dict[int, str]) -> int:
    """Return the result of a call, or raise what it failed with."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, reasons.get(code, os.strerror(code)))
    return result


def _path_of(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


class Changes:
    """What may have changed in one tree; all paths are from its root, whose own is empty.

    :ivar arrived: directories that were renamed to this, from wherever. What is in them may
        have been told of by their earlier paths alone.
    :ivar directories: their own entries may have changed.
    :ivar files: were written to by another process. Their contents are to be read again
        whatever their records say; they need not exist any more.
    :ivar lost: anything may have changed: look at everything.
    :ivar foreign: another process than this one has changed something.
    """

    __slots__ = ("arrived", "directories", "files", "foreign", "lost")

    def __init__(self) -> None:
        self.arrived: set[str] = set()
        self.directories: set[str] = set()
        self.files: set[str] = set()
        self.lost = False
        self.foreign = False

    def add(self, later: Changes) -> None:
        """Take what a later drain tells of the same tree."""
        self.arrived |= later.arrived
        self.directories |= later.directories
        self.files |= later.files
        self.lost |= later.lost
        self.foreign |= later.foreign

    def __repr__(self) -> str:
        said = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.__slots__)
        return f"Changes({said})"


class _Seen:
    """The events of one directory in a drain.

    :ivar arrived: names that directories were renamed to.
    :ivar made: names of directories that were made.
    :ivar written: names of files written to by other processes.
    :ivar names: all events by name, for a directory that a tree's root is in; else None.
    """

    __slots__ = ("arrived", "foreign", "made", "names", "written")

    def __init__(self, named: bool) -> None:
        self.arrived: set[bytes] = set()
        self.foreign = False
        self.made: set[bytes] = set()
        self.written: set[bytes] = set()
        self.names: dict[bytes, int] | None = {} if named else None


class _Root:
    """A tree: where it was last found.

    :ivar handle: of the root if it is a directory; else empty.
    :ivar parent: handle of the directory that it is in; empty if that is on another filesystem
        or missing.
    :ivar fd: the root, if it is a directory, as the watch's mount shows it; else -1.
    """

    __slots__ = ("fd", "handle", "name", "parent", "path", "placed")

    def __init__(self, path: str) -> None:
        self.path = path
        self.name = b""
        self.handle = b""
        self.parent = b""
        self.fd = -1
        self.placed = False

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


class Watch:
    """Watches trees on one filesystem.

    Changes are told from :meth:`add` on; who wants to know all scans after that, not before.
    Safe to use from several threads.

    :param mount: a path on the filesystem. It must be where all trees can be reached from: the
        filesystem's own root, or a bind mount that has them all.
    :param unlimited: no limit on the queue (else ``fs.fanotify.max_queued_events``).
    :raises OSError: the kernel or the filesystem cannot do it, or the process may not.
    """

    def __init__(self, mount: str, *, unlimited: bool = True) -> None:
        flags = _CLOEXEC | _NONBLOCK | _REPORT_DFID_NAME | (_UNLIMITED_QUEUE if unlimited else 0)
        self._lock = _thread.allocate_lock()
        self._roots: dict[str, _Root] = {}
        # Handles of directories that are in no tree.
        self._elsewhere: set[bytes] = set()
        self._parents: dict[bytes, list[_Root]] = {}
        if not hasattr(_library, "fanotify_init"):
            raise OSError(errno.ENOSYS, "this system has no fanotify")
        self._mount = os.open(mount, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._fd = -1
        try:
            self._device = os.fstat(self._mount).st_dev
            self._fd = _check(
                _library.fanotify_init(ctypes.c_uint(flags), ctypes.c_uint(os.O_RDONLY)),
                {
                    errno.EPERM: "watching a filesystem needs CAP_SYS_ADMIN",
                    errno.EINVAL: "this kernel's fanotify cannot name files (Linux 5.9 can)",
                    errno.ENOSYS: "this kernel has no fanotify",
                },
            )
            unable = f"the filesystem of {mount} has no file handles to watch it by"
            _check(
                _library.fanotify_mark(
                    self._fd,
                    ctypes.c_uint(_MARK_ADD | _MARK_FILESYSTEM),
                    ctypes.c_uint64(_EVENTS),
                    self._mount,
                    None,
                ),
                {errno.EOPNOTSUPP: unable, errno.ENODEV: unable, errno.EXDEV: unable},
            )
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when there is something to drain."""
        return self._fd

    def close(self) -> None:
        """Stop watching; safe to call twice."""
        with self._lock:
            for root in self._roots.values():
                root.close()
            self._roots.clear()
            self._parents.clear()
            if self._fd >= 0:
                os.close(self._fd)
            if self._mount >= 0:
                os.close(self._mount)
            self._fd = self._mount = -1

    def add(self, root: str) -> None:
        """Watch a tree from now on. Adding it again changes nothing.

        :param root: absolute path of a directory, or of a single file, which may be missing.
        :raises OSError: it is on another filesystem, or cannot be reached.
        """
        with self._lock:
            if root in self._roots:
                return
            self._check_open()
            made = _Root(root)
            self._locate(made)
            if not made.parent and not made.handle:
                raise OSError(errno.ENOENT, "the directory it is in is missing", root)
            self._roots[root] = made
            self._index()

    def remove(self, root: str) -> None:
        """Stop watching a tree; one that is not watched is well."""
        with self._lock:
            gone = self._roots.pop(root, None)
            if gone is not None:
                gone.close()
                self._index()

    def drain(self) -> dict[str, Changes]:
        """Return what has changed since the last call, by the trees' paths as they were added.

        Does not wait. Trees without changes are left out.

        :raises OSError: the watch is closed, or reading failed; then anything may be lost.
        """
        with self._lock:
            self._check_open()
            seen, moved, overflow, emptied = self._read()
            changes: dict[str, Changes] = {}
            if overflow:
                _lose(changes, self._roots)
            self._look_at_roots(seen, changes, moved or overflow or not emptied)
            self._place(seen, changes)
            return changes

    def _check_open(self) -> None:
        if self._fd < 0:
            raise OSError(errno.EBADF, "the watch is closed")

    def _read(self) -> tuple[dict[bytes, _Seen], bool, bool, bool]:
        """Return the queue's events by directory; whether directories were moved, whether events
        are missing, and whether the queue was empty at the end."""
        number = bytearray(4)
        fcntl.ioctl(self._fd, _FIONREAD, number)
        # The kernel counts the bytes of the metadata alone. Those events are due; more that come
        # meanwhile are welcome, but an endless row of them must not keep us.
        most = 4 * (int.from_bytes(number, "little") // _METADATA_BYTES) + 4096
        own = os.getpid()
        seen: dict[bytes, _Seen] = {}
        get, unpack, parents = seen.get, _EVENT.unpack_from, self._parents
        moved = overflow = False
        count = 0
        while True:
            if count >= most:
                return seen, moved, overflow, False
            try:
                data = os.read(self._fd, _READ_BYTES)
            except BlockingIOError:
                return seen, moved, overflow, True
            offset, end = 0, len(data)
            # The last event may be one without a record.
            data += _PADDING
            while offset < end:
                count += 1
                length, _, _, _, mask, _, pid, kind, _, _, _, size, _ = unpack(data, offset)
                start = offset + _HANDLE_OFFSET
                offset += length
                if length < _EVENT.size or mask & _OVERFLOW or not size or kind not in _KINDS:
                    overflow = True
                    continue
                after = start + 8 + size
                handle = data[start:after]
                name = data[after : data.index(0, after)] if kind == _WITH_NAME else b""
                if mask & _ON_DIRECTORY and mask & _MOVED:
                    moved = True
                if name.startswith(_PREFIX):
                    continue
                entry = get(handle)
                if entry is None:
                    entry = seen[handle] = _Seen(handle in parents)
                if mask & _ON_DIRECTORY:
                    if mask & _MOVED_TO:
                        entry.arrived.add(name)
                    if mask & _CREATE:
                        entry.made.add(name)
                if pid != own:
                    entry.foreign = True
                    if mask & _WRITTEN:
                        entry.written.add(name)
                if entry.names is not None:
                    entry.names[name] = entry.names.get(name, 0) | mask

    def _look_at_roots(
        self, seen: dict[bytes, _Seen], changes: dict[str, Changes], all_of_them: bool
    ) -> None:
        """Find out about the roots themselves: single files, and directories put elsewhere."""
        doubtful = set(self._roots.values()) if all_of_them else set()
        for handle, entry in seen.items():
            for root in self._parents.get(handle, ()):
                assert entry.names is not None
                mask = entry.names.get(root.name, 0)
                if not root.handle and mask:
                    found = changes.setdefault(root.path, Changes())
                    found.directories.add("")
                    found.foreign |= entry.foreign
                    if root.name in entry.written:
                        found.files.add("")
                if mask & _ON_DIRECTORY and mask & (_MOVED | _CREATE | _DELETE):
                    doubtful.add(root)
        doubtful.update(root for root in self._roots.values() if not root.placed)
        for root in doubtful:
            before = (root.placed, root.handle, root.parent)
            try:
                self._locate(root)
            except OSError:
                root.placed = False
            if (root.placed, root.handle, root.parent) != before:
                _lose(changes, [root.path])
        if doubtful:
            # What was found elsewhere may be in a tree now.
            self._index()

    def _place(self, seen: dict[bytes, _Seen], changes: dict[str, Changes]) -> None:
        """Say of each directory with events which tree it is in, and where."""
        unknown = [handle for handle in seen if handle not in self._elsewhere]
        trees = [(root, where) for root in self._roots.values() if (where := self._where(root))]
        if not unknown or not trees:
            return
        for handle in unknown:
            entry = seen[handle]
            try:
                path, exact = self._path(handle)
            except OSError:
                # Not for want of the directory: it may be anybody's.
                _lose(changes, self._roots)
                continue
            found = False
            for root, where in trees:
                relative = _below(path, where)
                if relative is None:
                    continue
                found = True
                told = changes.setdefault(root.path, Changes())
                told.foreign |= entry.foreign
                told.lost |= not exact
                told.directories.add(relative)
                told.directories.update(_paths(relative, entry.made))
                told.arrived.update(_paths(relative, entry.arrived))
                told.files.update(_paths(relative, entry.written))
            if not found:
                if len(self._elsewhere) >= _KEPT_HANDLES:
                    self._elsewhere.clear()
                self._elsewhere.add(handle)
        for root, where in trees:
            if self._where(root) != where:
                _lose(changes, [root.path])
                self._elsewhere.clear()

    def _where(self, root: _Root) -> str:
        """Return where a root is in the mount's eyes; empty if it is no directory or gone."""
        if root.fd < 0 or os.fstat(root.fd).st_nlink == 0:
            return ""
        return _path_of(root.fd)

    def _path(self, handle: bytes) -> tuple[str | None, bool]:
        """Return where a directory is now, and whether this is exact, or of one above it.

        None if it is nowhere any more.
        """
        for attempt in range(3):
            try:
                fd = self._open(handle)
                break
            except FileNotFoundError:
                return None, True
            except OSError as error:
                # Connecting the directory with its parents can fail when they are being moved.
                if error.errno != errno.ESTALE:
                    raise
                if attempt == 2:
                    return None, True
        try:
            exact = True
            while True:
                if os.fstat(fd).st_nlink == 0:
                    return None, True
                try:
                    return _path_of(fd), exact
                except OSError as error:
                    if error.errno != errno.ENAMETOOLONG:
                        raise
                above = os.open("..", _DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd, exact = above, False
        finally:
            os.close(fd)

    def _open(self, handle: bytes) -> int:
        fd: int = _library.open_by_handle_at(self._mount, handle, ctypes.c_int(_DIRECTORY))
        return _check(fd, {})

    def _handle(self, path: str) -> bytes:
        """Return the handle of what is at a path, links followed."""
        made = ctypes.create_string_buffer(struct.pack("=Ii", _HANDLE_BYTES, 0), 8 + _HANDLE_BYTES)
        follow = 0x400
        _check(
            _library.name_to_handle_at(
                _AT_FDCWD, os.fsencode(path), made, ctypes.byref(ctypes.c_int()), follow
            ),
            {},
        )
        return made.raw[: 8 + int.from_bytes(made.raw[:4], "little")]

    def _locate(self, root: _Root) -> None:
        """Find a root by its path.

        :raises OSError: it is on another filesystem, or cannot be reached.
        """
        root.close()
        root.handle = root.parent = b""
        root.placed = False
        path = os.path.realpath(root.path)
        parent, name = os.path.split(path)
        root.name = os.fsencode(name)
        try:
            if os.stat(parent).st_dev == self._device:
                root.parent = self._handle(parent)
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return
        if status.st_dev != self._device:
            root.parent = b""
            raise OSError(errno.EXDEV, "it is not on the filesystem that is watched", root.path)
        if status.st_mode & 0o170000 == 0o040000:
            root.handle = self._handle(path)
            root.fd = self._open(root.handle)
        root.placed = True

    def _index(self) -> None:
        self._elsewhere.clear()
        self._parents = {}
        for root in self._roots.values():
            if root.parent:
                self._parents.setdefault(root.parent, []).append(root)


def _lose(changes: dict[str, Changes], paths: Iterable[str]) -> None:
    for path in paths:
        found = changes.setdefault(path, Changes())
        found.lost = found.foreign = True


def _paths(directory: str, names: Iterable[bytes]) -> Iterator[str]:
    for name in names:
        try:
            yield join(directory, name.decode())
        except UnicodeDecodeError:
            # The scan has a problem there, and knows nothing.
            pass


def _below(path: str | None, where: str) -> str | None:
    """Return a directory's path in a tree; None if it is outside, or nothing there matters."""
    if path is None:
        return None
    if path == where:
        return ""
    start = where if where.endswith("/") else f"{where}/"
    if not path.startswith(start):
        return None
    relative = path[len(start) :]
    if relative.startswith(TEMPORARY_PREFIX) or f"/{TEMPORARY_PREFIX}" in relative:
        return None
    if not relative.isascii():
        try:
            relative.encode()
        except UnicodeEncodeError:
            return None
    return relative
