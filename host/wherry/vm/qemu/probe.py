"""Which accelerator works: found by booting, not by asking.

That an accelerator's device can be opened proves little. On nested hosts ``/dev/kvm``
makes virtual processors that never leave the kernel's early boot; WHPX is known to
hang in firmware. So each candidate boots the guest's kernel with an initramfs that
prints one line, under a bound of seconds, and the first that prints it is taken. The
result is kept under QEMU's version and the processor's name, since those decide it: a
failure for a day, since it may also have been the moment's, a success until a machine
does not start with it.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeGuard

from wherry.core.bridge import in_thread
from wherry.core.clock import Deadline
from wherry.core.errors import WherryError
from wherry.core.files import write_atomic
from wherry.core.processes import PIPE, STDOUT, Argument, Child, TimeoutExpired, spawn
from wherry.platform import Platform
from wherry.vm.image import Image
from wherry.vm.qemu.arguments import base_arguments
from wherry.vm.qemu.programs import Programs

INIT_LINE = b"wherry: init"
"""What the trial's initramfs prints first."""

_TRIAL_MEMORY = 256 << 20
_POLL_S = 0.05
_READ_BYTES = 65536
_FAILURE_AGE_S = 24 * 3600.0
_KILL_S = 5.0
_BOUND_S = {"tcg": 60.0}
_BOUND_HARDWARE_S = 10.0
"""With hardware the line comes in under a second; a trial that hangs costs this once."""


@dataclass(frozen=True)
class Verdict:
    """The accelerator to use, and why the faster ones are not."""

    accelerator: str
    rejected: Mapping[str, str]

    @property
    def warning(self) -> str:
        """One sentence for the user if this ends in emulation; else empty."""
        if self.accelerator != "tcg":
            return ""
        return (
            "running in emulation, many times slower than with acceleration "
            f"({_join(self.rejected)})"
        )


async def choose(programs: Programs, image: Image, platform: Platform, cache: Path) -> Verdict:
    """Return the fastest accelerator that boots the image.

    Trials are run once and then taken from ``cache``; permissions are asked anew each time.

    :raises WherryError: none works.
    """
    known = _read(cache)
    key = f"QEMU {programs.version}, {image.architecture} on {platform.cpu_model()}"
    trials = known.get(key)
    if not isinstance(trials, dict):
        trials = known[key] = {}
    rejected: dict[str, str] = {}
    for name in platform.accelerators:
        problem = platform.accelerator_problem(name)
        if name != "tcg" and image.architecture != platform.architecture():
            problem = f"this computer is not {image.architecture}"
        if problem is None:
            found = trials.get(name)
            if not _is_valid(found):
                problem = await trial(programs, image, platform, name)
                trials[name] = found = {"problem": problem, "time": time.time()}
                write_atomic(cache, json.dumps(known, indent=2).encode())
            problem = found["problem"]
        if problem is None:
            return Verdict(name, rejected)
        rejected[name] = str(problem)
    # The next start tries again: the user may have mended what was wrong.
    cache.unlink(missing_ok=True)
    raise WherryError(
        f"QEMU {programs.version} cannot boot the guest image: {_join(rejected)}",
        hint="check the image with: wherry image verify, or reinstall QEMU",
    )


def forget(cache: Path, accelerator: str) -> None:
    """Have the next :func:`choose` try an accelerator again, whatever it did before.

    :raises OSError: the cache cannot be written.
    """
    known = _read(cache)
    for trials in known.values():
        if isinstance(trials, dict):
            trials.pop(accelerator, None)
    write_atomic(cache, json.dumps(known, indent=2).encode())


async def trial(
    programs: Programs, image: Image, platform: Platform, accelerator: str
) -> str | None:
    """Boot once; return None if the kernel reached its init, else what happened instead."""
    bound = Deadline(_BOUND_S.get(accelerator, _BOUND_HARDWARE_S))
    argv: list[Argument] = [
        programs.system,
        *base_arguments(
            architecture=image.architecture,
            accelerator=accelerator,
            cpus=1,
            memory_bytes=_TRIAL_MEMORY,
            kernel=image.kernel,
            initrd=image.probe,
            cmdline=image.cmdline,
        ),
        *("-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"),
    ]
    process = spawn(platform.leash(argv), stdin=PIPE, stdout=PIPE, stderr=STDOUT, new_session=True)
    said = bytearray()
    # By a pipe: a file's descriptor that QEMU inherits has one position for QEMU and for us.
    reading = threading.Thread(
        target=_collect, args=(process.stdout, said), name="trial console", daemon=True
    )
    reading.start()
    try:
        while True:
            ended = not reading.is_alive()
            if INIT_LINE in said:
                return None
            if ended:
                lines = said.decode(errors="replace").strip().splitlines()
                return f"the trial boot failed: {lines[-1] if lines else 'QEMU said nothing'}"
            if bound.passed:
                return f"the trial boot did not leave the kernel within {bound.seconds:g} s"
            await asyncio.sleep(_POLL_S)
    finally:
        assert process.stdin is not None
        process.stdin.close()  # kills QEMU, as our own end would
        await asyncio.shield(in_thread(lambda: _reap(process, reading), name="trial end"))


def _collect(console: IO[bytes], into: bytearray) -> None:
    with console:
        while data := os.read(console.fileno(), _READ_BYTES):
            into += data


def _reap(process: Child, reading: threading.Thread) -> None:
    try:
        process.wait(_KILL_S)
    except TimeoutExpired:
        process.kill()
        process.wait()
    reading.join(_KILL_S)


def _join(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in reasons.items())


def _is_valid(found: object) -> TypeGuard[dict[str, Any]]:
    """Whether a trial's result, as it was read, may still be relied on."""
    if not isinstance(found, dict) or "problem" not in found:
        return False
    age = time.time() - float(found.get("time", 0))
    return found["problem"] is None or 0 <= age < _FAILURE_AGE_S


def _read(cache: Path) -> dict[str, object]:
    try:
        known = json.loads(cache.read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
