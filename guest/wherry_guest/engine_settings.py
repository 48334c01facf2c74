"""Giving the engine other settings while it and its containers run.

dockerd is started anew for each change. It could read some of its settings again on SIGHUP,
but dockerd 28.5 then forgets what ``host-gateway`` means until its next start (moby, issue
52057). Containers live through that by dockerd's own ``live-restore``, which is switched on
for it, and stays on until the machine stops: to switch it off again would take a SIGHUP, too.

What dockerd refuses when it starts, its ``finish`` script takes back; see
``images/README.md``.
"""

from __future__ import annotations

import _thread
import json
import os
import time

from wherry_guest import engine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_FILE = "/etc/docker/daemon.json"
_TRIAL = _FILE + ".before"
"""What dockerd had before; there until it has answered with what it has now."""

_PROPOSED = "/run/daemon.json"
_REFUSED = "/run/dockerd.refused"
_SETTINGS = "/usr/lib/wherry/settings"
_SERVICE = "/usr/lib/wherry/services/dockerd"
_RANDOMIZE = "/proc/sys/kernel/randomize_va_space"

_RELOAD_S = 30.0
_STOP_S = 60.0
_START_S = 240.0
_POLL_S = 0.1
_ASK_S = 10.0

_LIVE = "live-restore"


class Refused(Exception):
    """The engine does not work with these settings."""


_busy = _thread.allocate_lock()


def change(text: str, live: bool, socket: str) -> tuple[bool, str]:
    """Have the engine work with these settings.

    :param text: of ``daemon.json``.
    :param live: whether running containers can go on under them.
    :param socket: the engine's.
    :returns: whether it was done, and what the user should know. It is not done when
        containers would have to be stopped for it.
    :raises Refused: by the engine, in its own words; it goes on with what it had.
    :raises OSError: something else is wrong.
    """
    with _busy:
        _check(text)
        state = json.loads(engine.get(socket, "/info", _ASK_S))
        containers = bool(state.get("ContainersRunning") or state.get("ContainersPaused"))
        swarm = (state.get("Swarm") or {}).get("LocalNodeState") == "active"
        if not containers:
            return True, _start_with(text, socket)
        if not live or swarm:  # live-restore and a swarm exclude each other
            return False, ""
        note = _let_live(socket)
        lively = json.dumps({**json.loads(text), _LIVE: True})
        return True, _start_with(lively, socket) or note


def finish() -> None:
    """Wait for a change that is under way: without us the engine would stay stopped."""
    _busy.acquire()


def _check(text: str) -> None:
    """Have dockerd look at the settings; it finds most that is wrong, but not all."""
    _write(_PROPOSED, text)
    status, said = _run(["dockerd", "--validate", "--config-file", _PROPOSED])
    if status != 0:
        raise Refused(said.strip().replace(_PROPOSED, "daemon.json"))


def _let_live(socket: str) -> str:
    """Have the running engine leave its containers alone when it ends; return a note."""
    note = ""
    present: dict[str, Any] = json.loads(_read(_FILE) or "{}")
    if not present.get(_LIVE):
        note = _install(json.dumps({**present, _LIVE: True}))
        os.unlink(_TRIAL)
        _run(["s6-svc", "-h", _SERVICE])
    end = time.monotonic() + _RELOAD_S
    while not json.loads(engine.get(socket, "/info", _ASK_S)).get("LiveRestoreEnabled"):
        if time.monotonic() > end:
            raise OSError("the engine does not take live-restore; see its log")
        time.sleep(_POLL_S)
    return note


def _start_with(text: str, socket: str) -> str:
    """Start dockerd anew; if it does not work with the settings, with those before."""
    status, _ = _run(["s6-svc", "-wD", "-T", f"{_STOP_S * 1000:.0f}", "-d", _SERVICE])
    if status != 0:
        _run(["s6-svc", "-u", _SERVICE])
        raise OSError(f"the engine did not stop within {_STOP_S:g} s; it will start anew")
    randomized = _read(_RANDOMIZE)
    try:
        note = _install(text)
        # As while booting (images/README.md): emulated, iptables is several times faster so.
        if "norandmaps" in _read("/proc/cmdline").split():
            _write(_RANDOMIZE, "0")
    finally:
        _run(["s6-svc", "-u", _SERVICE])
    try:
        _await_engine(socket)
    finally:
        _write(_RANDOMIZE, randomized)
    try:
        os.unlink(_TRIAL)
    except FileNotFoundError:
        reason = _read(_REFUSED).strip() or "it did not start with them; see its log"
        raise Refused(reason) from None
    return note


def _await_engine(socket: str) -> None:
    end = time.monotonic() + _START_S
    while True:
        try:
            engine.ping(socket, _ASK_S)
            return
        except OSError:
            if time.monotonic() > end:
                raise
        time.sleep(_POLL_S)


def _install(text: str) -> str:
    """Put the settings in place and return the note that the script makes of it."""
    _write(_PROPOSED, text)
    status, said = _run([_SETTINGS, _PROPOSED])
    if status != 0:
        raise OSError(f"{_FILE} cannot be written: {said.strip()}")
    return said.strip().removeprefix("wherry: warning: ")


def _run(argv: list[str]) -> tuple[int, str]:
    """Run a program and return its status and what it said, on either output."""
    reader, writer = os.pipe()
    try:
        process = os.posix_spawnp(
            argv[0],
            argv,
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, writer, 1), (os.POSIX_SPAWN_DUP2, writer, 2)],
        )
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    with os.fdopen(reader, encoding="utf-8", errors="replace") as file:
        said = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), said


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def _write(path: str, text: str) -> None:
    # Addresses of proxies may have passwords in them.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
