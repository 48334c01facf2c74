"""The only door to other programs.

Every program runs without a shell, with a time limit, and a failure carries the
last lines of what the program said.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from wherry.core.errors import WherryError

Argument = str | os.PathLike[str]
Child = subprocess.Popen[bytes]
TimeoutExpired = subprocess.TimeoutExpired
PIPE = subprocess.PIPE
STDOUT = subprocess.STDOUT

_STDERR_LINES_SHOWN = 5

# Windows has no sessions. A console of its own that nobody sees keeps a program, and what it
# starts in turn, from the user's console and from what is typed there.
_DETACHED = getattr(subprocess, "CREATE_NO_WINDOW", 0) | getattr(
    subprocess, "CREATE_NEW_PROCESS_GROUP", 0
)


def run(
    argv: Sequence[Argument],
    *,
    timeout_s: float,
    input: bytes | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    hint: str = "",
    check: bool = True,
) -> subprocess.CompletedProcess[bytes]:
    """Run a program to its end and return what it printed.

    :param timeout_s: seconds after which the program is killed.
    :param env: variables added to this process's environment.
    :param hint: what to tell the user when the program is missing or fails.
    :param check: raise when the exit status is not 0.
    :raises WherryError: the program is missing, ran out of time, or failed.
    """
    name = os.fspath(argv[0])
    try:
        done = subprocess.run(
            [os.fspath(argument) for argument in argv],
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            timeout=timeout_s,
            env={**os.environ, **env} if env is not None else None,
            cwd=cwd,
            check=False,
        )
    except FileNotFoundError as error:
        raise WherryError(f"{name} is not installed or not on PATH", hint=hint) from error
    except OSError as error:
        raise WherryError(f"{name} cannot be executed: {error.strerror}", hint=hint) from error
    except subprocess.TimeoutExpired as error:
        raise WherryError(f"{name} did not finish within {timeout_s:g} s", hint=hint) from error
    if check and done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        reason = " / ".join(said[-_STDERR_LINES_SHOWN:]) or "it printed no reason"
        raise WherryError(f"{name} failed with status {done.returncode}: {reason}", hint=hint)
    return done


def spawn(
    argv: Sequence[Argument],
    *,
    stdin: int | None = subprocess.DEVNULL,
    stdout: int | None = subprocess.DEVNULL,
    stderr: int | None = subprocess.DEVNULL,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    new_session: bool = False,
    hint: str = "",
) -> Child:
    """Start a program that runs beside us; the caller owns it and ends it.

    :param env: variables added to this process's environment.
    :param new_session: detach it from our terminal and our process group, so that
        a Ctrl-C meant for us does not reach it.
    :raises WherryError: the program is missing or cannot be executed.
    """
    name = os.fspath(argv[0])
    try:
        return subprocess.Popen(
            [os.fspath(argument) for argument in argv],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env={**os.environ, **env} if env is not None else None,
            pass_fds=pass_fds,
            start_new_session=new_session,
            creationflags=_DETACHED if new_session else 0,
        )
    except FileNotFoundError as error:
        raise WherryError(f"{name} is not installed or not on PATH", hint=hint) from error
    except OSError as error:
        raise WherryError(f"{name} cannot be executed: {error.strerror}", hint=hint) from error
