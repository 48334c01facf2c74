"""Which requests wait for files, in which direction, and what they are told when that fails."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wherry.api.answers import Refusal
from wherry.api.hooks import Hooks, Request, Watch
from wherry.api.http import parse_answer, parse_request
from wherry.core.errors import TunnelError, WherryError
from wherry.service.mounts import Mounts
from wherry.service.shared import Shared
from wherry.sync import barrier
from wherry.sync.barrier import Ticket, hold
from wherry.sync.sources import Source

ID = "f" * 64
DONE = parse_answer(b"HTTP/1.1 204 No Content\r\n\r\n")
BOUND = {"type": "none", "o": "bind", "device": "/src/volume"}
LOST = "/src/f cannot be brought up to date"


class Session:
    """Answers barriers at once, and notes whether they were to be fresh."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.asked: list[bool] = []
        self.error: WherryError | None = None
        self.is_troubled = False
        self.is_closed = False
        self.idle_s = self.busy_s = 0.0
        self.conflicts: list[str] = []
        self.where = ""
        self.root = SimpleNamespace(place=SimpleNamespace(path=path))
        self.writes = False

    def ask(self, *, fresh: bool) -> Ticket:
        self.asked.append(fresh)
        ticket = Ticket(0, fresh)
        ticket.finish(self.error)
        return ticket

    @property
    def conflict_count(self) -> int:
        return len(self.conflicts)

    def conflicts_since(self, count: int) -> list[str]:
        return self.conflicts[count:]


class Roots:
    kept: tuple[str, ...] = ()
    with_conflicts: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.sessions: dict[str, Session] = {}
        self.required: list[tuple[str, bool]] = []
        self.written: object = None
        self.first = False

    def was_written(self, path: str) -> object:
        return self.written

    def require(self, path: str, *, read_only: bool = False, first: bool = False) -> Session:
        self.required.append((path, read_only))
        self.first = first
        session = self.sessions.setdefault(path, Session(path))
        session.writes = session.writes or not read_only
        return session

    def holding(self, path: str) -> Session | None:
        return self.sessions.get(path)

    def all(self) -> list[Session]:
        return list(self.sessions.values())

    def release(self, used: set[str], written: set[str]) -> None:
        self.used, self.written = used, written


class Engine:
    """A tunnel to an engine that has a volume, and containers as given."""

    def __init__(self) -> None:
        self.state = "exited"
        self.mounts: list[list[dict[str, Any]]] = []
        self.inspected: dict[str, list[dict[str, Any]]] = {}

    def open_unix(self, path: str) -> Engine:
        return self

    def sendall(self, data: bytes) -> None:
        answers = {
            "/volumes": {"Volumes": [{"Name": "bound", "Options": BOUND}]},
            "/containers/json?all=1": [
                {"Id": str(number), "State": self.state, "Mounts": mounts}
                for number, mounts in enumerate(self.mounts)
            ],
        }
        answers |= {
            f"/containers/{name}/json": {"Id": ID, "Mounts": mounts}
            for name, mounts in self.inspected.items()
        }
        body = json.dumps(answers[data.decode().split()[1]]).encode()
        self.answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)

    def recv(self, size: int) -> bytes:
        answer, self.answer = self.answer, b""
        return answer

    def close(self) -> None:
        pass


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
    function({"head": DONE, "line": b"{}", "end": True}[part])
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


def test_the_end_of_a_detached_command_is_one_wherever_it_is_seen(
    api: Api, session: Session
) -> None:
    made = api.send("POST", "/containers/box/exec")
    assert made.line is not None
    made.line(b'{"Id": "e1"}')
    api.send("POST", "/exec/e1/start")
    session.asked.clear()

    def seen(running: bool) -> list[bool]:
        watch = api.send("GET", "/exec/e1/json")
        assert watch.line is not None
        fields = {"ID": "e1", "ContainerID": ID, "Running": running, "ExitCode": None}
        watch.line(json.dumps(fields | ({} if running else {"ExitCode": 0})).encode())
        asked, session.asked = session.asked, []
        return asked

    assert seen(True) == []
    assert seen(False) == [False]
    # Nothing comes after it.
    assert seen(False) == []


