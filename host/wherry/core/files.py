"""Files that are either the old ones or the new ones, never half of each."""

from __future__ import annotations

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

    :param mode: permission bits of the new file.
    :raises OSError: the directory is missing, full or not writable; ``path`` is
        then what it was.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
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


def remove_unfinished(path: Path) -> None:
    """Remove what a :func:`write_atomic` to ``path`` left that was killed in the midst.

    To be called where nobody can be writing to it.
    """
    for left in path.parent.glob(f".{path.name}.*"):
        left.unlink(missing_ok=True)


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
