"""Files that are either the old ones or the new ones, never half of each."""

from __future__ import annotations

import glob
import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

_CHUNK_BYTES = 1 << 20

_IN_USE = (5, 32)
"""ERROR_ACCESS_DENIED and ERROR_SHARING_VIOLATION (winerror.h)."""
_PAUSES_S = (0.001, 0.01, 0.05, 0.2, 0.5)


def write_atomic(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace ``path`` by ``data`` in one step; the data is on the disk before that.

    What a writer that was killed left half-made beside it, the next one removes.

    :param mode: permission bits of the new file.
    :raises OSError: the directory is missing, full or not writable; ``path`` is
        then what it was.
    """
    _remove_unfinished(path)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.{os.getpid()}-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            # mkstemp makes the file 0600, which Windows cannot widen: only when asked.
            if mode != 0o600:
                os.chmod(name, mode)  # noqa: PTH101 - a descriptor works on POSIX alone
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _replace(Path(name), path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _remove_unfinished(path: Path) -> None:
    """Remove what processes that were killed while they wrote ``path`` left of it."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*-*"):
        writer = left.name[len(path.name) + 2 :].partition("-")[0]
        if writer.isdecimal() and not _runs(int(writer)):
            left.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    # Only here, as the command line should be there at once.
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except (psutil.NoSuchProcess, OverflowError):
        return False
    except psutil.Error:
        return True


def _replace(new: Path, path: Path) -> None:
    """Rename; on Windows that fails for as long as another program reads the old file."""
    for pause_s in _PAUSES_S:
        try:
            new.replace(path)
            return
        except PermissionError as error:
            if getattr(error, "winerror", None) not in _IN_USE:
                raise
        time.sleep(pause_s)
    new.replace(path)


def sha256(path: Path, *, progress: Callable[[int], None] | None = None) -> str:
    """Return the SHA-256 of a file in hexadecimal.

    :param progress: called with the number of bytes read since the last call.
    :raises OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            if progress is not None:
                progress(len(chunk))
    return digest.hexdigest()
