"""Starts and ports as the service has them: the hooks, the rounds, and a QEMU played by sockets."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fake_host import wait_until
from fake_monitor import Monitor
from loopback import free_port

from wherry.api.answers import Refusal
from wherry.api.hooks import ClientGone, Hooks, Request, Watch
from wherry.api.http import parse_answer, parse_request
from wherry.core.errors import TunnelError
from wherry.platform import current
from wherry.ports.conflicts import try_bind
from wherry.ports.desired import Forward
from wherry.service import engine, networking
from wherry.service.networking import Networking

ID = "a" * 64
STARTED = parse_answer(b"HTTP/1.1 204 No Content\r\n\r\n")


class Engine:
    """A tunnel to an engine that has one container."""

    def __init__(self) -> None:
        self.container: dict[str, Any] = {"Id": ID, "Name": "/web", "State": {}, "HostConfig": {}}
        self.running: list[dict[str, Any]] = []
        self.running_later: list[dict[str, Any]] | None = None
        self.networks: dict[str, dict[str, Any]] = {}
        self.stopped = threading.Event()

    def listed(self) -> list[dict[str, Any]]:
        """Return what runs; the next time, what runs later."""
        found = self.running
        if self.running_later is not None:
            self.running, self.running_later = self.running_later, None
        return found

    def open_unix(self, path: str) -> Stream:
        return Stream(self)

    def begin_tcp(self, address: str, port: int) -> Any:
        raise TunnelError("there is no guest")


class Stream:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._answer = b""

    def sendall(self, data: bytes) -> None:
        target = data.decode().split()[1]
        if target.endswith("/stop?t=0"):
            self._engine.stopped.set()
        answers: dict[str, Any] = {
            f"/containers/{ID}/json": self._engine.container,
            **{f"/networks/{name}": found for name, found in self._engine.networks.items()},
        }
        path = target.partition("?")[0]
        if path == "/containers/json":
            answers[path] = self._engine.listed()
        body = json.dumps(answers.get(path, {})).encode()
        self._answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)

    def recv(self, size: int) -> bytes:
        answer, self._answer = self._answer, b""
        return answer

    def close(self) -> None:
        pass


class Machine:
    """A machine's networking on a loop in a thread of its own."""

    def __init__(self, engine: Engine | None = None) -> None:
        self.monitor, self.engine, self.hooks = Monitor(), engine or Engine(), Hooks()
        self.networking = Networking(self.hooks, current())
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        driver: Any = SimpleNamespace(monitor=self, identity=None, host_forwards=self.forwards)
        guest: Any = SimpleNamespace(
            hold_ports=lambda ports: None,
            listeners=lambda names: self.listeners,
            open_datagrams=None,
        )
        self.listeners: list[tuple[str, str, str, int]] = []
        self.await_(self.networking.start(driver, self.engine, guest, None))  # type: ignore[arg-type]

    def await_(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    async def human(self, line: str) -> str:
        return await self.monitor.human(line)

    async def forwards(self) -> list[Any]:
        return [SimpleNamespace(**vars(each), guest_address="") for each in self.monitor.forwards()]

    def send(
        self, what: str, patience: Any = threading.Event.wait, *, of: str = f"containers/{ID}"
    ) -> Watch | None:
        """Have the hooks see a request about the container; return what they want of its answer."""
        head = parse_request(f"POST /{of}/{what} HTTP/1.1\r\nHost: d\r\n\r\n".encode())
        watches: list[Watch] = []
        match = self.hooks.match(head)
        assert match is not None
        match.run(Request(head, None, patience), watches)
        return watches[0] if watches else None

    def close(self) -> None:
        self.await_(self.networking.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(20)
        self.loop.close()
        self.monitor.close()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    monkeypatch.setattr(networking, "_VERIFY_S", 0.05)
    made = Machine()
    yield made
    made.close()


def publish(machine: Machine, port: int) -> None:
    bindings = {"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(port)}]}
    machine.engine.container["HostConfig"] = {"PortBindings": bindings}


def test_a_port_is_bound_before_the_start_goes_on_and_let_go_after_it(machine: Machine) -> None:
    port = free_port()
    publish(machine, port)
    watch = machine.send("start")
    assert watch is not None
    assert watch.end is not None
    assert machine.monitor.forwards() == [Forward("tcp", "127.0.0.1", port)]
    watch.end(True)
    wait_until(lambda: not machine.monitor.forwards(), 10, "the engine has not started it")


def test_a_port_in_use_refuses_the_start(machine: Machine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        publish(machine, taken.getsockname()[1])
        with pytest.raises(Refusal, match="address already in use"):
            machine.send("start")


THIEF_S = 0.3


def test_nobody_can_take_a_port_between_its_reservation_and_its_use(machine: Machine) -> None:
    """However often somebody tries, from before the start goes on until it is answered."""
    port, over = free_port(), threading.Event()
    tries: list[OSError | None] = []
    publish(machine, port)
    starting = machine.send("start")
    assert starting is not None
    assert starting.head is not None
    assert starting.end is not None

    def steal() -> None:
        while not over.is_set():
            tries.append(try_bind(Forward("tcp", "127.0.0.1", port)))

    thief = threading.Thread(target=steal)
    thief.start()
    try:
        time.sleep(THIEF_S)
        machine.engine.running = [runs(port)]
        starting.head(STARTED)
        starting.end(True)
        time.sleep(THIEF_S)
    finally:
        over.set()
        thief.join(20)
    assert len(tries) > 10
    assert None not in tries
    assert machine.networking.describe()[0]["state"] == "open"
    assert not machine.engine.stopped.is_set()


def test_a_port_that_the_engine_chose_and_somebody_took_since_fails_the_start(
    machine: Machine,
) -> None:
    """Which one it chooses is known only when the container runs; it is stopped again."""
    machine.engine.container["HostConfig"] = {"PortBindings": {"80/tcp": [{"HostPort": ""}]}}
    machine.engine.running = []
    starting = machine.send("start")
    assert starting is not None
    assert starting.head is not None
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        machine.engine.running = [runs(port)]
        with pytest.raises(Refusal) as refused:
            starting.head(STARTED)
        assert f"endpoint web ({ID}): " in refused.value.message
        assert f"{port}/tcp: address already in use by" in refused.value.message
    assert machine.engine.stopped.wait(10)


@pytest.mark.parametrize("internal", [[True], [True, False]])
def test_a_port_in_use_matters_only_where_the_engine_publishes_it(
    machine: Machine, internal: list[bool]
) -> None:
    machine.engine.networks = {
        f"n{number}": {"Internal": each} for number, each in enumerate(internal)
    }
    with socket.create_server(("127.0.0.1", 0)) as taken:
        publish(machine, taken.getsockname()[1])
        networks = {name: {} for name in machine.engine.networks}
        machine.engine.container["NetworkSettings"] = {"Networks": networks}
        if all(internal):
            assert machine.send("start") is not None
            return
        with pytest.raises(Refusal, match="address already in use"):
            machine.send("start")


def runs(port: int, address: str = "127.0.0.1") -> dict[str, Any]:
    """What the engine lists when the container runs with its port."""
    published = {"IP": address, "PrivatePort": 80, "PublicPort": port, "Type": "tcp"}
    return {"Id": ID, "Names": ["/web"], "HostConfig": {}, "Ports": [published]}


def test_who_waits_for_the_end_before_the_start_finds_the_port_free(machine: Machine) -> None:
    """As `docker run` does in the foreground."""
    port = free_port()
    publish(machine, port)
    ending, starting = machine.send("wait"), machine.send("start")
    assert ending is not None
    assert ending.line is not None
    assert starting is not None
    assert starting.head is not None
    assert starting.end is not None
    machine.engine.running = [runs(port)]
    starting.head(STARTED)
    starting.end(True)
    assert machine.monitor.forwards() == [Forward("tcp", "127.0.0.1", port)]
    machine.engine.running = []
    ending.line(b'{"StatusCode":0}')
    assert machine.monitor.forwards() == []


def test_a_container_that_joins_a_network_has_its_ports_then(machine: Machine) -> None:
    """And no port any more once it has left it: before the client gets the answer."""
    port = free_port()
    for what, running in (("connect", [runs(port)]), ("disconnect", [])):
        watch = machine.send(what, of="networks/bridge")
        assert watch is not None
        assert watch.head is not None
        machine.engine.running = running
        watch.head(STARTED)
        assert len(machine.monitor.forwards()) == len(running)


def test_what_the_engine_lists_later_than_it_tells_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(networking, "_AGAIN_S", 0.1)
    # The watch begins once, which counts as an event, and nothing else happens.
    monkeypatch.setattr(engine, "_RETRY_S", 60)
    port, lists = free_port(), Engine()
    lists.running_later = [runs(port)]
    made = Machine(lists)
    try:
        wait_until(made.monitor.forwards, 10, "its port is open")
        assert made.monitor.forwards() == [Forward("tcp", "127.0.0.1", port)]
    finally:
        made.close()


def test_a_forward_is_repaired_however_much_happens(machine: Machine) -> None:
    port = free_port()
    machine.engine.running = [runs(port)]
    machine.await_(machine.networking._settled())
    machine.monitor.sockets.popitem()[1].close()

    def repaired() -> bool:
        machine.await_(machine.networking._settled())
        return bool(machine.monitor.forwards())

    wait_until(repaired, 10, "it is there again")


def test_what_nobody_listens_on_any_more_is_in_no_start_s_way(machine: Machine) -> None:
    """What listens in the host's network is known only as long as the agent is there."""
    port = free_port()
    other = {
        "Id": "b" * 64, "Names": ["/a"], "HostConfig": {"NetworkMode": "host"}, "Ports": []
    }  # fmt: skip
    machine.listeners = [("b" * 64, "tcp", "127.0.0.1", port)]
    machine.engine.running = [other]
    machine.await_(machine.networking._settled())
    assert machine.monitor.forwards() == [Forward("tcp", "127.0.0.1", port)]

    def away(names: object) -> Any:
        raise TunnelError("the agent is not there")

    machine.networking._guest.listeners = away  # type: ignore[method-assign, union-attr]
    bindings = {"80/tcp": [{"HostIp": "0.0.0.0", "HostPort": str(port)}]}
    machine.engine.container["HostConfig"] = {"PortBindings": bindings}
    starting = machine.send("start")
    assert starting is not None
    assert starting.head is not None
    machine.engine.running = [other, runs(port, "0.0.0.0")]
    starting.head(STARTED)
    assert not machine.engine.stopped.is_set()
    assert machine.monitor.forwards() == [Forward("tcp", "0.0.0.0", port)]


def test_a_container_that_runs_is_left_alone(machine: Machine) -> None:
    """Whatever this computer has of its ports: the engine says that there is nothing to do."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        publish(machine, taken.getsockname()[1])
        machine.engine.container["State"] = {"Running": True}
        assert machine.send("start") is None
        with pytest.raises(Refusal):
            machine.send("restart")


def test_what_listens_in_the_host_s_network_stops_nothing(machine: Machine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        machine.engine.container["HostConfig"] = {"NetworkMode": "host"}
        machine.listeners = [(ID, "tcp", "127.0.0.1", taken.getsockname()[1])]
        watch = machine.send("start")
        machine.engine.running = [{**machine.engine.container, "Names": ["/web"]}]
        assert watch is not None
        assert watch.head is not None
        watch.head(STARTED)
        assert machine.networking.describe()[0]["state"] == "failed"
    assert not machine.engine.stopped.is_set()


def test_a_client_that_leaves_in_a_start_leaves_nothing(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networking, "_VERIFY_S", 3600.0)  # nor is it found later
    port, human = free_port(), machine.monitor.human
    bound, gone = threading.Event(), threading.Event()

    async def slow(line: str) -> str:
        said = await human(line)
        if line.startswith("hostfwd_add"):
            bound.set()
            await asyncio.to_thread(gone.wait, 10)
        return said

    def patience(event: threading.Event, timeout_s: float) -> bool:
        if bound.is_set():
            raise ClientGone
        deadline = time.monotonic() + timeout_s
        while not event.wait(0.01):
            if bound.is_set():
                raise ClientGone
            if time.monotonic() > deadline:
                return False
        return True

    machine.monitor.human = slow  # type: ignore[method-assign]
    publish(machine, port)
    with pytest.raises(ClientGone):
        machine.send("start", patience)
    gone.set()
    wait_until(lambda: not machine.monitor.forwards(), 10, "nobody waits for the port any more")
    lines = machine.monitor.lines
    assert [line.split()[0] for line in lines] == ["hostfwd_add", "hostfwd_remove"]


def test_a_port_of_which_only_qemu_knows_is_let_go(machine: Machine) -> None:
    """Also when there is no other one to look after."""
    port = free_port()
    machine.await_(machine.monitor.human(f"hostfwd_add net0 tcp:127.0.0.1:{port}-:{port}"))
    wait_until(lambda: not machine.monitor.forwards(), 10, "it is found")
    assert try_bind(Forward("tcp", "127.0.0.1", port)) is None