def test_the_end_of_a_stream_is_the_command_s_unless_it_goes_on(api: Api, session: Session) -> None:
    """Then the client asks for the status, which costs nothing more."""

    def asked(running: bool) -> list[bool]:
        session.asked.clear()
        watch = api.send("GET", "/exec/e1/json")
        assert watch.line is not None
        watch.line(json.dumps({"ContainerID": ID, "Running": running, "ExitCode": 0}).encode())
        return session.asked

    made = api.send("POST", "/containers/box/exec")
    assert made.line is not None
    made.line(b'{"Id": "e1"}')
    kind = "Content-Type: application/vnd.docker"
    for status, whole, expected in (
        (f"101 UPGRADED\r\n{kind}.multiplexed-stream", True, []),
        # The client has left, and the command goes on.
        (f"101 UPGRADED\r\n{kind}.multiplexed-stream", False, [False]),
        # Its terminal can be left as well, and then the engine ends the stream.
        (f"101 UPGRADED\r\n{kind}.raw-stream", True, [False]),
        ("200 OK", True, [False]),
    ):
        watch = api.send("POST", "/exec/e1/start")
        assert watch.head is not None
        assert watch.end is not None
        watch.head(parse_answer(f"HTTP/1.1 {status}\r\n\r\n".encode()))
        watch.end(whole)
        assert asked(False) == expected
        assert asked(True) == []
        assert asked(False) == [False]
        assert asked(True) == []


def test_an_end_that_is_seen_and_not_brought_is_told_from_then_on(
    api: Api, session: Session
) -> None:
    session.error = WherryError(LOST)
    watch = api.send("GET", "/exec/e1/json")
    assert watch.line is not None
    watch.line(json.dumps({"ContainerID": ID, "Running": False, "ExitCode": 0}).encode())
    with pytest.raises(Refusal, match="the command has ended, but /src/f "):
        api.send("GET", "/exec/e1/json")
    session.error = None
    api.send("GET", "/exec/e1/json")


def test_the_end_of_a_container_is_one_in_its_inspection(api: Api, session: Session) -> None:
    def seen(status: str, end: str = "0001-01-01T00:00:00Z", line: bytes = b"") -> list[bool]:
        session.asked.clear()
        watch = api.send("GET", "/v1.51/containers/box/json")
        assert watch.line is not None
        state = {"Status": status, "Running": status == "running", "FinishedAt": end}
        assert watch.line(line or json.dumps({"Id": ID, "State": state}).encode()) is None
        return session.asked

    assert seen("created") == []
    assert seen("running") == []
    assert seen("exited", "2026-01-01T00:00:01Z") == [False]
    assert seen("exited", "2026-01-01T00:00:01Z") == []
    # It ran again.
    assert seen("running", "2026-01-01T00:00:01Z") == []
    assert seen("exited", "2026-01-01T00:00:02Z") == [False]
    assert seen("", line=b'{"message": "no such container"}') == []
    # What is not synchronised is not begun for one that has ended long ago.
    api.roots.sessions.clear()
    assert api.send("GET", "/containers/box/json") == Watch()
    api.roots.sessions["/elsewhere"] = Session("/elsewhere")
    assert seen("exited", "2026-01-01T00:00:03Z") == []
    assert list(api.roots.sessions) == ["/elsewhere"]


def test_events_of_an_ending_wait(api: Api, session: Session) -> None:
    watch = api.send("GET", "/events")
    assert watch.line is not None
    for action, asked in (("start", []), ("die", [False]), ("exec_die", [False, False])):
        watch.line(json.dumps({"Action": action, "Actor": {"ID": ID}}).encode())
        assert session.asked == asked
    watch.line(b'{"Action": "die", "Actor": null}')  # of nobody's, and no fault


def test_a_container_without_mounts_costs_nothing(api: Api) -> None:
    api.create("", "bare")
    for method, target in (("POST", "wait"), ("POST", "attach"), ("POST", "stop")):
        assert api.send(method, f"/containers/bare/{target}") == Watch()
    assert api.roots.sessions == {}


def test_a_barrier_that_fails_refuses_a_request(api: Api, session: Session) -> None:
    session.error = WherryError(LOST)
    with pytest.raises(Refusal, match="/src/f") as refused:
        api.send("POST", "/containers/box/start")
    assert refused.value.status == 500


