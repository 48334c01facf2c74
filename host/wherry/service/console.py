"""The guest's console: QEMU writes it to a file, the boot's milestones are lines in it.

The guest prints ``wherry: init`` when its init begins, ``wherry: ssh`` when sshd
listens, ``wherry: engine`` when dockerd answers, ``wherry: warning: …`` for the user, and
``wherry: fatal: …`` before it gives up. Waiting for the line beats trying to connect: QEMU
accepts connections for the guest long before anything in it listens.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from wherry.core.errors import WherryError

_POLL_S = 0.02
_FATAL = re.compile(r"wherry: fatal: (?P<reason>[^\r\n]*)[\r\n]")
_WARNING = re.compile(r"wherry: warning: (?P<text>[^\r\n]*)[\r\n]")
_INT3 = re.compile(r"(Oops: )?int3: 0000[^\r\n]*")
_PANIC = re.compile(r"Kernel panic - not syncing: (?P<reason>[^\r\n]*)")


async def wait_for_line(console: Path, line: str) -> None:
    """Wait until the guest has printed ``line``; the caller sets the bound.

    :raises WherryError: the guest said that it cannot go on, and why.
    """
    while True:
        text = read(console)
        if re.search(rf"^{re.escape(line)}\r?$", text, re.MULTILINE):
            return
        failure = explain(text)
        if failure:
            raise WherryError(failure, hint="see: wherry logs --source console")
        await asyncio.sleep(_POLL_S)


def explain(text: str) -> str:
    """Return why the guest gave up, or an empty text if it did not say so."""
    if fatal := _FATAL.search(text):
        return f"the guest stopped: {fatal['reason']}"
    if panic := _PANIC.search(text):
        return f"the guest's kernel panicked: {panic['reason']}"
    return ""


def warnings(text: str) -> str:
    """Return what the guest wants the user to know of this boot; empty for nothing."""
    found = "; ".join(match["text"] for match in _WARNING.finditer(text))
    return "".join(character for character in found if character.isprintable())


def emulation_oops(text: str) -> str:
    """Return the line by which the kernel tells that it ran into a breakpoint that is gone.

    The kernel patches its own code through breakpoints (``text_poke_bp``); QEMU before
    8.1 may execute one after its removal. Nothing else ends in this oops.
    """
    found = _INT3.search(text)
    return found[0] if found else ""


def read(console: Path) -> str:
    """Return what the guest has printed; a boot prints a few KiB."""
    try:
        return console.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
