"""The service's own conversation with the engine: is it there, what runs in it."""

from __future__ import annotations

import json
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import h11

from wherry.core.errors import TunnelError, WherryError
from wherry.tunnel.stream import Stream

SOCKET = "/run/docker.sock"
"""The engine's socket in the guest."""

_CHUNK_BYTES = 1 << 16
_RETRY_S = 1.0
_JOIN_S = 5.0

_EVENTS = "/events?filters=" + json.dumps(
    {
        "type": ["container", "network"],
        "event": ["start", "die", "restart", "rename", "connect", "disconnect"],
    },
    separators=(",", ":"),
).replace('"', "%22")


def request(
    stream: Stream, target: str, *, method: str = "GET"
) -> tuple[h11.Response, Iterator[bytes]]:
    """Send one request over a new connection; return the answer's head and body.

    :param stream: closed when the body ends, and by the caller on its failing paths.
    :raises WherryError: the engine went away, or does not speak HTTP.
    """
    connection = h11.Connection(h11.CLIENT)
    headers = [("Host", "docker"), ("Connection", "close")]
    if method == "POST":
        headers.append(("Content-Length", "0"))
    question = h11.Request(method=method, target=target, headers=headers)

    def next_event() -> Any:
        while True:
            event = connection.next_event()
            if event is not h11.NEED_DATA:
                return event
            connection.receive_data(stream.recv(_CHUNK_BYTES))

    def body() -> Iterator[bytes]:
        try:
            while isinstance(event := next_event(), h11.Data):
                yield bytes(event.data)
        except (TunnelError, h11.ProtocolError) as error:
            raise WherryError(f"the engine broke off its answer: {error}") from error
        finally:
            stream.close()

    try:
        head, end = connection.send(question), connection.send(h11.EndOfMessage())
        stream.sendall((head or b"") + (end or b""))
        response = next_event()
        if not isinstance(response, h11.Response):
            raise WherryError("the engine closed the connection without an answer")
    except (TunnelError, h11.ProtocolError) as error:
        stream.close()
        raise WherryError(f"the engine did not answer: {error}") from error
    except BaseException:
        stream.close()
        raise
    return response, body()


def ping(stream: Stream) -> str:
    """Ask ``GET /_ping`` (Engine API, System) and return the engine's version.

    :raises WherryError: it answered something else, or nothing.
    """
    response, body = request(stream, "/_ping")
    said = b"".join(body)
    if response.status_code != 200:
        raise WherryError(f"the engine answered {response.status_code}: {said[:200]!r}")
    for name, value in response.headers:
        if name == b"server" and value.startswith(b"Docker/"):
            return value.split()[0].removeprefix(b"Docker/").decode("ascii", "replace")
    return ""


def fetch(stream: Stream, target: str) -> Any:
    """Return what a GET request gives, as JSON.

    :param stream: closed when it has come.
    :raises WherryError: the engine answers something else, or nothing.
    """
    response, body = request(stream, target)
    answer = b"".join(body)
    if response.status_code != 200:
        raise WherryError(f"the engine answered {response.status_code}: {answer[:200]!r}")
    try:
        return json.loads(answer)
    except ValueError as error:
        raise WherryError(f"the engine's answer to {target} is no JSON: {error}") from error


def quoted(name: str) -> str:
    """Return a name as one part of a target's path."""
    return urllib.parse.quote(name, safe="")


def containers(stream: Stream) -> list[dict[str, Any]]:
    """Return the running containers, as ``GET /containers/json`` has them.

    :raises WherryError: the engine does not tell.
    """
    found: list[dict[str, Any]] = fetch(stream, "/containers/json")
    return found


def inspect(stream: Stream, container: str) -> dict[str, Any]:
    """Return what ``GET /containers/{id}/json`` has of a container.

    :param container: its id, a prefix of it, or its name.
    :raises WherryError: there is none, or the engine does not tell.
    """
    found: dict[str, Any] = fetch(stream, f"/containers/{quoted(container)}/json")
    return found


def stop(stream: Stream, container: str) -> None:
    """End a container at once.

    :raises WherryError: the engine does not.
    """
    target = f"/containers/{quoted(container)}/stop?t=0"
    response, body = request(stream, target, method="POST")
    answer = b"".join(body)
    if response.status_code not in (204, 304):
        raise WherryError(f"the engine answered {response.status_code}: {answer[:200]!r}")


class ContainerWatch:
    """Calls back at first and after each change of the running containers.

    When the connection to the engine breaks it calls back anew, so no change is missed
    for longer than an outage.

    :param open_stream: makes a new connection to the engine; waits during an outage.
    :param changed: called in the watch's thread.
    """

    def __init__(
        self,
        open_stream: Callable[[], Stream],
        changed: Callable[[], None],
    ) -> None:
        self._open_stream = open_stream
        self._changed = changed
        self._closed = threading.Event()
        self._stream: Stream | None = None
        self._thread = threading.Thread(target=self._watch, name="container watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the watch and its thread."""
        self._closed.set()
        stream = self._stream
        if stream is not None:
            stream.close()
        self._thread.join(_JOIN_S)

    def _watch(self) -> None:
        while not self._closed.is_set():
            try:
                self._stream = stream = self._open_stream()
                answer, events = request(stream, _EVENTS)
                if answer.status_code != 200:
                    stream.close()
                    raise WherryError(f"the engine answered {answer.status_code}")
                # After the events began, so that nothing falls in between.
                self._changed()
                for _ in events:
                    self._changed()
            except WherryError:
                pass  # the tunnel or the engine went away: begin anew
            self._closed.wait(_RETRY_S)
