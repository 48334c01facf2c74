"""Which requests wait for files, in which direction, and what they are told when that fails."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from wherry.api.answers import Refusal
from wherry.api.hooks import Hooks, Request, Watch
from wherry.api.http import parse_request
from wherry.core.errors import TunnelError, WherryError
from wherry.service.mounts import Mounts
from wherry.sync.barrier import Ticket

ID = "f" * 64


class Session:
    """Answers barriers at once, and notes whether they were to be fresh."""

    def __init__(self, path: str) -> None:
        self.asked: list[bool] = []
        self.error: WherryError | None = None
        self.is_troubled = False
        self.idle_s = 0.0
        self.where = ""

    def ask(self, *, fresh: bool) -> Ticket:
        self.asked.append(fresh)
        ticket = Ticket(0, fresh)
        ticket.finish(self.error)
        return ticket


class Roots:
    kept: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.sessions: dict[str, Session] = {}

    def require(self, path: str, *, read_only: bool = False) -> Session:
        return self.sessions.setdefault(path, Session(path))

    def holding(self, path: str) -> Session | None:
        return self.sessions.get(path)

    def all(self) -> list[Session]:
        return list(self.sessions.values())


class NoTunnel:
    """The engine and the guest are not to be asked."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was called")


class StuckEngine:
    """Nothing comes from the engine in time."""

    def open_unix(self, path: str) -> Any:
        raise TunnelError("the guest did not answer in time")


class Api:
    """Sends requests through the hooks, as the endpoint does."""

    def __init__(self, shared: Path, tunnel: object = None) -> None:
        self.hooks = Hooks()
        self.roots = Roots()
        Mounts(self.hooks, self.roots, tunnel or NoTunnel(), [str(shared)])  # type: ignore[arg-type]

    def send(self, method: str, target: str, body: object = None) -> Watch:
        raw = f"{method} {target} HTTP/1.1\r\nHost: docker\r\n\r\n".encode()
        head = parse_request(raw)
        match = self.hooks.match(head)
        watches: list[Watch] = []
        if match is not None:
            data = None if body is None else json.dumps(body).encode()
            match.run(Request(head, data, threading.Event.wait), watches)
        return watches[0] if watches else Watch()

    def create(self, source: Path | str, name: str) -> None:
        body = {"HostConfig": {"Binds": [f"{source}:/src"]}} if source else {}
        watch = self.send("POST", f"/v1.51/containers/create?name={name}", body)
        assert watch.line is not None
        watch.line(json.dumps({"Id": ID}).encode())


@pytest.mark.parametrize(
    "target", ["start", "restart", "unpause", "archive?path=/", "exec"], ids=lambda each: each[:7]
)
def test_without_knowing_the_mounts_no_process_starts(target: str, tmp_path: Path) -> None:
    """It would see files of yesterday; what ends a process has to work all the same."""
    api = Api(tmp_path, StuckEngine())
    with pytest.raises(Refusal, match="does not tell what container box mounts"):
        api.send("GET" if "archive" in target else "POST", f"/containers/box/{target}")
    for ending in ("stop", "kill", "wait"):
        assert api.send("POST", f"/containers/box/{ending}") == Watch()


@pytest.fixture
def api(tmp_path: Path) -> Api:
    return Api(tmp_path)


@pytest.fixture
def session(api: Api, tmp_path: Path) -> Session:
    """Of a container that was made, by the name of box."""
    source = tmp_path / "src"
    source.mkdir()
    api.create(source, "box")
    made = api.roots.sessions[str(source)]
    assert made.asked == [True]
    made.asked.clear()
    return made


@pytest.mark.parametrize("name", ["box", ID, ID[:12]])
@pytest.mark.parametrize(
    ("method", "target", "before"),
    [
        ("POST", "start", [True]),
        ("POST", "unpause", [True]),
        ("GET", "archive?path=/", [True]),
        ("HEAD", "archive?path=/", [True]),
        ("POST", "restart", [True]),
        ("PUT", "archive?path=/", [True]),
        ("POST", "stop", []),
        ("POST", "kill", []),
        ("POST", "wait", []),
        ("POST", "attach", []),
        ("GET", "attach/ws", []),
        ("GET", "logs?follow=1", []),
    ],
)
def test_what_goes_before_a_request(
    api: Api, session: Session, name: str, method: str, target: str, before: list[bool]
) -> None:
    api.send(method, f"/containers/{name}/{target}")
    assert session.asked == before