@pytest.mark.parametrize("conflict", [False, True])
class TestWhatWasNotBrought:
    """Either the barrier failed, or both sides changed a file meanwhile."""

    def fail(self, session: Session, conflict: bool) -> None:
        if conflict:
            session.conflicts.append("/src/f")
        else:
            session.error = WherryError(LOST)

    @pytest.mark.parametrize(
        ("method", "target"),
        [("POST", "/stop"), ("POST", "/kill"), ("PUT", "/archive?path=/"), ("POST", "/restart")],
    )
    def test_is_the_answer(
        self, api: Api, session: Session, conflict: bool, method: str, target: str
    ) -> None:
        session.conflicts.append("/src/earlier")
        watch = api.send(method, f"/containers/box{target}")
        assert watch.head is not None
        watch.head(DONE)
        self.fail(session, conflict)
        with pytest.raises(Refusal, match="that is done, but /src/f ") as refused:
            watch.head(DONE)
        assert refused.value.status == 500
        # What the engine itself refuses has done nothing.
        watch.head(parse_answer(b"HTTP/1.1 404 Not Found\r\n\r\n"))

    def test_is_beside_the_result_of_wait(self, api: Api, session: Session, conflict: bool) -> None:
        watch = api.send("POST", "/containers/box/wait")
        assert watch.line is not None
        assert watch.line(b'{"StatusCode":7}') is None
        self.fail(session, conflict)
        other = watch.line(b'{"StatusCode":7}')
        assert other is not None
        result = json.loads(other)
        assert result["StatusCode"] == 7
        assert result["Error"]["Message"].startswith("/src/f ")
        # The engine's own error is the better one.
        assert watch.line(b'{"StatusCode":7,"Error":{"Message":"its own"}}') is None

    def test_is_told_by_the_result_of_an_exec(
        self, api: Api, session: Session, conflict: bool
    ) -> None:
        made = api.send("POST", "/containers/box/exec")
        assert made.line is not None
        made.line(b'{"Id": "e1"}')
        watch = api.send("POST", "/exec/e1/start")
        api.send("GET", "/exec/e1/json")
        self.fail(session, conflict)
        assert watch.end is not None
        watch.end(True)
        with pytest.raises(Refusal, match="the command has ended, but /src/f "):
            api.send("GET", "/exec/e1/json")
        # Once it was brought there is nothing to tell; nor twice of a conflict.
        session.error = None
        api.send("GET", "/exec/e1/json")

    def test_lets_pass_what_cannot_be_helped(
        self, api: Api, session: Session, conflict: bool
    ) -> None:
        watches = [
            api.send("DELETE", "/containers/box"),
            api.send("POST", f"/containers/{ID}/attach"),
            api.send("GET", "/events"),
        ]
        self.fail(session, conflict)
        event = json.dumps({"Action": "die", "Actor": {"ID": ID}}).encode()
        for watch in watches:
            if watch.head:
                watch.head(DONE)
            if watch.line:
                assert watch.line(event) is None
            if watch.end:
                watch.end(True)
        assert session.asked == [False] * 3


