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
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil

from wherry.config.layout import MachinePaths
from wherry.core.errors import WherryError
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
    image: Mapping[str, str] | None = None
    """``version`` and ``sha256`` of the image that the VM was started from."""
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
        # A service that could not take it over has said why.
        told = record.state is State.BROKEN and record.reason
        state = State.BROKEN
        reason = told or "the service died; the virtual machine still runs"
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
    """Return a QEMU that runs on this machine's disk, whether or not a service controls it.

    The record cannot say it reliably: a service killed right after it launched QEMU had no
    time to write. So all processes are looked through for the machine's monitor socket,
    which the record makes up for when the directory was moved meanwhile. A second QEMU
    must never open the same disk.
    """
    recorded = _alive(_load(paths).qemu)
    if recorded is not None:
        return recorded
    needle = f"unix:{str(paths.qmp_socket).replace(',', ',,')},"
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or ()
        # Not any process that mentions the socket: what is found here may be killed.
        if any(a == "-qmp" and b.startswith(needle) for a, b in itertools.pairwise(words)):
            try:
                identity = identify(process.pid)
            except WherryError:
                continue
            if _alive(identity) is not None:
                return identity
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
            image=_words(fields["image"]),
            accelerator=str(fields["accelerator"]),
            warning=str(fields["warning"]),
            started=float(fields["started"]),
        )
    except FileNotFoundError:
        return Record()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        # Writing is atomic, so this is damage from outside; processes still tell the rest.
        return Record(state=State.BROKEN, reason=f"{paths.state} cannot be read")


def _words(fields: Any) -> Mapping[str, str] | None:
    return None if fields is None else {str(key): str(value) for key, value in fields.items()}


def _identity(fields: Any) -> ProcessIdentity | None:
    if fields is None:
        return None
    return ProcessIdentity(int(fields["pid"]), float(fields["started"]), str(fields["boot"]))
