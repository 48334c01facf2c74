"""Which QEMU is installed."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from wherry.core.errors import WherryError
from wherry.core.processes import run
from wherry.platform import Platform

OLDEST = (7, 2)
"""The first QEMU whose ``hostfwd`` picks a free port when asked for port 0."""

_VERSION_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Programs:
    """QEMU's programs for one guest architecture."""

    system: Path
    img: Path
    version: str


def find(architecture: str, platform: Platform) -> Programs:
    """Look on PATH for the emulator of an architecture and for ``qemu-img``.

    :raises WherryError: one is missing, or QEMU is older than 7.2.
    """
    system = _which(f"qemu-system-{architecture}", platform)
    image_tool = _which("qemu-img", platform)
    asked = run([system, "--version"], timeout_s=_VERSION_TIMEOUT_S, hint=platform.qemu_hint)
    said = asked.stdout.decode(errors="replace")
    match = re.search(r"version (\d+)\.(\d+)(?:\.\d+)?", said)
    if match is None:
        raise WherryError(f"{system} does not tell its version", hint=platform.qemu_hint)
    if (int(match[1]), int(match[2])) < OLDEST:
        raise WherryError(
            f"QEMU {match[0].removeprefix('version ')} ({system}) is too old: 7.2 is needed",
            hint=platform.qemu_hint,
        )
    return Programs(system, image_tool, match[0].removeprefix("version "))


def _which(name: str, platform: Platform) -> Path:
    found = shutil.which(name)
    if found is None:
        raise WherryError(f"{name} is not on PATH: QEMU is not installed", hint=platform.qemu_hint)
    return Path(found)
