"""Changes in a tree, told by Linux (inotify(7)).

Not by watchdog, whose observer for Linux tells nobody when the queue overflowed, holds each
rename back by half a second to pair its halves, and lets errors end in a log.

Invariants:

* A directory has its watch before it is listed for directories in it, and counts as dirty after
  that. So what is made in it is found by the listing, told by the watch, or both.
* The kernel queues an event before the system call that made it returns, so after
  :meth:`InotifyWatcher.catch_up` all is told, unless the queue overflowed; that is told too, and
  then all watches are made anew before anybody can look.
* Moves need not be paired: where a directory went from, the watches below are dropped; where it
  arrived, they are made again. What comes between is dirty anyway.
* What is mounted in the tree, or not any more, is told by another file
  (:mod:`wherry.platform.mounts`), and then all is made anew likewise.

What is not told: stores to a mapped file (their time of change shows, to a scan), and what
another computer does to a network filesystem. So a full scan now and then is still needed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import struct
import termios
import threading
from collections.abc import Callable
from pathlib import Path

from wherry.platform.base import ChangeSink
from wherry.platform.mounts import Mounts

_IN_MODIFY, _IN_ATTRIB, _IN_CLOSE_WRITE = 0x2, 0x4, 0x8
_IN_MOVED_FROM, _IN_MOVED_TO, _IN_CREATE, _IN_DELETE = 0x40, 0x80, 0x100, 0x200
_IN_DELETE_SELF, _IN_MOVE_SELF, _IN_UNMOUNT = 0x400, 0x800, 0x2000
_IN_Q_OVERFLOW, _IN_IGNORED = 0x4000, 0x8000
_IN_ONLYDIR, _IN_DONT_FOLLOW, _IN_EXCL_UNLINK = 0x01000000, 0x02000000, 0x04000000
_IN_ISDIR = 0x40000000
_CONTENTS = _IN_MODIFY | _IN_ATTRIB | _IN_CLOSE_WRITE
_APPEARED, _VANISHED = _IN_CREATE | _IN_MOVED_TO, _IN_DELETE | _IN_MOVED_FROM
_MASK = (
    _CONTENTS | _APPEARED | _VANISHED | _IN_ONLYDIR | _IN_DONT_FOLLOW | _IN_EXCL_UNLINK
)  # fmt: skip
_ROOT_MASK = (_MASK | _IN_DELETE_SELF | _IN_MOVE_SELF) & ~_IN_DONT_FOLLOW

_EVENT = struct.Struct("iIII")
_READ_BYTES = 256 * 1024
# Events in a storm are read in turns, so that they cost a few wake-ups and not thousands.
_PAUSE_S = 0.005
_JOIN_S = 10.0
_GONE = "it was moved, removed or unmounted"

_library = ctypes.CDLL(None, use_errno=True)


def _error(what: str) -> OSError:
    code = ctypes.get_errno()
    reason = os.strerror(code)
    for wanted, setting in (
        (errno.ENOSPC, "max_user_watches"),
        (errno.EMFILE, "max_user_instances"),
    ):
        if code == wanted:
            limit = Path(f"/proc/sys/fs/inotify/{setting}").read_text().strip()
            reason = (
                f"the limit of {limit} for fs.inotify.{setting} is reached; raise it with sysctl"
            )
    return OSError(code, reason, what)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _place(root: Path) -> tuple[str, str]:
    """Return the directory to watch, links followed, and the only name in it that counts.

    That is a single file's; it is empty for a directory, where everything counts.
    """
    path = os.path.realpath(root)
    return (path, "") if root.is_dir() else os.path.split(path)


class _Node:
    """A directory with a watch."""

    __slots__ = ("children", "name", "parent", "wd")

    def __init__(self, wd: int, parent: _Node | None, name: str) -> None:
        self.wd = wd
        self.parent = parent
        self.name = name
        self.children: dict[str, _Node] = {}

    def path(self) -> str:
        names = []
        node = self
        while node.parent is not None:
            names.append(node.name)
            node = node.parent
        return "/".join(reversed(names))


class InotifyWatcher:
    """Watches a directory with all that is below it, or a single file, in a thread of its own.

    The constructor lists all directories: some 20 µs for each.

    :raises OSError: it cannot be watched; the limit of watches may be reached.
    """

    exact = True

    def __init__(self, root: Path, sink: ChangeSink, skipped: Callable[[str, bool], bool]) -> None:
        self._sink = sink
        self._skipped = skipped
        self._given = root
        self._path = self._only = ""
        self._lock = threading.Lock()
        self._nodes: dict[int, _Node] = {}
        self._root: _Node | None = None
        self._inode: tuple[int, int] | None = None
        self._fd = -1
        self._ended = False
        self._wake_read = self._wake_write = -1
        self._mounts = Mounts()
        try:
            self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            self._rebuild()
        except BaseException:
            self._release()
            raise
        self._thread = threading.Thread(target=self._run, name="inotify", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread and release all; safe to call twice."""
        with self._lock:
            ended, self._ended = self._ended, True
            if ended:
                return
            os.write(self._wake_write, b"x")
        if threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_S)

    def catch_up(self) -> None:
        """Tell all that was changed by system calls that have returned."""
        with self._lock:
            self._take_in()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        registered = -1
        try:
            while True:
                with self._lock:
                    if self._ended:
                        return
                    if registered != self._fd:
                        if registered >= 0:
                            poll.unregister(registered)
                            poll.unregister(self._mounts.wake_fd)
                        registered = self._fd
                        if registered >= 0:
                            poll.register(registered, select.POLLIN)
                            poll.register(self._mounts.wake_fd, select.POLLPRI)
                poll.poll()
                with self._lock:
                    if self._ended:
                        return
                    while self._woken():
                        pass
                    self._take_in()
                self._sink.notify()
                select.select([], [], [], _PAUSE_S)
        finally:
            with self._lock:
                self._ended = True
                self._release()

    def _woken(self) -> bool:
        try:
            return bool(os.read(self._wake_read, 64))
        except BlockingIOError:
            return False

    def _release(self) -> None:
        for fd in (self._fd, self._wake_read, self._wake_write):
            if fd >= 0:
                os.close(fd)
        self._fd = self._wake_read = self._wake_write = -1
        self._mounts.close()

    def _fail(self, reason: str) -> None:
        """Watch nothing any more, and say so."""
        self._nodes.clear()
        self._root = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            # The thread must not poll a descriptor that may become another's.
            os.write(self._wake_write, b"x")
        self._sink.failed(reason)

    def _rebuild(self) -> None:
        """Make all watches anew."""
        fd = _library.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if fd < 0:
            raise _error(os.fspath(self._given))
        if self._fd >= 0:
            # The thread polls this number, and goes on doing so.
            os.dup2(fd, self._fd, inheritable=False)
            os.close(fd)
        else:
            self._fd = fd
        self._nodes.clear()
        self._root = None
        self._path, self._only = _place(self._given)
        self._inode = _identity(self._path)
        self._mounts.know(self._path)
        self._add(None, "")
        if self._root is None:
            raise OSError(errno.ENOENT, "it is no directory that can be read", self._path)

    def _add(self, parent: _Node | None, name: str) -> None:
        """Watch a directory and all below it.

        :raises OSError: one cannot be watched, though it is there and may be read.
        """
        start = parent.path() if parent is not None else ""
        pending = [(parent, name, f"{start}/{name}" if start else name)]
        while pending:
            parent, name, path = pending.pop()
            absolute = f"{self._path}/{path}" if path else self._path
            if self._mounts.has(absolute) and self._is_elsewhere(absolute):
                continue
            mask = _MASK if parent is not None else _ROOT_MASK
            wd = _library.inotify_add_watch(self._fd, os.fsencode(absolute), ctypes.c_uint32(mask))
            if wd < 0:
                if ctypes.get_errno() in (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ELOOP):
                    # It is told, or was, by an event of its parent; or no scan can read it.
                    continue
                raise _error(absolute)
            node = self._nodes.get(wd)
            if node is None:
                node = self._nodes[wd] = _Node(wd, parent, name)
            else:
                # It was moved here, and the event of that is still to come.
                self._move(node, parent, name)
            if parent is None:
                self._root = node
            else:
                parent.children[name] = node
            if self._only:
                continue
            try:
                with os.scandir(absolute) as listing:
                    names = [found.name for found in listing if found.is_dir(follow_symlinks=False)]
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                names = []
            for child in names:
                below = f"{path}/{child}" if path else child
                if not self._skipped(below, True):
                    pending.append((node, child, below))
            self._sink.dirty(path)

    def _is_elsewhere(self, absolute: str) -> bool:
        """Whether a directory is on another filesystem, which no scan enters: it may be huge."""
        found = _identity(absolute)
        return found is not None and self._inode is not None and found[0] != self._inode[0]

    def _add_below(self, parent: _Node, name: str, path: str) -> None:
        if not self._skipped(path, True):
            self._add(parent, name)

    def _move(self, node: _Node, parent: _Node | None, name: str) -> None:
        """Have a directory that has a watch at another place than it was found at first.

        :raises OSError: it is at both places, and events would say the one only.
        """
        self._sink.dirty(node.path())
        if node.parent is not None and node.parent.children.get(node.name) is node:
            del node.parent.children[node.name]
            old = Path(self._path, node.path())
            new = Path(self._path, parent.path() if parent is not None else "", name)
            above = parent
            while above is not None and above is not node:
                above = above.parent
            if above is node or (old != new and old.exists() and old.samefile(new)):
                raise OSError(errno.ELOOP, f"it is the same directory as {old}", os.fspath(new))
        node.parent, node.name = parent, name

    def _forget(self, node: _Node) -> None:
        """Drop the watches of a directory and all below it."""
        pending = [node]
        while pending:
            gone = pending.pop()
            pending.extend(gone.children.values())
            if self._nodes.get(gone.wd) is gone:
                del self._nodes[gone.wd]
                # Fails if the directory was removed, and its watch with it.
                _library.inotify_rm_watch(self._fd, gone.wd)

    def _take_in(self) -> None:
        """Read the queue as it is now, and tell what it says."""
        if self._fd < 0:
            return
        if _identity(self._path) != self._inode:
            # A directory above it may have been moved, of which no event tells.
            self._fail(f"{self._path}: {_GONE}")
            return
        try:
            if _place(self._given) != (self._path, self._only) or self._mounts.changed():
                # A link leads elsewhere, or a directory is there now, or something is mounted in
                # it: of that no event tells.
                self._sink.lost()
                self._rebuild()
                return
            number = bytearray(4)
            fcntl.ioctl(self._fd, termios.FIONREAD, number)
            # What comes meanwhile is welcome, but an endless stream of it must not keep us.
            most = 4 * int.from_bytes(number, "little") + _READ_BYTES
            done = 0
            while done < most:
                try:
                    data = os.read(self._fd, _READ_BYTES)
                except BlockingIOError:
                    return
                done += len(data)
                if not self._understand(data):
                    self._sink.lost()
                    self._rebuild()
                    return
                if self._root is None:
                    self._fail(f"{self._path}: {_GONE}")
                    return
        except OSError as error:
            self._fail(f"{error.filename or self._path}: {error.strerror or error}")

    def _understand(self, data: bytes) -> bool:
        """Tell what some events say; False if events are missing."""
        offset = 0
        while offset < len(data):
            wd, mask, _, length = _EVENT.unpack_from(data, offset)
            offset += _EVENT.size
            raw = data[offset : offset + length]
            offset += length
            if mask & _IN_Q_OVERFLOW:
                return False
            node = self._nodes.get(wd)
            if node is None:
                continue
            if mask & (_IN_IGNORED | _IN_UNMOUNT | _IN_DELETE_SELF | _IN_MOVE_SELF):
                if node is self._root:
                    self._root = None
                    return True
                if mask & _IN_IGNORED:
                    del self._nodes[wd]
                continue
            name = os.fsdecode(raw.rstrip(b"\0"))
            if self._only:
                if name == self._only:
                    self._sink.dirty("")
                continue
            path = node.path()
            below = f"{path}/{name}" if path else name
            is_directory = bool(mask & _IN_ISDIR)
            if not mask & ~(_CONTENTS | _IN_ISDIR) and (
                not name or self._skipped(below, is_directory)
            ):
                continue
            self._sink.dirty(path)
            if is_directory:
                if mask & _VANISHED:
                    gone = node.children.pop(name, None)
                    if gone is not None:
                        self._forget(gone)
                    # When two were exchanged, one arrived here before this one left.
                    self._add_below(node, name, below)
                elif mask & _APPEARED or name not in node.children:
                    # A directory is not among the children if it could not be read, as yet.
                    self._add_below(node, name, below)
        return True
