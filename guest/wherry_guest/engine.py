"""Asking the engine whether it is well."""

from __future__ import annotations

import socket
import time

_ANSWER_BYTES_MAX = 64 * 1024


def ping(path: str, timeout_s: float) -> str:
    """Return the version of an engine that answers; an empty string if it does not tell.

    ``GET /_ping`` (Engine API, "System"). The version is in the ``Server`` header, as in
    ``Docker/28.5.2 (linux)``, which the engine puts in every answer. ``/version`` would say
    more, but makes the engine run two programs each time.

    :param timeout_s: bound of the whole exchange, in seconds.
    :raises OSError: it did not answer in time, or its answer was not "200".
    """
    return parse(_ask(path, "/_ping", timeout_s))


def get(path: str, target: str, timeout_s: float) -> bytes:
    """Return the body of the engine's answer to a GET request.

    :raises OSError: as :func:`ping`.
    """
    answer = _ask(path, target, timeout_s)
    parse(answer)
    return answer.partition(b"\r\n\r\n")[2]


def _ask(path: str, target: str, timeout_s: float) -> bytes:
    deadline = time.monotonic() + timeout_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as engine:
        engine.settimeout(timeout_s)
        engine.connect(path)
        # With HTTP/1.0 the answer ends where the connection does (RFC 1945, 7.2.2).
        engine.sendall(f"GET {target} HTTP/1.0\r\nHost: docker\r\n\r\n".encode())
        answer = b""
        while len(answer) <= _ANSWER_BYTES_MAX:
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                raise TimeoutError("timed out")
            engine.settimeout(remaining_s)
            data = engine.recv(_ANSWER_BYTES_MAX)
            if not data:
                break
            answer += data
    return answer


def parse(answer: bytes) -> str:
    """Return the engine's version from its answer to a ping.

    :raises OSError: the answer's status is not 200, or it is not HTTP.
    """
    head = answer.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
    status = head[0].split(None, 2)
    if len(status) < 2 or not status[0].startswith("HTTP/1.") or status[1] != "200":
        raise OSError(f"the engine answered {head[0][:80]!r}")
    for line in head[1:]:
        name, _, value = line.partition(":")
        product, _, version = value.strip().partition("/")
        if name.lower() == "server" and product == "Docker":
            return version.partition(" ")[0]
    return ""
