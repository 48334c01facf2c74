"""What a machine's service says of itself on disk, and what can be believed of it.

The service writes ``state.json`` at every change. A reader finds it there also when
the service is gone, so it holds for true only what the processes named in it confirm.
"""

from __future__ import annotations

import enum
import itertools
import json
import os
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil

from wherry.config.layout import MachinePaths
from wherry.core.files import write_atomic
from wherry.vm.driver import ProcessIdentity
from wherry.vm.qemu.process import find, identify


class State(enum.StrEnum):
    """Where a machine is in its life; the words of ``wherry status``."""

    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    SUSPENDED = "suspended"
    BROKEN = "broken"


@dataclass(frozen=True)
class Record:
    """The contents of ``state.json``."""

    state: State = State.STOPPED
    reason: str = ""
    """Why the machine is broken; empty otherwise."""
    service: ProcessIdentity | None = None
    qemu: ProcessIdentity | None = None
    accelerator: str = ""
    warning: str = ""
    """What the user should know of a machine that runs, such as that it is emulated."""
    started: float = 0.0
    """When the engine answered first, in seconds since the epoch."""


def write(paths: MachinePaths, record: Record) -> None:
    """Save a record.

    :raises OSError: the directory is not writable.
    """
    write_atomic(paths.state, json.dumps(asdict(record), indent=2).encode())


def read(paths: MachinePaths) -> Record:
    """Return what is true now: the record, corrected by the processes that really run."""
    record = _load(paths)
    service = _alive(record.service)
    qemu = _alive(record.qemu)
    state, reason = record.state, record.reason
    if service is None and state not in (State.STOPPED, State.SUSPENDED, State.BROKEN):
        state = State.BROKEN
        reason = "the service died while the machine was " + record.state
    if service is None and qemu is not None:
        state = State.BROKEN
        reason = "the service died; the virtual machine still runs"
    return replace(record, state=state, reason=reason, service=service, qemu=qemu)


def mark_stopped(paths: MachinePaths) -> None:
    """Forget why a machine broke: the user stopped it, and nothing of it runs."""
    for stale in (paths.docker_socket, paths.control_socket, paths.qmp_socket):
        stale.unlink(missing_ok=True)
    write(paths, Record())


def ourselves() -> ProcessIdentity:
    """Return this process's identity."""
    return identify(os.getpid())


def find_orphan(paths: MachinePaths) -> ProcessIdentity | None:
    """Look through all processes for a QEMU on this machine's monitor socket.

    The record cannot say it reliably: a service killed right after it launched QEMU
    had no time to write. A second QEMU must never open the same disk.
    """
    needle = f"unix:{str(paths.qmp_socket).replace(',', ',,')},"
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or ()
        # Not any process that mentions the socket: what is found here may be killed.
        if any(a == "-qmp" and b.startswith(needle) for a, b in itertools.pairwise(words)):
            try:
                if process.status() != psutil.STATUS_ZOMBIE:
                    return ProcessIdentity(process.pid, process.create_time())
            except psutil.Error:
                continue
    return None


def uptime(record: Record) -> float:
    """Return the seconds since the engine first answered; 0 when it does not run."""
    return max(0.0, time.time() - record.started) if record.state is State.RUNNING else 0.0


def _alive(identity: ProcessIdentity | None) -> ProcessIdentity | None:
    return identity if identity is not None and find(identity) is not None else None


def _load(paths: MachinePaths) -> Record:
    try:
        fields: dict[str, Any] = json.loads(paths.state.read_bytes())
        return Record(
            state=State(fields["state"]),
            reason=str(fields["reason"]),
            service=_identity(fields["service"]),
            qemu=_identity(fields["qemu"]),
            accelerator=str(fields["accelerator"]),
            warning=str(fields["warning"]),
            started=float(fields["started"]),
        )
    except FileNotFoundError:
        return Record()
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        # Writing is atomic, so this is damage from outside; processes still tell the rest.
        return Record(state=State.BROKEN, reason=f"{paths.state} cannot be read")


def _identity(fields: Any) -> ProcessIdentity | None:
    return None if fields is None else ProcessIdentity(int(fields["pid"]), float(fields["created"]))
