"""The command line's end of the control API."""

from __future__ import annotations

import contextlib
import json
import socket as sockets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from wherry.control import MAX_LINE_BYTES
from wherry.core.errors import NotRunning, WherryError
from wherry.platform import Platform

HELLO_TIMEOUT_S = 5.0
"""A service answers this at once, unless it hangs."""

_CONNECT_TIMEOUT_S = 5.0
_PULSE_S = 5.0
_LEAVES_S = 60.0
"""How long an answer may be on its way when nothing listens any more; the last thing that a
service does is to send it."""


def call(
    platform: Platform,
    socket: Path,
    method: str,
    params: Mapping[str, Any] | None = None,
    *,
    on_event: Callable[[Mapping[str, Any]], None] = lambda event: None,
    timeout_s: float | None = None,
) -> Any:
    """Ask a machine's service and return its result.

    :param on_event: called with each event before the result.
    :param timeout_s: seconds, for what a service answers at once unless it hangs. None for
        as long as it lives: it bounds each of its stages itself, a service that dies ends
        the call, and one that hangs does not answer the greeting that is sent meanwhile.
    :raises NotRunning: no service listens.
    :raises WherryError: what the service reports, with its exit status.
    """
    try:
        stream = platform.connect_local(socket, _CONNECT_TIMEOUT_S)
    except OSError as error:
        raise NotRunning("the machine's service does not run", hint="wherry start") from error
    over, late = threading.Event(), threading.Event()

    def watch() -> None:
        if timeout_s is None:
            heard = time.monotonic()
            while not over.wait(_PULSE_S):
                try:
                    call(platform, socket, "hello", timeout_s=HELLO_TIMEOUT_S)
                    heard = time.monotonic()
                except NotRunning:
                    if time.monotonic() - heard > _LEAVES_S:
                        break
                except WherryError:
                    break
        else:
            over.wait(timeout_s)
        if not over.is_set():
            late.set()
            with contextlib.suppress(OSError):  # it was closed just now
                stream.shutdown(sockets.SHUT_RDWR)

    threading.Thread(target=watch, name="control watch", daemon=True).start()
    try:
        request = {"method": method, "params": dict(params or {})}
        stream.sendall(json.dumps(request).encode() + b"\n")
        buffered = b""
        while True:
            while b"\n" not in buffered:
                chunk = stream.recv(65536)
                if not chunk or len(buffered) > MAX_LINE_BYTES:
                    raise EOFError
                buffered += chunk
            line, buffered = buffered.split(b"\n", 1)
            reply = json.loads(line)
            if "event" in reply:
                on_event(reply["event"])
            elif "error" in reply:
                raise _failure(reply["error"])
            else:
                return reply["result"]
    except (OSError, EOFError) as error:
        if late.is_set():
            raise WherryError(
                f"the machine's service did not answer within {timeout_s or HELLO_TIMEOUT_S:g} s",
                hint="it may hang; see: wherry logs",
            ) from error
        raise _ended() from error
    except (ValueError, KeyError, TypeError) as error:
        raise WherryError(
            f"the machine's service answered something else: {error!r}",
            hint="it is another version: end it and start the machine again",
        ) from error
    finally:
        over.set()
        stream.close()


def _ended() -> WherryError:
    return WherryError(
        "the machine's service ended before it answered",
        hint="see: wherry logs --source service",
    )


def _failure(fields: Mapping[str, Any]) -> WherryError:
    error = WherryError(str(fields["message"]), hint=str(fields.get("hint", "")))
    error.exit_status = int(fields.get("exit_status", 1))
    return error
