"""Starting a machine's service from a command, exactly once."""

from __future__ import annotations

import os
import re
import sys
import time

from filelock import FileLock, Timeout

from wherry.config.layout import Layout, MachinePaths
from wherry.control.client import HELLO_TIMEOUT_S, call
from wherry.core.clock import Deadline
from wherry.core.errors import NotRunning, WherryError
from wherry.core.processes import Argument, Child, TimeoutExpired, spawn
from wherry.service import SERVICE_ARGUMENT, state
from wherry.vm.qemu.process import QemuProcess

ALREADY_RUNS = 75
"""Exit status of a service that found another one at work (EX_TEMPFAIL, sysexits.h)."""

_APPEAR_TIMEOUT_S = 20.0
_LEAVE_TIMEOUT_S = 10.0
_EXIT_TIMEOUT_S = 2.0
"""The system closes what a killed process has open from the newest on, so its sockets before the
lock; while the computer is busy, or its disk, that takes a moment."""

_FORCE_TIMEOUT_S = 30.0
"""Closing what is open has bounds of its own, which together are shorter."""

_POLL_S = 0.02

_LOG_PREFIX = re.compile(r"^\S+ \S+ [A-Z]+ [\w.]+: ")
"""What the log has before the message: time, level and the part of the program."""


def answers(layout: Layout, paths: MachinePaths) -> bool:
    """Whether the machine has a service that goes on; waits for one that comes or leaves.

    :raises WherryError: one is there, but hangs or cannot be reached.
    """
    deadline = Deadline(_APPEAR_TIMEOUT_S)
    while not deadline.passed:
        if _reached(layout, paths):
            return True
        if _is_free(paths):
            return False
        time.sleep(_POLL_S)
    raise WherryError(
        f"the service of machine {paths.name} runs, but nothing answers at {paths.control_socket}",
        hint=f"end it by force: wherry stop --force {paths.name}",
    )


def _reached(layout: Layout, paths: MachinePaths) -> bool:
    """Whether a service answers, asked once; waits for the end of one that is stopping.

    :raises WherryError: it hangs.
    """
    try:
        said = call(layout.platform, paths.control_socket, "hello", timeout_s=HELLO_TIMEOUT_S)
        if said["stopping"]:
            call(layout.platform, paths.control_socket, "wait_stopped")
            wait_gone(layout, paths)
            return False
    except NotRunning:
        return False
    except WherryError:
        if _exits(paths):
            return False
        raise
    return True


def ensure(layout: Layout, paths: MachinePaths) -> bool:
    """Have a service for the machine; return whether this call started it.

    :raises WherryError: it did not come up.
    """
    if answers(layout, paths):
        return False
    deadline = Deadline(_APPEAR_TIMEOUT_S)
    logged = paths.service_log.stat().st_size if paths.service_log.is_file() else 0
    child = _launch(layout, paths)
    try:
        while not deadline.passed:
            if _reached(layout, paths):
                # Two starts at once: the loser's child ends, the winner's answers.
                return child.poll() is None
            status = child.poll()
            if status == ALREADY_RUNS:
                # Another start won, or the service before is not quite gone.
                child = _launch(layout, paths)
            elif status is not None:
                raise _died(paths, logged)
            time.sleep(_POLL_S)
    except BaseException:
        _end(child)
        raise
    _end(child)
    raise WherryError(
        f"the service of machine {paths.name} did not answer within {_APPEAR_TIMEOUT_S:g} s",
        hint=f"see {paths.service_log}",
    )


def _launch(layout: Layout, paths: MachinePaths) -> Child:
    try:
        # What the service says before it can log, or in place of that, is not lost.
        with paths.service_log.open("ab") as log:
            return spawn(
                command(paths.name),
                stderr=log.fileno(),
                env={"WHERRY_HOME": os.fspath(layout.home)},
                new_session=True,
            )
    except OSError as error:
        raise WherryError(
            f"{paths.service_log} cannot be written: {error.strerror}",
            hint="make the machine's directory writable",
        ) from error


def command(name: str) -> list[Argument]:
    """Return the command line of a machine's service."""
    if getattr(sys, "frozen", False):
        return [sys.executable, SERVICE_ARGUMENT, name]
    return [sys.executable, "-m", "wherry.service", name]


def wait_gone(layout: Layout, paths: MachinePaths) -> None:
    """Wait until the service has left, so that the next command starts from rest.

    :raises WherryError: it is still there after some seconds.
    """
    deadline = Deadline(_LEAVE_TIMEOUT_S)
    while not deadline.passed:
        # The lock is the last that a service lets go of.
        if _is_free(paths):
            return
        time.sleep(_POLL_S)
    raise WherryError(
        f"the service of machine {paths.name} did not leave", hint=f"see {paths.service_log}"
    )


def end_by_force(layout: Layout, paths: MachinePaths) -> bool:
    """End a machine as pulling the plug does, also when its service is dead or hangs.

    :returns: whether there was anything to end.
    :raises WherryError: the system cannot end it.
    """
    ended = False
    deadline = Deadline(_APPEAR_TIMEOUT_S)
    while not _is_free(paths) and not deadline.passed:
        ended = True
        try:
            platform, socket, params = layout.platform, paths.control_socket, {"force": True}
            call(platform, socket, "hello", timeout_s=HELLO_TIMEOUT_S)
            call(platform, socket, "stop", params, timeout_s=_FORCE_TIMEOUT_S)
            wait_gone(layout, paths)
        except NotRunning:
            time.sleep(_POLL_S)  # it comes, or leaves
        except WherryError:
            break
    if not _is_free(paths):
        service = state.read(paths).service
        if service is not None:
            QemuProcess(service, None, paths.service_log).kill()
    orphan = state.find_orphan(paths)
    if orphan is not None:
        QemuProcess(orphan, None, paths.qemu_log).kill()
    if not _exits(paths):
        raise WherryError(
            f"the service of machine {paths.name} runs, but it is not known as which process",
            hint=f"end the process that holds {paths.service_lock}",
        )
    state.mark_stopped(paths)
    return ended or orphan is not None


def _is_free(paths: MachinePaths) -> bool:
    """Whether no service has the machine."""
    try:
        with FileLock(paths.service_lock, timeout=0):
            return True
    except Timeout:
        return False
    except OSError:
        return True  # where no lock can be taken, no service has one


def _exits(paths: MachinePaths) -> bool:
    """Whether a service that does not answer is about to be gone; waits for that."""
    deadline = Deadline(_EXIT_TIMEOUT_S)
    while not _is_free(paths):
        if deadline.passed:
            return False
        time.sleep(_POLL_S)
    return True


def _died(paths: MachinePaths, logged: int) -> WherryError:
    """Explain the end of a service by the last that it said.

    :param logged: the log's size before it began; what is older tells of another.
    """
    try:
        said = paths.service_log.read_bytes()
    except OSError:
        said = b""
    # A log that is shorter than before was rotated.
    said = said[logged if logged <= len(said) else 0 :]
    lines = said.decode(errors="replace").strip().splitlines()
    reason = _LOG_PREFIX.sub("", lines[-1]) if lines else "it left no message"
    return WherryError(
        f"the service of machine {paths.name} ended: {reason}", hint=f"see {paths.service_log}"
    )


def _end(child: Child) -> None:
    child.terminate()
    try:
        child.wait(_LEAVE_TIMEOUT_S)
    except TimeoutExpired:
        child.kill()
        child.wait()
