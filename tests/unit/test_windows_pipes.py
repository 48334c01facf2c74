"""Named pipes without Windows: what wherry decides, over calls that do as the real ones do."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_pipes import End, FakePipes, Instance
from pipe_cases import *  # noqa: F403 - the cases
from pipe_cases import Pair, in_thread, waits

from wherry.platform.windows.pipes import (
    PENDING,
    PipeListener,
    connect,
    docker_host,
    listen,
    pipe_name,
)

NAME = r"\\.\pipe\wherry"


@pytest.fixture
def kernel() -> Iterator[FakePipes]:
    made = FakePipes()
    yield made
    assert made.open_handles == 0


@pytest.fixture
def name() -> str:
    return NAME


@pytest.fixture
def listener(kernel: FakePipes) -> Iterator[PipeListener]:
    made = PipeListener(kernel, NAME)
    yield made
    made.close()


@pytest.fixture
def pair(kernel: FakePipes, listener: PipeListener) -> Iterator[Pair]:
    client = connect(kernel, NAME, 1)
    server = listener.accept()
    yield server, client
    server.close()
    client.close()


def test_names() -> None:
    path = Path("C:/Users/a/machines/default/control.sock")
    assert pipe_name(path, "wherry-x") == r"\\.\pipe\wherry-x"
    own = pipe_name(path)
    assert own.startswith("\\\\.\\pipe\\wherry-")
    # Windows does not tell capitals from small letters.
    assert own == pipe_name(Path("c:/users/A/machines/default/control.sock"))
    assert own != pipe_name(path.with_name("other.sock"))


def test_a_listener_is_known_by_its_name_wherever_its_machine_is(kernel: FakePipes) -> None:
    """The endpoint has the name of its docker context, the control socket none."""
    first, second = Path("C:/a/machines/work"), Path("C:/b/machines/work")
    assert docker_host(first / "docker.sock", "wherry-work") == "npipe:////./pipe/wherry-work"
    endpoint = listen(kernel, first / "docker.sock", "wherry-work")
    with pytest.raises(PermissionError):
        listen(kernel, second / "docker.sock", "wherry-work")
    control = [listen(kernel, each / "control.sock") for each in (first, second)]
    names = {each.name for each in kernel.instances}
    assert names == {
        r"\\.\pipe\wherry-work",
        *(pipe_name(each / "control.sock") for each in (first, second)),
    }
    client = connect(kernel, docker_host(first, "wherry-work")[8:].replace("/", "\\"), 0)
    server = endpoint.accept()
    client.send(b"x")
    assert server.recv(1) == b"x"
    for each in (client, server, endpoint, *control):
        each.close()


def test_as_many_wait_after_each_client_as_before(
    kernel: FakePipes, listener: PipeListener
) -> None:
    assert len(kernel.instances) == PENDING
    for _ in range(3):
        client = connect(kernel, NAME, 0)
        server = listener.accept()
        assert len(kernel.instances) == PENDING + 1
        server.close()
        client.close()
        assert len(kernel.instances) == PENDING


def test_a_burst_is_taken_before_anybody_accepts(kernel: FakePipes, listener: PipeListener) -> None:
    clients = [connect(kernel, NAME, 0) for _ in range(PENDING)]
    servers = [listener.accept() for _ in clients]
    for client, server in zip(clients, servers, strict=True):
        client.close()
        server.close()


def test_a_client_may_come_before_it_is_waited_for(kernel: FakePipes) -> None:
    early: list[End] = []

    def take(instance: Instance) -> None:
        if not early:
            early.append(kernel.open(NAME, 0))

    kernel.on_made = take
    listener = PipeListener(kernel, NAME)
    server = listener.accept()
    kernel.write(early[0], memoryview(b"x"), threading.Event())
    assert server.recv(1) == b"x"
    server.close()
    kernel.close(early[0])
    listener.close()


def test_a_second_listener_is_refused(kernel: FakePipes, listener: PipeListener) -> None:
    with pytest.raises(PermissionError):
        PipeListener(kernel, NAME)
    assert len(kernel.instances) == PENDING
    PipeListener(kernel, NAME + "-other").close()


def test_a_listener_that_cannot_be_made_leaves_nothing(kernel: FakePipes) -> None:
    kernel.limit = PENDING // 2
    with pytest.raises(OSError, match="resources"):
        PipeListener(kernel, NAME)
    assert not kernel.instances


def test_a_listener_short_of_instances_goes_on(kernel: FakePipes) -> None:
    listener = PipeListener(kernel, NAME, pending=2)
    kernel.limit = 0
    clients = [connect(kernel, NAME, 0) for _ in range(2)]
    server = listener.accept()
    # The last one is kept: without any the name would be anybody's.
    with pytest.raises(OSError, match="no more instances"):
        listener.accept()
    kernel.limit = 10
    other = listener.accept()
    assert sum(not each.taken for each in kernel.instances) == 2
    for stream in (*clients, server, other):
        stream.close()
    listener.close()


def test_clients_that_were_not_accepted_are_cut_off(
    kernel: FakePipes, listener: PipeListener
) -> None:
    client = connect(kernel, NAME, 0)
    listener.close()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    client.close()


def test_a_flush_that_begins_late_is_cancelled_as_well(kernel: FakePipes, pair: Pair) -> None:
    """The first cancellation comes before it waits."""
    server, _ = pair
    server.sendall(b"not read")
    begin = threading.Event()
    flush = kernel.flush

    def late(pipe: End) -> None:
        assert begin.wait(20)
        flush(pipe)

    kernel.flush = late  # type: ignore[method-assign]
    kernel.cancel(server._pipe)

    def finish() -> None:
        with pytest.raises(OSError):
            server.shutdown(socket.SHUT_WR)

    with in_thread(finish) as finishing:
        with in_thread(server.close) as closing:
            assert waits(closing)
            begin.set()
        finishing.result(20)


def test_handles_are_closed_by_the_last_who_uses_them(kernel: FakePipes, pair: Pair) -> None:
    """The stand-in looks that none is used after that."""
    server, client = pair

    def read() -> None:
        with pytest.raises(OSError):
            server.recv(1)

    with in_thread(read) as reading:
        assert waits(reading)
        server.close()
    assert server._pipe.closed
    with pytest.raises(ConnectionResetError):
        client.recv(1)
