"""Runs a program that dies with this one: ``python -m wherry.platform.windows.leash PROGRAM…``.

See :meth:`wherry.platform.base.Platform.leash`.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from typing import Any

import win32api
import win32job

from wherry.core.processes import spawn

assert sys.platform == "win32"  # Type checkers look on for Windows alone.


def run(argv: Sequence[str]) -> int:
    """Run a program to its end and return its status; kill it when our input ends."""
    # Never closed: the system does that when this process ends, however it does.
    job = _join_job()
    threading.Thread(target=_wait_for_end, args=(job,), name="leash", daemon=True).start()
    return spawn(argv, stdout=None, stderr=None).wait()


def _join_job() -> Any:
    """Put this process, and all that it starts, into a job that is killed with its last handle."""
    job = win32job.CreateJobObject(None, "")
    kind = win32job.JobObjectExtendedLimitInformation
    limits = win32job.QueryInformationJobObject(job, kind)
    limits["BasicLimitInformation"]["LimitFlags"] |= win32job.JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE
    win32job.SetInformationJobObject(job, kind, limits)
    win32job.AssignProcessToJobObject(job, win32api.GetCurrentProcess())
    return job


def _wait_for_end(job: Any) -> None:
    while os.read(0, 4096):
        pass
    win32job.TerminateJobObject(job, 1)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
