"""Starting a machine's service from a command, exactly once."""

from __future__ import annotations

import os
import sys
import time

from wherry.config.layout import Layout, MachinePaths
from wherry.control.client import call
from wherry.core.clock import Deadline
from wherry.core.errors import NotRunning, WherryError
from wherry.core.processes import Argument, Child, spawn

ALREADY_RUNS = 75
"""Exit status of a service that found another one at work (EX_TEMPFAIL, sysexits.h)."""

SERVICE_ARGUMENT = "--service"
"""What makes the frozen program run as a service."""

_APPEAR_TIMEOUT_S = 20.0
_LEAVE_TIMEOUT_S = 10.0
_POLL_S = 0.02


def answers(layout: Layout, paths: MachinePaths) -> bool:
    """Whether the machine's service answers."""
    try:
        call(layout.platform, paths.control_socket, "hello")
    except WherryError:
        return False
    return True


def ensure(layout: Layout, paths: MachinePaths) -> bool:
    """Have a service for the machine; return whether this call started it.

    :raises WherryError: it did not come up.
    """
    if answers(layout, paths):
        return False
    child = spawn(
        command(paths.name), env={"WHERRY_HOME": os.fspath(layout.home)}, new_session=True
    )
    deadline = Deadline(_APPEAR_TIMEOUT_S)
    while not deadline.passed:
        if answers(layout, paths):
            # Two starts at once: the loser's child ends, the winner's answers.
            return child.poll() is None
        status = child.poll()
        if status not in (None, ALREADY_RUNS):
            raise _died(paths)
        time.sleep(_POLL_S)
    _end(child)
    raise WherryError(
        f"the service of machine {paths.name} did not answer within {_APPEAR_TIMEOUT_S:g} s",
        hint=f"see {paths.service_log}",
    )


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
        try:
            call(layout.platform, paths.control_socket, "hello")
        except NotRunning:
            return
        except WherryError:
            pass
        time.sleep(_POLL_S)
    raise WherryError(
        f"the service of machine {paths.name} did not leave", hint=f"see {paths.service_log}"
    )


def _died(paths: MachinePaths) -> WherryError:
    try:
        lines = paths.service_log.read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    reason = lines[-1] if lines else "it left no message"
    return WherryError(
        f"the service of machine {paths.name} ended: {reason}", hint=f"see {paths.service_log}"
    )


def _end(child: Child) -> None:
    child.terminate()
    try:
        child.wait(_LEAVE_TIMEOUT_S)
    except Exception:
        child.kill()
        child.wait()
