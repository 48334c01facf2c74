"""What a Windows filesystem does, on top of one that can do more: names and locks.

Calls of :mod:`os` on paths below one directory find a name whatever its case; refuse names that
Windows refuses; drop dots and blanks at a name's end; fail with a sharing violation where a
program holds a file open, and rename no directory around one. All other paths are as they are.

Sources: "Naming Files, Paths, and Namespaces", "CreateFileW function" (dwShareMode) and
"FILE_RENAME_INFORMATION structure" (Remarks) of the Windows documentation.
"""

from __future__ import annotations

import errno
import io
import os
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wherry_sync import kernel

_RESERVED = re.compile(r'[<>:"\\|?*\x00-\x1f]')
_DEVICE = re.compile(
    r"(CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|(COM|LPT)[1-9\u00b9\u00b2\u00b3])\s*(\.|\Z)", re.IGNORECASE
)


def ntfs(name: str) -> str:
    """Return what NTFS compares: capitals one by one, and of the first 65,536 characters alone."""
    return "".join(
        upper if each <= "\uffff" and len(upper := each.upper()) == 1 else each for each in name
    )


def apfs(name: str) -> str:
    """Return what APFS compares: all forms of a letter are one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


class WindowsFiles:
    """The files below a directory, until the test ends.

    :ivar held: names of files that a program holds open without sharing them.
    :ivar read_only: names of files that a program holds open and lets others read.
    :ivar fold: what of a name is compared.
    """

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.held: set[str] = set()
        self.read_only: set[str] = set()
        self.fold = ntfs
        self._root = os.fspath(root)
        self._listdir = os.listdir
        self._readlink = os.readlink
        for name in ("open", "stat", "mkdir", "rmdir", "unlink", "readlink", "symlink", "lstat"):
            last = name == "symlink"
            patch.setattr(os, name, self._one(name, getattr(os, name), 1 if last else 0))
        patch.setattr(io, "open", self._one("open", io.open, 0))
        self._rename = os.rename
        patch.setattr(os, "rename", self._two(os.rename))
        patch.setattr(os, "replace", self._two(os.replace))
        patch.setattr(os, "link", self._two(os.link))
        patch.setattr(kernel, "rename_exclusive", self._rename_exclusive)
        # There is nothing like it.
        patch.setattr(kernel, "exchange", lambda *names: False)

    def _full(self, path: Any, fd: int | None) -> str:
        """Return the real path of what a call means; the name itself may be new.

        :raises OSError: Windows has no such name.
        """
        text = os.fsdecode(path)
        if fd is not None and not text.startswith("/"):
            text = f"{self._readlink(f'/proc/self/fd/{fd}')}/{text}"
        if not text.startswith(f"{self._root}/"):
            return text
        found = self._root
        for name in text[len(self._root) + 1 :].split("/"):
            if _RESERVED.search(name) or _DEVICE.match(name):
                raise OSError(errno.EINVAL, "the file name is not correct", name)
            wanted = name.rstrip(". ")
            try:
                same = self.fold(wanted)
                there = [each for each in self._listdir(found) if self.fold(each) == same]
            except OSError:
                there = []
            found = f"{found}/{there[0] if there else wanted}"
        return found

    def _check(self, path: str, *, reading: bool = False) -> None:
        kept = self.held if reading else self.held | self.read_only
        if path.startswith(self._root) and path.rpartition("/")[2] in kept:
            raise PermissionError(errno.EACCES, "it is used by another program", path)

    def _check_below(self, directory: str) -> None:
        if not directory.startswith(self._root):
            return
        for _, _, names in os.walk(directory):
            if not (self.held | self.read_only).isdisjoint(names):
                raise PermissionError(errno.EACCES, "access is denied", directory)

    def _one(self, name: str, real: Callable[..., Any], index: int) -> Callable[..., Any]:
        def call(*arguments: Any, dir_fd: int | None = None, **options: Any) -> Any:
            if isinstance(arguments[index], int):
                return real(*arguments, **options)
            full = self._full(arguments[index], dir_fd)
            if name in ("open", "unlink"):
                self._check(full, reading=name == "open" and _reads(*arguments[1:], **options))
            changed = list(arguments)
            changed[index] = os.fsencode(full) if isinstance(arguments[index], bytes) else full
            return real(*changed, **options)

        return call

    def _two(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(
            old: Any,
            new: Any,
            *,
            src_dir_fd: int | None = None,
            dst_dir_fd: int | None = None,
            **options: Any,
        ) -> None:
            source, target = self._full(old, src_dir_fd), self._full(new, dst_dir_fd)
            self._check(source)
            self._check(target)
            self._check_below(source)
            if real is self._rename and self.fold(source) == self.fold(target):
                # Only the case changes, and that it does.
                target = f"{target.rpartition('/')[0]}/{os.fsdecode(new).rpartition('/')[2]}"
            real(source, target, **options)

        return call

    def _rename_exclusive(self, old_fd: int, old: str, new_fd: int, new: str) -> bool:
        target = self._full(new, new_fd)
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "it exists", new)
        os.rename(old, new, src_dir_fd=old_fd, dst_dir_fd=new_fd)
        return True


def _reads(how: int | str = "r", *_: object, mode: int | str = "", **__: object) -> bool:
    """Whether a file is opened to be read alone, by ``os.open`` or ``io.open``."""
    if isinstance(how, int):
        return how & os.O_ACCMODE == os.O_RDONLY
    return not set(str(mode) or how) & set("wax+")
