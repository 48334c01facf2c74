"""The operating system, behind one interface: ``current()``."""

from __future__ import annotations

import functools
import sys

from wherry.platform.base import (
    ChangeSink,
    LocalListener,
    LocalStream,
    Platform,
    TreeWatcher,
)

__all__ = [
    "ChangeSink",
    "LocalListener",
    "LocalStream",
    "Platform",
    "TreeWatcher",
    "current",
]


@functools.cache
def current() -> Platform:
    """Return the system that this program runs on."""
    if sys.platform == "win32":
        from wherry.platform.windows.system import Windows

        return Windows()
    if sys.platform == "darwin":
        from wherry.platform.macos import MacOS

        return MacOS()
    from wherry.platform.linux import Linux

    return Linux()
