"""The service's end of the control API: two threads a connection, handlers on the loop."""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import socket
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

from wherry.control import MAX_LINE_BYTES
from wherry.core.errors import WherryError
from wherry.platform import LocalListener, LocalStream

Emit = Callable[[Mapping[str, Any]], None]
"""Sends an event to the client; from any thread, never blocks."""

Handler = Callable[[Mapping[str, Any], Emit], Awaitable[Any]]

_EVENTS_QUEUED = 1000
"""A client that falls this many events behind is disconnected."""

_JOIN_TIMEOUT_S = 2.0

log = logging.getLogger(__name__)


class ControlServer:
    """Serves control requests until it is closed.

    :param handlers: coroutine functions by method name, run on ``loop``.
    """

    def __init__(
        self,
        listener: LocalListener,
        handlers: Mapping[str, Handler],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._listener = listener
        self._handlers = handlers
        self._loop = loop
        self._connections: set[_Connection] = set()
        self._lock = threading.Lock()
        self._requests: set[asyncio.Task[Any]] = set()
        self._acceptor = threading.Thread(target=self._accept, name="control accept", daemon=True)
        self._acceptor.start()

    async def drain(self, timeout_s: float) -> None:
        """Let requests that are under way be answered; on the loop, before :meth:`close`."""
        if self._requests:
            await asyncio.wait(set(self._requests), timeout=timeout_s)

    def close(self) -> None:
        """Stop listening, let the answers given so far out, and end the threads."""
        self._listener.close()
        self._acceptor.join(_JOIN_TIMEOUT_S)
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.finish()

    def _accept(self) -> None:
        while True:
            try:
                stream = self._listener.accept()
            except OSError:
                return
            connection = _Connection(stream, self._answer, self._loop, self._forget)
            with self._lock:
                self._connections.add(connection)
            connection.start()

    async def _answer(self, line: bytes, emit: Emit) -> Mapping[str, Any]:
        """Run one request and return its last line."""
        task = asyncio.current_task()
        assert task is not None  # coroutines of a loop run in tasks
        self._requests.add(task)
        try:
            request = json.loads(line)
            handler = self._handlers.get(request["method"])
            if handler is None:
                raise WherryError(
                    f"this machine's service does not know {request['method']!r}",
                    hint="it is another version: wherry restart",
                )
            return {"result": await handler(request.get("params") or {}, emit)}
        except WherryError as error:
            status = error.exit_status
            fields = {"message": error.message, "hint": error.hint, "exit_status": status}
            return {"error": fields}
        except (ValueError, TypeError, KeyError) as error:
            log.exception("a control request failed")
            return {"error": {"message": f"malformed request: {error!r}", "hint": ""}}
        except Exception as error:
            # Whatever it is, the client waits for an answer.
            log.exception("a control request failed")
            said = f"an error in the machine's service: {error!r}"
            return {"error": {"message": said, "hint": "see: wherry logs"}}
        finally:
            self._requests.discard(task)

    def _forget(self, connection: _Connection) -> None:
        with self._lock:
            self._connections.discard(connection)


class _Connection:
    """One request: a thread reads it and then waits for the client to leave; a
    second one writes, so that no slow client ever blocks the loop."""

    def __init__(
        self,
        stream: LocalStream,
        answer: Callable[[bytes, Emit], Coroutine[Any, Any, Mapping[str, Any]]],
        loop: asyncio.AbstractEventLoop,
        on_end: Callable[[_Connection], None],
    ) -> None:
        self._stream = stream
        self._answer = answer
        self._loop = loop
        self._on_end = on_end
        self._lines: queue.Queue[bytes | None] = queue.Queue(_EVENTS_QUEUED)
        self._reader = threading.Thread(target=self._read, name="control read", daemon=True)
        self._writer = threading.Thread(target=self._write, name="control write", daemon=True)

    def start(self) -> None:
        self._reader.start()

    def finish(self) -> None:
        """End the connection once what is queued is written, or after a bound."""
        self._put(None)
        if self._writer.ident is not None:  # else there was no request yet
            self._writer.join(_JOIN_TIMEOUT_S)
        self._shutdown()
        self._reader.join(_JOIN_TIMEOUT_S)

    def _read(self) -> None:
        try:
            line = _read_line(self._stream)
            if line is None:
                return
            self._writer.start()
            future = asyncio.run_coroutine_threadsafe(self._run(line), self._loop)
            # The client sends nothing more: whatever comes is the end of its interest.
            try:
                while self._stream.recv(4096):
                    pass
            except OSError:
                pass
            future.cancel()
            self._put(None)
            self._writer.join(_JOIN_TIMEOUT_S)
        except (OSError, RuntimeError):
            pass  # the client left, or the loop has ended
        finally:
            self._stream.close()
            self._on_end(self)

    async def _run(self, line: bytes) -> None:
        self._put(_encode(await self._answer(line, self._emit)))
        self._put(None)

    def _emit(self, event: Mapping[str, Any]) -> None:
        self._put(_encode({"event": event}))

    def _put(self, line: bytes | None) -> None:
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._shutdown()

    def _write(self) -> None:
        try:
            while (line := self._lines.get()) is not None:
                self._stream.sendall(line)
        except OSError:
            pass
        finally:
            self._shutdown()

    def _shutdown(self) -> None:
        try:
            self._stream.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


def _encode(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _read_line(stream: LocalStream) -> bytes | None:
    line = bytearray()
    while not line.endswith(b"\n"):
        chunk = stream.recv(65536)
        if not chunk or len(line) > MAX_LINE_BYTES:
            return None
        line += chunk
    return bytes(line)