@pytest.mark.parametrize("stale", [False, True])
def test_a_source_that_is_gone_is_named(
    stale: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service was restarted, and the drive is not there: no session can tell."""
    engine = Engine()
    source = tmp_path / "drive" / "data"
    engine.inspected["box"] = [{"Type": "bind", "Source": str(source)}]
    if stale:
        source = source.parent

        def cut(path: Path) -> bool:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

        monkeypatch.setattr(Path, "exists", cut)
    api = Api(tmp_path, engine)
    for target in ("start", "exec", "restart"):
        with pytest.raises(Refusal, match=f"{source}.* is not"):
            api.send("POST", f"/containers/box/{target}")
    watch = api.send("POST", "/containers/box/wait")
    assert watch.line is not None
    told = watch.line(b'{"StatusCode":0}')
    assert told is not None
    assert str(source) in json.loads(told)["Error"]["Message"]
    assert api.roots.sessions == {}


@pytest.mark.parametrize("key", ["VolumesFrom", "volumesfrom"])
def test_what_a_container_mounts_as_another_one_does_waits_too(tmp_path: Path, key: str) -> None:
    engine = Engine()
    api = Api(tmp_path, engine)
    # An earlier container had the name, and mounted nothing.
    api.create("", "user")
    engine.inspected["user"] = [{"Type": "bind", "Source": str(tmp_path)}]
    watch = api.send("POST", "/containers/create?name=user", {"HostConfig": {key: ["data:ro"]}})
    assert watch.line is not None
    watch.line(json.dumps({"Id": "e" * 64}).encode())
    api.send("POST", "/containers/user/start")
    session = api.roots.sessions[str(tmp_path)]
    assert session.asked == [True]
    watch = api.send("POST", "/containers/user/wait")
    assert watch.line is not None
    watch.line(b"{}")
    assert session.asked == [True, False]


def test_one_that_is_around_others_is_begun_before_them(api: Api, tmp_path: Path) -> None:
    """It would take the place of theirs, for whose barriers the request waits."""
    (tmp_path / "a").mkdir()
    binds = [f"{tmp_path / 'a'}:/a", f"{tmp_path}:/b"]
    api.send("POST", "/containers/create", {"HostConfig": {"Binds": binds}})
    assert list(api.roots.sessions) == [str(tmp_path), str(tmp_path / "a")]


@pytest.mark.parametrize("for_ever", [False, True])
def test_a_request_whose_root_has_ended_waits_for_the_next_one(
    for_ever: bool, api: Api, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another request has begun a root around it meanwhile."""
    waits = api.send("POST", "/containers/box/wait")
    next_one = session if for_ever else Session("/src")
    found: list[Session] = []

    def require(path: str, **how: bool) -> Session:
        found.append(next_one if found else session)
        return found[-1]

    monkeypatch.setattr(api.roots, "require", require)
    session.is_closed, session.error = True, WherryError("not synchronised any more")

    def started() -> None:
        found.clear()
        api.send("POST", "/containers/box/start")

    def made() -> None:
        found.clear()
        api.create(session.path, "other")

    for request in (started, made):
        if for_ever:
            with pytest.raises(Refusal, match="not synchronised any more"):
                request()
        else:
            request()
    found.clear()
    assert waits.line is not None
    assert (waits.line(b"{}") is not None) == for_ever
    assert next_one.asked[-1] is False


@pytest.mark.parametrize(
    ("attribute", "waited_s", "where"),
    [
        ("idle_s", 61, " at a/b, after 2 of 3 files"),
        ("busy_s", 601, " at db/base, which is being read in the guest"),
    ],
)
def test_a_wait_without_progress_ends(
    api: Api,
    session: Session,
    monkeypatch: pytest.MonkeyPatch,
    attribute: str,
    waited_s: float,
    where: str,
) -> None:
    monkeypatch.setattr(barrier, "_SLICE_S", 0.01)
    ticket = Ticket(0, True)
    ticket.asked_at -= waited_s
    session.ask = lambda *, fresh: ticket  # type: ignore[method-assign]
    setattr(session, attribute, waited_s)
    session.where = where
    session.root = type("Root", (), {"path": Path("/src")})()  # type: ignore[attr-defined]
    with pytest.raises(Refusal, match=f"makes no progress{where}"):
        api.send("POST", "/containers/box/start")


def test_a_wait_that_begins_after_a_rest_goes_on(session: Session) -> None:
    """Nobody asked for an hour, and what is to be looked at now takes its time."""
    session.idle_s = 3600
    ticket = Ticket(0, True)
    session.ask = lambda *, fresh: ticket  # type: ignore[method-assign]
    waits = 0

    def wait(event: threading.Event, timeout_s: float) -> bool:
        nonlocal waits
        waits += 1
        if waits == 3:
            ticket.finish(None)
        return event.is_set()

    hold([session], fresh=True, wait=wait)  # type: ignore[list-item]
    assert waits == 3


@pytest.mark.parametrize(
    ("written", "state", "mounts", "first"),
    [
        (None, "", None, True),
        (True, "", None, True),
        (False, "", None, True),
        (False, "exited", {"Source": "SRC"}, True),
        (False, "running", {"Source": "SRC", "RW": False}, True),
        (False, "running", {"Source": "SRC/in"}, False),
        (False, "paused", {"Source": "SRC"}, False),
        (False, "restarting", {"Source": "/"}, False),
        (False, "running", {"Source": "SRC-else"}, True),
    ],
)
def test_who_may_be_the_first_that_writes(
    written: bool | None, state: str, mounts: dict[str, Any] | None, first: bool, tmp_path: Path
) -> None:
    """The engine is asked where that matters."""
    source = str(tmp_path / "src")
    engine = Engine()
    engine.state = state
    if mounts is not None:
        engine.mounts = [
            [{"Type": "bind", **mounts, "Source": mounts["Source"].replace("SRC", source)}]
        ]
    api = Api(tmp_path, engine if written is False else NoTunnel())
    api.roots.written = written
    api.create(source, "box")
    assert (api.roots.required, api.roots.first) == ([(source, False)], first)
    api.create(f"{source}:/src:ro", "reader")
    assert not api.roots.first


def test_who_may_have_written_is_not_known_when_the_engine_does_not_tell(tmp_path: Path) -> None:
    api = Api(tmp_path, StuckEngine())
    api.roots.written = False
    api.create(tmp_path / "src", "box")
    assert not api.roots.first


@pytest.mark.parametrize("state", ["running", "paused", "restarting", "exited"])
def test_what_may_have_been_written_is_gone_on_with_first(tmp_path: Path, state: str) -> None:
    """What a container wrote while no service ran is still to come to the host."""
    engine, roots = Engine(), Roots()
    read, written, kept, conflict = (str(tmp_path / name) for name in ("r", "w", "k", "c"))
    for path in (read, written, kept, conflict):
        Path(path).mkdir()
    roots.kept, roots.with_conflicts = (kept,), (kept, conflict)
    engine.state = state
    bind = {"Type": "bind", "RW": False}
    engine.mounts = [
        [{**bind, "Source": read}, {**bind, "Source": written}],
        [{**bind, "Source": written, "RW": True}, {**bind, "Source": "/nowhere"}],
    ]
    mounts = Mounts(Hooks(), roots, engine, [str(tmp_path)])  # type: ignore[arg-type]
    mounts.restore()
    writable = [path for path, read_only in roots.required if not read_only]
    assert [path for path, _ in roots.required[: len(writable)]] == writable
    running = state != "exited"
    assert set(writable) == {kept, *[written] * running}
    assert roots.sessions.keys() == {kept, conflict, *[read, written] * running}


def test_what_the_user_keeps_goes_on_though_the_engine_does_not_tell(tmp_path: Path) -> None:
    roots = Roots()
    kept, conflict = str(tmp_path / "k"), str(tmp_path / "c")
    for path in (kept, conflict):
        Path(path).mkdir()
    roots.kept, roots.with_conflicts = (kept,), (conflict,)
    mounts = Mounts(Hooks(), roots, StuckEngine(), [str(tmp_path)])  # type: ignore[arg-type]
    with pytest.raises(TunnelError):
        mounts.restore()
    # Who may write there is not known.
    assert roots.required == [(kept, False), (conflict, False)]


def test_a_container_that_writes_and_was_not_known_is_found(tmp_path: Path) -> None:
    engine, roots = Engine(), Roots()
    source = str(tmp_path)
    mounts = Mounts(Hooks(), roots, engine, [source])  # type: ignore[arg-type]
    engine.mounts = [[{"Type": "bind", "Source": source}]]
    roots.require(source, read_only=True)
    for state, written, found in (
        ("exited", False, False),
        ("running", True, False),
        ("running", False, True),
    ):
        roots.required.clear()
        engine.state, roots.written = state, written
        mounts.tidy()
        assert roots.required == [(source, False)] * found


def test_what_no_container_mounts_is_released(tmp_path: Path) -> None:
    engine, roots = Engine(), Roots()
    mounts = Mounts(Hooks(), roots, engine, ["/src"])  # type: ignore[arg-type]
    engine.mounts = [[{"Type": "bind", "Source": "/src/a"}]]
    mounts.tidy()
    assert not hasattr(roots, "used"), "the engine need not be asked"
    roots.require("/src/a")
    mounts.tidy()
    assert (roots.used, roots.written) == ({"/src/a"}, {"/src/a"})
    engine.mounts = [[{"Type": "bind", "Source": "/src/a", "RW": False}]]
    mounts.tidy()
    assert (roots.used, roots.written) == ({"/src/a"}, {"/src/a"})
    mounts.tidy()
    assert (roots.used, roots.written) == ({"/src/a"}, set())
    engine.mounts = [[{"Type": "volume", "Name": "bound"}], []]
    mounts.tidy()
    # A short container after the other: only what was not mounted at two times ends.
    assert roots.used == {"/src/a", "/src/volume"}
    mounts.tidy()
    assert roots.used == {"/src/volume"}


@pytest.mark.parametrize("shared", ["D:\\elsewhere", "D:\\"])
def test_paths_of_drives_are_rewritten_before_the_engine_sees_them(shared: str) -> None:
    hooks = Hooks()
    Mounts(hooks, Roots(), NoTunnel(), [shared], drives=True)  # type: ignore[arg-type]

    def send(target: str, body: object) -> Request:
        head = parse_request(f"POST {target} HTTP/1.1\r\nHost: docker\r\n\r\n".encode())
        request = Request(head, json.dumps(body).encode(), threading.Event.wait)
        match = hooks.match(head)
        assert match is not None
        match.run(request, [])
        return request

    with pytest.raises(AssertionError, match="run was called"):
        # Not shared, so the guest is asked whether it is its own.
        send("/containers/create", {"HostConfig": {"Binds": ["C:\\src:/src"]}})
    with pytest.raises(Refusal, match="not on a drive") as refused:
        send("/containers/create", {"HostConfig": {"Binds": ["\\\\server\\share:/src"]}})
    assert refused.value.status == 400
    mount = {"Type": "bind", "Source": "d:/elsewhere/x", "Target": "/x"}
    with pytest.raises(Refusal, match="bind source path does not exist") as refused:
        send("/containers/create", {"HostConfig": {"Mounts": [mount]}})
    assert "D:\\elsewhere\\x" in str(refused.value)
    request = send("/volumes/create", {"Name": "v", "DriverOpts": {"device": "C:\\x"}})
    assert not request.replaced


@pytest.mark.parametrize("drives", [False, True])
def test_what_to_share_is_told_where_anything_is_left(drives: bool) -> None:
    """With drives all are shared, so a path on none cannot be."""
    tunnel = SimpleNamespace(run=lambda *command, **options: SimpleNamespace(status=1))
    shared = Shared(Roots(), tunnel, ["/home"], drives=drives)  # type: ignore[arg-type]
    with pytest.raises(Refusal, match="/srv is not in a directory that is shared") as refused:
        shared.share(Source("/srv"))
    assert ("wherry config set sync.shared /home:/srv" in str(refused.value)) != drives


@pytest.mark.parametrize("path", ["/var/run/docker.sock", "/run/host-services/ssh-auth.sock"])
def test_some_sockets_are_the_guests_whatever_is_shared(path: str) -> None:
    api = Api(Path("/"))
    with pytest.raises(AssertionError, match="run was called"):
        api.create(path, "x")
    assert api.roots.sessions == {}


def test_a_socket_cannot_be_mounted(api: Api, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Refusal, match="neither a file nor a directory"):
        api.create(tmp_path / "pipe", "x")


def test_a_command_of_an_unknown_container_makes_nothing_writable(api: Api, tmp_path: Path) -> None:
    """It was made before this service began, or never."""
    one, other = tmp_path / "one", tmp_path / "other"
    for path in (one, other):
        path.mkdir()
    binds = [f"{one}:/one:ro", f"{other}:/other"]
    api.send("POST", "/containers/create?name=box", {"HostConfig": {"Binds": binds}})
    assert not api.roots.sessions[str(one)].writes
    watch = api.send("POST", "/exec/unknown/start")
    assert watch.end is not None
    watch.end(True)
    assert not api.roots.sessions[str(one)].writes
    assert api.roots.sessions[str(other)].writes
    assert api.roots.sessions[str(other)].asked[-2:] == [True, False]
