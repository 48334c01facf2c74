"""The service's own conversation with the engine: is it there, what runs in it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import h11

from wherry.core.errors import TunnelError, WherryError
from wherry.tunnel.stream import Stream

T = TypeVar("T")

Wait = Callable[[threading.Event, float], bool]

SOCKET = "/run/docker.sock"
"""The engine's socket in the guest."""

ANSWER_S = 30.0
"""For an answer that the engine has at hand, which emulated and busy it gives in seconds."""

_WANTED_S = 45.0
"""Opening the connection, which has a bound of its own, comes before."""

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


@contextlib.contextmanager
def _bounded(stream: Stream, timeout_s: float) -> Iterator[None]:
    """Close a stream in which nothing comes to an end, which wakes who waits in it."""
    late = threading.Event()

    def give_up() -> None:
        late.set()
        stream.close()

    timer = threading.Timer(timeout_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    except WherryError as error:
        if late.is_set():
            raise WherryError(f"the engine did not answer within {timeout_s:g} s") from error
        raise
    finally:
        timer.cancel()


def while_wanted(wait: Wait, open_stream: Callable[[], Stream], ask: Callable[[Stream], T]) -> T:
    """Ask the engine on behalf of a client, as long as that is there.

    :param wait: waits for an event with a bound, and raises when the client has left.
    :param ask: uses one connection, and has a bound of its own.
    :raises WherryError: what ``ask`` raises, or there is no answer in time.
    """
    future: concurrent.futures.Future[T] = concurrent.futures.Future()
    done = threading.Event()
    opened: list[Stream] = []

    def body() -> None:
        try:
            opened.append(open_stream())
            future.set_result(ask(opened[0]))
        except BaseException as error:
            future.set_exception(error)
        done.set()

    threading.Thread(target=body, name="engine question", daemon=True).start()
    try:
        if not wait(done, _WANTED_S):
            raise WherryError(f"the engine did not answer within {_WANTED_S:g} s")
        return future.result()
    finally:
        for stream in opened:
            stream.close()


def request(
    stream: Stream, target: str, *, method: str = "GET", timeout_s: float = ANSWER_S
) -> tuple[h11.Response, Iterator[bytes]]:
    """Send one request over a new connection; return the answer's head and body.

    :param stream: closed when the body ends, and by the caller on its failing paths.
    :param timeout_s: for the head; the body has no bound.
    :raises WherryError: the engine went away, or does not speak HTTP.
    """
    with _bounded(stream, timeout_s):
        return _request(stream, target, method)


def _request(stream: Stream, target: str, method: str) -> tuple[h11.Response, Iterator[bytes]]:
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


def _whole(stream: Stream, target: str, *, method: str = "GET") -> tuple[h11.Response, bytes]:
    """Send one request and return the whole answer, which has a bound."""
    with _bounded(stream, ANSWER_S):
        response, body = _request(stream, target, method)
        return response, b"".join(body)


def ping(stream: Stream) -> str:
    """Ask ``GET /_ping`` (Engine API, System) and return the engine's version.

    :raises WherryError: it answered something else, or nothing.
    """
    response, said = _whole(stream, "/_ping")
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
    return _json(*_whole(stream, target))


def _json(response: h11.Response, answer: bytes) -> Any:
    if response.status_code != 200:
        raise WherryError(f"the engine answered {response.status_code}: {answer[:200]!r}")
    try:
        return json.loads(answer)
    except ValueError as error:
        raise WherryError(f"the engine's answer is no JSON: {error}") from error


def quoted(name: str) -> str:
    """Return a name as one part of a target's path."""
    return urllib.parse.quote(name, safe="")


def containers(stream: Stream) -> list[dict[str, Any]]:
    """Return the running containers, as ``GET /containers/json`` has them.

    :raises WherryError: the engine does not tell.
    """
    found: list[dict[str, Any]] = fetch(stream, "/containers/json")
    return found


def inspect(stream: Stream, container: str) -> dict[str, Any] | None:
    """Return what ``GET /containers/{id}/json`` has of a container; None if there is none.

    :param container: its id, a prefix of it, or its name.
    :raises WherryError: the engine does not tell.
    """
    return _found(stream, f"/containers/{quoted(container)}/json")


def network(stream: Stream, name: str) -> dict[str, Any] | None:
    """Return what ``GET /networks/{id}`` has of a network; None if there is none.

    :raises WherryError: the engine does not tell.
    """
    return _found(stream, f"/networks/{quoted(name)}")


def _found(stream: Stream, target: str) -> dict[str, Any] | None:
    response, answer = _whole(stream, target)
    if response.status_code in (400, 404):  # an ambiguous prefix, and none
        return None
    found: dict[str, Any] = _json(response, answer)
    return found


def stop(stream: Stream, container: str) -> None:
    """End a container at once.

    :raises WherryError: the engine does not.
    """
    target = f"/containers/{quoted(container)}/stop?t=0"
    response, answer = _whole(stream, target, method="POST")
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
