"""The control API: requests, events, errors, and clients and services that leave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from wherry.control import client
from wherry.control.client import call
from wherry.control.server import ControlServer, Emit, Handler
from wherry.core.bridge import in_thread
from wherry.core.errors import NotRunning, StageError, WherryError
from wherry.platform import Platform

WAIT_S = 10.0


@contextlib.asynccontextmanager
async def serving(host: Platform, path: Path, **handlers: Handler) -> AsyncIterator[ControlServer]:
    server = ControlServer(host.listen_local(path), handlers, asyncio.get_running_loop())
    try:
        yield server
    finally:
        await in_thread(server.close, name="close")


async def ask(host: Platform, path: Path, method: str, *rest: Any, **options: Any) -> Any:
    return await in_thread(lambda: call(host, path, method, *rest, **options), name="client")


async def raw(path: Path, data: bytes) -> bytes:
    """Send bytes and return all that is answered."""

    def talk() -> bytes:
        answer = b""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(WAIT_S)
            client.connect(str(path))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                client.sendall(data)
                if not data:
                    client.shutdown(socket.SHUT_WR)
                while chunk := client.recv(65536):
                    answer += chunk
        return answer

    return await in_thread(talk, name="raw client")


async def echo(params: Mapping[str, Any], emit: Emit) -> Any:
    return dict(params)


def test_a_request_and_its_result(host: Platform, tmp_path: Path) -> None:
    async def work() -> None:
        async with serving(host, tmp_path / "s", echo=echo):
            assert await ask(host, tmp_path / "s", "echo", {"a": [1, "ü"]}) == {"a": [1, "ü"]}
            assert await ask(host, tmp_path / "s", "echo") == {}

    asyncio.run(work())


def test_events_come_before_the_result_in_their_order(host: Platform, tmp_path: Path) -> None:
    async def count(params: Mapping[str, Any], emit: Emit) -> str:
        for number in range(500):
            emit({"number": number})
        return "x" * 200_000

    async def work() -> None:
        events: list[Mapping[str, Any]] = []
        async with serving(host, tmp_path / "s", count=count):
            result = await ask(host, tmp_path / "s", "count", on_event=events.append)
        assert result == "x" * 200_000
        assert [event["number"] for event in events] == list(range(500))

    asyncio.run(work())


def test_errors_keep_their_hint_and_exit_status(host: Platform, tmp_path: Path) -> None:
    async def fail(params: Mapping[str, Any], emit: Emit) -> None:
        raise NotRunning("it is off", hint="start it")

    async def fail_stage(params: Mapping[str, Any], emit: Emit) -> None:
        raise StageError("boot", "nothing within 5 s", hint="look")

    async def work() -> None:
        async with serving(host, tmp_path / "s", fail=fail, fail_stage=fail_stage):
            with pytest.raises(WherryError) as caught:
                await ask(host, tmp_path / "s", "fail")
            assert (caught.value.exit_status, str(caught.value)) == (4, "it is off; start it")
            with pytest.raises(WherryError, match="boot: nothing within 5 s; look"):
                await ask(host, tmp_path / "s", "fail_stage")
            with pytest.raises(WherryError, match="does not know 'other'; it is another version"):
                await ask(host, tmp_path / "s", "other")

    asyncio.run(work())


@pytest.mark.parametrize("error", [OSError("disk"), AttributeError("bug"), AssertionError()])
def test_a_handlers_bug_is_answered_and_not_waited_for(
    error: Exception, host: Platform, tmp_path: Path
) -> None:
    async def fail(params: Mapping[str, Any], emit: Emit) -> None:
        raise error

    async def work() -> None:
        async with serving(host, tmp_path / "s", fail=fail, echo=echo):
            with pytest.raises(WherryError, match=type(error).__name__):
                await asyncio.wait_for(ask(host, tmp_path / "s", "fail"), WAIT_S)
            assert await ask(host, tmp_path / "s", "echo") == {}

    asyncio.run(work())


@pytest.mark.parametrize("line", [b"{\n", b"[]\n", b"null\n", b"7\n", b"{}\n", b"\xff\n", b"\n"])
def test_a_malformed_request_is_answered(line: bytes, host: Platform, tmp_path: Path) -> None:
    async def work() -> None:
        async with serving(host, tmp_path / "s", echo=echo):
            answer = json.loads(await raw(tmp_path / "s", line))
            assert "malformed request" in answer["error"]["message"]

    asyncio.run(work())


def test_clients_that_send_nothing_or_too_much_are_dropped(host: Platform, tmp_path: Path) -> None:
    async def work() -> None:
        async with serving(host, tmp_path / "s", echo=echo):
            assert await raw(tmp_path / "s", b"") == b""
            assert await raw(tmp_path / "s", b"x" * (3 << 20)) == b""
            assert await ask(host, tmp_path / "s", "echo") == {}

    asyncio.run(work())


def test_a_client_that_leaves_cancels_its_request(host: Platform, tmp_path: Path) -> None:
    async def work() -> None:
        begun, cancelled = asyncio.Event(), asyncio.Event()

        async def forever(params: Mapping[str, Any], emit: Emit) -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        async with serving(host, tmp_path / "s", forever=forever):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(tmp_path / "s"))
                client.sendall(b'{"method": "forever"}\n')
                await asyncio.wait_for(begun.wait(), WAIT_S)
            await asyncio.wait_for(cancelled.wait(), WAIT_S)

    asyncio.run(work())


def test_a_client_that_does_not_read_is_dropped_and_blocks_nobody(
    host: Platform, tmp_path: Path
) -> None:
    async def work() -> None:
        async def flood(params: Mapping[str, Any], emit: Emit) -> None:
            for _ in range(3000):
                emit({"data": "x" * 1000})
            await asyncio.Event().wait()

        async with serving(host, tmp_path / "s", flood=flood, echo=echo):
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(WAIT_S)
                client.connect(str(tmp_path / "s"))
                client.sendall(b'{"method": "flood"}\n')
                assert await ask(host, tmp_path / "s", "echo") == {}

                def drain() -> int:
                    size = 0
                    while chunk := client.recv(1 << 20):
                        size += len(chunk)
                    return size

                assert await in_thread(drain, name="drain") < 3000 * 1000

    asyncio.run(work())


def test_closing_with_clients_in_every_state(host: Platform, tmp_path: Path) -> None:
    """One has sent nothing, one half a line, one waits: all are let go, and no thread stays."""

    async def work() -> None:
        async def forever(params: Mapping[str, Any], emit: Emit) -> None:
            emit({"here": True})
            await asyncio.Event().wait()

        lines = (b"", b'{"met', b'{"method": "forever"}\n')
        before = set(threading.enumerate())
        clients = [socket.socket(socket.AF_UNIX) for _ in range(3)]
        async with serving(host, tmp_path / "s", forever=forever):
            for client, data in zip(clients, lines, strict=True):
                client.settimeout(WAIT_S)
                client.connect(str(tmp_path / "s"))
                client.sendall(data)
            assert await in_thread(lambda: clients[2].recv(100), name="client")
        for client in clients:
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(100) == b""
            client.close()
        left = {thread.name for thread in set(threading.enumerate()) - before if thread.is_alive()}
        assert not {name for name in left if name.startswith("control")}
        assert not (tmp_path / "s").exists()

    asyncio.run(work())


def test_answers_under_way_go_out_before_the_end(host: Platform, tmp_path: Path) -> None:
    async def work() -> None:
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def wait(params: Mapping[str, Any], emit: Emit) -> str:
            emit({"waiting": True})
            await asyncio.shield(ended)
            return "ended"

        arrived = threading.Semaphore(0)
        async with serving(host, tmp_path / "s", wait=wait) as server:
            waiting = [
                asyncio.create_task(
                    ask(host, tmp_path / "s", "wait", on_event=lambda event: arrived.release())
                )
                for _ in range(5)
            ]
            for _ in waiting:
                assert await in_thread(lambda: arrived.acquire(timeout=WAIT_S), name="arrived")
            ended.set_result(None)
            await server.drain(WAIT_S)
        assert await asyncio.gather(*waiting) == ["ended"] * 5

    asyncio.run(work())


def test_no_service(host: Platform, tmp_path: Path) -> None:
    with pytest.raises(NotRunning):
        call(host, tmp_path / "absent", "hello")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "stale"))
    with pytest.raises(NotRunning):
        call(host, tmp_path / "stale", "hello")


@contextlib.contextmanager
def service(path: Path, behave: Callable[[socket.socket], None]) -> Any:
    """A service that answers one client as the test says."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(65536)
                behave(client)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join(WAIT_S)