@pytest.mark.parametrize("name", ["box", ID])
@pytest.mark.parametrize(
    ("method", "target", "part"),
    [
        ("POST", "/restart", "head"),
        ("PUT", "/archive?path=/", "head"),
        ("POST", "/stop", "head"),
        ("POST", "/kill", "head"),
        ("DELETE", "", "head"),
        ("POST", "/wait", "line"),
        ("POST", "/attach", "end"),
        ("GET", "/logs", "end"),
    ],
)
def test_what_an_answer_waits_for(
    api: Api, session: Session, name: str, method: str, target: str, part: str
) -> None:
    watch = api.send(method, f"/containers/{name}{target}")
    session.asked.clear()
    function = getattr(watch, part)
    assert function is not None
    function({"head": None, "line": b"{}", "end": True}[part])
    assert session.asked == [False]


def test_an_exec_waits_on_both_sides(api: Api, session: Session) -> None:
    watch = api.send("POST", "/containers/box/exec")
    assert watch.line is not None
    watch.line(b'{"Id": "e1"}')
    assert session.asked == []
    watch = api.send("POST", "/exec/e1/start")
    assert session.asked == [True]
    assert watch.end is not None
    watch.end(True)
    assert session.asked == [True, False]


def test_an_exec_of_troubled_files_is_refused_when_it_is_made(api: Api, session: Session) -> None:
    session.is_troubled = True
    session.error = WherryError("halted")
    with pytest.raises(Refusal, match="halted"):
        api.send("POST", "/containers/box/exec")


def test_events_of_an_ending_wait(api: Api, session: Session) -> None:
    watch = api.send("GET", "/events")
    assert watch.line is not None
    for action, asked in (("start", []), ("die", [False]), ("exec_die", [False, False])):
        watch.line(json.dumps({"Action": action, "Actor": {"ID": ID}}).encode())
        assert session.asked == asked


def test_a_container_without_mounts_costs_nothing(api: Api) -> None:
    api.create("", "bare")
    for method, target in (("POST", "wait"), ("POST", "attach"), ("POST", "stop")):
        assert api.send(method, f"/containers/bare/{target}") == Watch()
    assert api.roots.sessions == {}


def test_a_barrier_that_fails_refuses_a_request_and_lets_an_answer_pass(
    api: Api, session: Session
) -> None:
    session.error = WherryError("/src/f is not equal on both sides")
    with pytest.raises(Refusal, match="/src/f") as refused:
        api.send("POST", "/containers/box/start")
    assert refused.value.status == 500
    watch = api.send("POST", "/containers/box/stop")
    assert watch.head is not None
    watch.head(None)  # type: ignore[arg-type]


def test_a_wait_without_progress_ends(api: Api, session: Session) -> None:
    session.ask = lambda *, fresh: Ticket(0, fresh)  # type: ignore[method-assign]
    session.idle_s = 61
    session.where = " at a/b, after 2 of 3 files"
    session.root = type("Root", (), {"path": Path("/src")})()  # type: ignore[attr-defined]
    with pytest.raises(Refusal, match="makes no progress at a/b, after 2 of 3 files"):
        api.send("POST", "/containers/box/start")


def test_the_engines_socket_is_the_guests_whatever_is_shared(tmp_path: Path) -> None:
    api = Api(Path("/"))
    with pytest.raises(AssertionError, match="run was called"):
        api.create("/var/run/docker.sock", "x")
    assert api.roots.sessions == {}


def test_a_socket_cannot_be_mounted(api: Api, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Refusal, match="neither a file nor a directory"):
        api.create(tmp_path / "pipe", "x")
