"""The QEMU process: started by us, or left running by an earlier service."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from wherry.core.bridge import in_thread
from wherry.core.clock import Deadline
from wherry.core.errors import WherryError
from wherry.core.processes import Argument, Child, TimeoutExpired, spawn
from wherry.platform import current
from wherry.vm.driver import ProcessIdentity

_KILL_TIMEOUT_S = 10.0
_POLL_S = 0.2


def find(identity: ProcessIdentity) -> psutil.Process | None:
    """Return the process if any of its threads runs; a later one with its number is not it."""
    try:
        process = psutil.Process(identity.pid)
        if identify(identity.pid) != identity:
            return None
        # A killed process shows as a zombie when its first thread has ended; until the last
        # has, the process holds its files and their locks.
        ended = process.status() == psutil.STATUS_ZOMBIE and process.num_threads() <= 1
        return None if ended else process
    except (psutil.Error, WherryError, ValueError, OverflowError):
        return None  # the last two: what a damaged file has is no process's number


def identify(pid: int) -> ProcessIdentity:
    """Return the identity of a running process.

    :raises WherryError: it does not run.
    """
    platform = current()
    try:
        return ProcessIdentity(pid, platform.process_start(pid), platform.boot_id())
    except ProcessLookupError as error:
        raise WherryError(f"process {pid} does not run") from error


class QemuProcess:
    """One running QEMU."""

    def __init__(self, identity: ProcessIdentity, child: Child | None, log: Path) -> None:
        self.identity = identity
        self._child = child
        self._log = log

    @classmethod
    def launch(cls, argv: Sequence[Argument], log: Path) -> QemuProcess:
        """Start QEMU in a session of its own, its messages going to ``log``.

        :raises WherryError: the program is missing or cannot be executed.
        """
        with log.open("wb") as messages:
            child = spawn(
                argv, stdout=messages.fileno(), stderr=messages.fileno(), new_session=True
            )
        try:
            return cls(identify(child.pid), child, log)
        except WherryError as error:
            child.kill()
            child.wait()
            raise WherryError("QEMU ended at once", hint=f"see {log}") from error

    @classmethod
    def adopt(cls, identity: ProcessIdentity, log: Path) -> QemuProcess:
        """Take over a QEMU that is not our child.

        :raises WherryError: it does not run any more.
        """
        if find(identity) is None:
            raise WherryError(f"QEMU (process {identity.pid}) does not run any more")
        return cls(identity, None, log)

    @property
    def alive(self) -> bool:
        """Whether QEMU runs."""
        if self._child is not None:
            return self._child.poll() is None
        return find(self.identity) is not None

    async def wait(self) -> str:
        """Wait for its end, however long that takes, and return how it ended."""
        child = self._child
        if child is None:
            # Nothing reports the end of another's child, and a zombie whose parent
            # does not reap it never goes away: it is looked at.
            while self.alive:
                await asyncio.sleep(_POLL_S)
            return "QEMU ended"
        status = await in_thread(child.wait, name="qemu wait")
        if status < 0:
            return f"QEMU was killed by signal {-status}"
        return f"QEMU ended with status {status}" + (f": {self.last_message()}" if status else "")

    def last_message(self) -> str:
        """Return the last line that QEMU logged, or an empty text."""
        try:
            lines = self._log.read_text(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1] if lines else ""

    def kill(self) -> None:
        """End QEMU by force and wait until it is gone.

        :raises WherryError: the system cannot end it.
        """
        try:
            if self._child is not None:
                self._child.kill()
                self._child.wait(_KILL_TIMEOUT_S)
                return
            process = find(self.identity)
            if process is not None:
                process.kill()
            deadline = Deadline(_KILL_TIMEOUT_S)
            while self.alive and not deadline.passed:
                time.sleep(_POLL_S)
        except psutil.NoSuchProcess:
            return
        except (psutil.Error, TimeoutExpired) as error:
            raise WherryError(f"QEMU (process {self.identity.pid}) cannot be ended") from error
        if self.alive:
            raise WherryError(f"QEMU (process {self.identity.pid}) does not end")