@pytest.mark.parametrize("said", [b"", b'{"event": {}}\n', b'{"resu', b'{"event": {}}\n{"result"'])
def test_a_service_that_dies_ends_the_call(said: bytes, host: Platform, tmp_path: Path) -> None:
    with (
        service(tmp_path / "s", lambda client: client.sendall(said)),
        pytest.raises(WherryError, match="ended before it answered; see: wherry logs"),
    ):
        call(host, tmp_path / "s", "status")


@pytest.mark.parametrize("said", [b"hello\n", b"[]\n", b"{}\n", b'{"error": 5}\n'])
def test_a_service_that_answers_nonsense_ends_the_call(
    said: bytes, host: Platform, tmp_path: Path
) -> None:
    with (
        service(tmp_path / "s", lambda client: client.sendall(said)),
        pytest.raises(WherryError, match="answered something else"),
    ):
        call(host, tmp_path / "s", "status")


def test_a_service_that_hangs_ends_a_call_with_a_bound(host: Platform, tmp_path: Path) -> None:
    left = threading.Event()
    with (
        service(tmp_path / "s", lambda client: left.set() if client.recv(1) == b"" else None),
        pytest.raises(WherryError, match=r"did not answer within 0\.05 s"),
    ):
        call(host, tmp_path / "s", "status", timeout_s=0.05)
    assert left.wait(WAIT_S)


def test_a_service_that_leaves_and_does_not_answer_ends_a_call_too(
    host: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It listens no more, so it is not asked whether it hangs."""
    monkeypatch.setattr(client, "_PULSE_S", 0.02)
    monkeypatch.setattr(client, "_LEAVES_S", 0.05)
    left = threading.Event()

    def leave(connection: socket.socket) -> None:
        (tmp_path / "s").unlink()
        if connection.recv(1) == b"":
            left.set()

    with service(tmp_path / "s", leave), pytest.raises(WherryError, match="did not answer"):
        call(host, tmp_path / "s", "wait_stopped")
    assert left.wait(WAIT_S)
