"""System calls that the standard library lacks; each says when the system lacks it too.

``renameat2`` is Linux's (rename(2)), ``renameatx_np`` macOS's (its rename(2)). A filesystem may
know neither, so each call answers False for "not possible here", and the caller has a slower way.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal

from wherry_sync import handles

_UNKNOWN = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
_library = ctypes.CDLL(None, use_errno=True) if handles.POSSIBLE else None
# The function with its values of "fail if the target exists" and "exchange the two".
_renames = (("renameat2", 1, 2), ("renameatx_np", 4, 2))
_rename, _NO_REPLACE, _EXCHANGE = next(
    ((getattr(_library, name), exclusive, swap) for name, exclusive, swap in _renames
     if hasattr(_library, name)),
    (None, 0, 0),
)  # fmt: skip


def _call(old_fd: int, old: str, new_fd: int, new: str, flag: int) -> bool:
    if _rename is None:
        return False
    arguments = (old_fd, os.fsencode(old), new_fd, os.fsencode(new), ctypes.c_uint(flag))
    if _rename(*arguments) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNKNOWN:
        return False
    raise OSError(code, os.strerror(code), new)


def rename_exclusive(old_fd: int, old: str, new_fd: int, new: str) -> bool:
    """Rename, unless there is something at the new name.

    :returns: False if this cannot be had here, and nothing was done.
    :raises FileExistsError: there is something at the new name.
    :raises OSError: it failed.
    """
    return _call(old_fd, old, new_fd, new, _NO_REPLACE)


def exchange(old_fd: int, old: str, new_fd: int, new: str) -> bool:
    """Let two names swap what they stand for, at once.

    On Linux, who watches their directories is told of ``old``'s move first, then of ``new``'s.

    :returns: False if this cannot be had here, and nothing was done.
    :raises OSError: it failed.
    """
    return _call(old_fd, old, new_fd, new, _EXCHANGE)


def claim(fd: int) -> bool:
    """Have a file for us alone until ``fd``, which can write, is closed: others wait to open it.

    By a lease (fcntl(2), ``F_SETLEASE``), which the kernel takes back when somebody has waited
    for 45 s. Who opens it with ``O_NONBLOCK`` does not wait: that fails with EAGAIN.

    :returns: False if somebody has it open, or this cannot be had here.
    """
    import fcntl

    if not hasattr(fcntl, "F_SETLEASE"):
        return False
    try:
        # Who wants to open it makes the kernel send us a signal. SIGIO would end the process;
        # SIGURG, that nobody listens for, does nothing.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError:
        return False
    return True


def is_claimed(fd: int) -> bool:
    """Whether nobody waits for a file that we have for us, or has opened it."""
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_WRLCK


def flush(fd: int) -> None:
    """Wait until all that was written to the filesystem of ``fd`` is on its disk.

    :raises OSError: the disk failed.
    """
    if _library is not None and hasattr(_library, "syncfs"):
        if _library.syncfs(fd) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return
    os.sync()
    flush_disk(fd)


def flush_disk(fd: int) -> None:
    """Wait until a file is on the disk; on macOS fsync(2) leaves it in the disk's cache.

    :raises OSError: the disk failed.
    """
    import fcntl

    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is None:
        os.fsync(fd)
    else:
        fcntl.fcntl(fd, full)
