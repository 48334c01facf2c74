"""The agent as the guest runs it: the real command, on pipes, with the real client."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from wherry.core.errors import WherryError
from wherry.service import agent_bundle
from wherry.service.agent import AgentClient, Health
from wherry.service.agent_bundle import AgentBundle
from wherry_wire.frames import BULK, MAX_PAYLOAD_BYTES, Decoder, Frame
from wherry_wire.messages import Failure, HealthRequest, PowerOff, pack, unpack

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the agent is for Linux")

BUNDLE = agent_bundle.build()
WAIT_S = 20.0


class Pipes:
    """A program's standard input and output as a stream, like a channel of the tunnel."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.process = process
        self._stdin = process.stdin
        self._stdout = process.stdout

    def recv(self, size: int, /) -> bytes:
        return os.read(self._stdout.fileno(), size)

    def sendall(self, data: bytes, /) -> None:
        self._stdin.write(data)
        self._stdin.flush()

    def close(self) -> None:
        """Close the input; the agent ends, and with it its output."""
        try:
            self._stdin.close()
        except BrokenPipeError:
            pass


class Guest:
    """Starts agents with a client each, and ends them all."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = directory / "docker.sock"
        self.lost: list[WherryError] = []
        self.lost_once = threading.Event()
        self._processes: list[subprocess.Popen[bytes]] = []

    def spawn(self, command: list[str]) -> Pipes:
        with (self.directory / "stderr").open("ab") as stderr:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={"PATH": f"{self.directory}:{os.environ['PATH']}"},
            )
        self._processes.append(process)
        return Pipes(process)

    def client(
        self,
        pipes: Pipes | None = None,
        *,
        on_health: Callable[[Health], object] = lambda health: None,
    ) -> AgentClient:
        def lost(error: WherryError) -> None:
            self.lost.append(error)
            self.lost_once.set()

        return AgentClient(
            pipes or self.agent(),
            BUNDLE,
            lost=lost,
            on_health=on_health,
            data_path=os.fspath(self.directory),
            engine_socket=os.fspath(self.socket),
        )

    def agent(self) -> Pipes:
        command = BUNDLE.command(python=sys.executable, directory=f"{self.directory}/run")
        return self.spawn(["/bin/sh", "-c", command])

    def fake(self, code: str) -> Pipes:
        """Return an agent that reads the zipapp and then does as ``code`` says."""
        code = f"import os, sys, time\nsys.stdin.buffer.read({len(BUNDLE.data)})\n{code}"
        return self.spawn([sys.executable, "-IS", "-c", code])

    @property
    def log(self) -> str:
        return (self.directory / "stderr").read_text()

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                try:
                    stream.close()
                except BrokenPipeError:
                    pass
            process.wait(WAIT_S)


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    guest = Guest(tmp_path)
    yield guest
    guest.end()


class Engine:
    """A listener that gives every connection one answer, once it is released."""

    def __init__(self, path: Path, answer: bytes) -> None:
        self.requests: list[bytes] = []
        self.release = threading.Event()
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(os.fspath(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection = self._listener.accept()[0]
            except OSError:
                return
            with connection:
                self.requests.append(connection.recv(4096))
                self.release.wait(WAIT_S)
                try:
                    connection.sendall(self._answer)
                except BrokenPipeError:
                    pass

    def close(self) -> None:
        self.release.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(WAIT_S)


OK = b"HTTP/1.0 200 OK\r\nApi-Version: 1.51\r\nServer: Docker/28.5.2 (linux)\r\n\r\nOK"


@pytest.fixture
def engine(guest: Guest) -> Iterator[Engine]:
    engine = Engine(guest.socket, OK)
    yield engine
    engine.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_hello_tells_the_boot_id_and_stores_the_zipapp_once(guest: Guest) -> None:
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    stored = guest.directory / "run" / BUNDLE.name
    inodes = set()
    for _ in range(2):
        client = guest.client()
        assert client.hello() == boot_id
        client.close()
        inodes.add(stored.stat().st_ino)
    assert stored.read_bytes() == BUNDLE.data
    assert len(inodes) == 1
    assert [path.name for path in stored.parent.iterdir()] == [BUNDLE.name]
    assert guest.lost == []
    assert guest.log == ""


def test_the_zipapp_also_runs_by_itself(guest: Guest) -> None:
    path = guest.directory / BUNDLE.name
    path.write_bytes(BUNDLE.data)
    pipes = guest.spawn([sys.executable, "-I", os.fspath(path)])
    # What starts it does not read the zipapp from its input: that is a frame too large. It ends
    # while we may still be sending.
    with pytest.raises(WherryError):
        guest.client(pipes).hello()
    assert pipes.process.wait(WAIT_S) == 1
    assert "wherry agent: a frame announces" in guest.log


def test_frames_that_come_with_the_zipapp_are_not_swallowed(guest: Guest) -> None:
    pipes = guest.agent()
    pipes.sendall(BUNDLE.data + pack(PowerOff(), 7) * 3)
    decoder = Decoder()
    frames: list[Frame] = []
    while len(frames) < 3:
        frames += decoder.feed(pipes.recv(4096))
    assert [frame.id for frame in frames] == [7, 7, 7]


def test_a_zipapp_cut_short_is_not_stored(guest: Guest) -> None:
    pipes = guest.agent()
    pipes.sendall(BUNDLE.data[:-1])
    pipes.close()
    assert pipes.process.wait(WAIT_S) == 1
    assert "did not arrive completely" in guest.log
    assert not (guest.directory / "run").exists()


def test_health(guest: Guest, engine: Engine) -> None:
    engine.release.set()
    client = guest.client()
    client.hello()
    health = client.health()
    client.close()
    assert health.engine_ready
    assert health.engine_version == "28.5.2"
    assert engine.requests == [b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n"]
    assert abs(health.clock_offset_s) < 1
    assert 0 < health.memory_available_bytes < health.memory_total_bytes
    assert 0 < health.data_available_bytes <= health.data_total_bytes
    assert health.uptime_s > 0
    assert health.load >= 0


def test_health_without_an_engine(guest: Guest) -> None:
    client = guest.client()
    client.hello()
    assert client.health().engine_problem == "[Errno 2] No such file or directory"
    assert client.health(engine_timeout_s=0).engine_problem == "not asked"
    assert not client.health().engine_ready
    client.close()


def test_a_hanging_engine_is_a_finding_within_its_time(guest: Guest, engine: Engine) -> None:
    client = guest.client()
    client.hello()
    start = time.monotonic()
    assert client.health(engine_timeout_s=0.2).engine_problem == "timed out"
    assert time.monotonic() - start < 5
    client.close()


def test_two_requests_are_answered_in_the_order_they_are_ready(
    guest: Guest, engine: Engine
) -> None:
    client = guest.client()
    client.hello()
    slow: list[Health] = []
    thread = threading.Thread(target=lambda: slow.append(client.health(engine_timeout_s=WAIT_S)))
    thread.start()
    wait_for(lambda: bool(engine.requests))
    assert client.health(engine_timeout_s=0).engine_problem == "not asked"
    assert slow == []
    engine.release.set()
    thread.join(WAIT_S)
    assert slow[0].engine_version == "28.5.2"
    client.close()


def test_watching_health(guest: Guest) -> None:
    reports: list[Health] = []
    client = guest.client(on_health=reports.append)
    client.hello()
    client.watch_health(0.01, engine_timeout_s=0)
    wait_for(lambda: len(reports) >= 3)
    client.watch_health(0)
    client.health(engine_timeout_s=0)
    seen = len(reports)
    time.sleep(0.1)
    # One that had begun when the watch ended may still have come.
    assert len(reports) <= seen + 1
    client.close()


def test_the_agent_uses_no_processor_time_while_nothing_is_asked(guest: Guest) -> None:
    pipes = guest.agent()
    client = guest.client(pipes)
    client.hello()

    def used() -> int:
        fields = Path(f"/proc/{pipes.process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    time.sleep(0.2)  # it may still be at the end of its answer
    before = used()
    time.sleep(0.5)
    assert used() == before
    client.close()


def test_the_clock_is_left_alone_within_the_threshold(guest: Guest) -> None:
    client = guest.client()
    client.hello()
    assert client.sync_clock(threshold_s=3600) == 0
    client.close()


def test_a_failure_is_told_and_the_session_goes_on(guest: Guest) -> None:
    client = guest.client()
    client.hello()
    # No filesystem that tests run in has a mount point that can be trimmed without root.
    guest.directory.rename(guest.directory.with_name("away"))
    try:
        with pytest.raises(WherryError, match=r"agent in the guest failed: .*No such file"):
            client.fstrim()
        with pytest.raises(WherryError, match=r"agent in the guest failed: .*No such file"):
            client.health(engine_timeout_s=0)
    finally:
        guest.directory.with_name("away").rename(guest.directory)
    assert client.health(engine_timeout_s=0).uptime_s > 0
    client.close()


def test_hello_has_to_come_first(guest: Guest) -> None:
    client = guest.client()
    with pytest.raises(WherryError, match="hello has to come first"):
        client.fstrim()
    client.close()


def fake_poweroff(guest: Guest, body: str) -> Path:
    calls = guest.directory / "calls"
    program = guest.directory / "poweroff"
    program.write_text(f"#!/bin/sh\necho $# >>{calls}\n{body}\n")
    program.chmod(0o755)
    return calls


def test_poweroff_runs_the_guest_s_program(guest: Guest) -> None:
    # It has the agent's descriptors: what it prints or reads must not touch the frames.
    calls = fake_poweroff(guest, "echo noise; cat")
    client = guest.client()
    client.hello()
    client.poweroff()
    assert calls.read_text() == "0\n"
    assert client.health(engine_timeout_s=0).uptime_s > 0
    client.close()
    assert guest.log == "noise\n"


def test_poweroff_may_cut_its_own_answer_off(guest: Guest) -> None:
    fake_poweroff(guest, "kill -9 $PPID; sleep 1")
    client = guest.client()
    client.hello()
    client.poweroff()
    assert guest.lost_once.wait(WAIT_S)
    client.close()


def test_a_poweroff_that_refuses_is_a_failure(guest: Guest) -> None:
    fake_poweroff(guest, "exit 3")
    client = guest.client()
    client.hello()
    with pytest.raises(WherryError, match="poweroff failed with status 3"):
        client.poweroff()
    client.close()


def test_the_agent_ends_with_its_input(guest: Guest) -> None:
    pipes = guest.agent()
    client = guest.client(pipes)
    client.hello()
    client.watch_health(3600, engine_timeout_s=0)
    client.close()
    assert pipes.process.wait(WAIT_S) == 0
    with pytest.raises(WherryError, match="was closed"):
        client.health()
    client.close()
    assert guest.lost == []


def test_an_agent_killed_during_a_request_fails_it_at_once(guest: Guest, engine: Engine) -> None:
    pipes = guest.agent()
    client = guest.client(pipes)
    client.hello()

    def kill() -> None:
        wait_for(lambda: bool(engine.requests))
        pipes.process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    start = time.monotonic()
    with pytest.raises(WherryError, match="the agent in the guest has ended"):
        client.health(engine_timeout_s=WAIT_S)
    assert time.monotonic() - start < WAIT_S / 2
    killer.join(WAIT_S)
    assert guest.lost_once.wait(WAIT_S)
    with pytest.raises(WherryError, match="the agent in the guest has ended"):
        client.health()
    client.close()
    assert len(guest.lost) == 1


def test_a_silent_agent_runs_into_the_time_limit_and_may_answer_late(guest: Guest) -> None:
    pipes = guest.agent()
    client = guest.client(pipes)
    client.hello()
    pipes.process.send_signal(signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(WherryError, match=r"did not answer HealthRequest within 0\.2 s"):
        client.health(timeout_s=0.2, engine_timeout_s=0)
    assert time.monotonic() - start < 5
    pipes.process.send_signal(signal.SIGCONT)
    assert client.health(engine_timeout_s=0).uptime_s > 0
    client.close()
    assert guest.lost == []


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("print('Traceback (most recent call last):')", "a frame announces"),
        ("os.write(1, bytes(10))", "Done is not JSON"),
        ("os.write(1, b'\\0\\0\\0\\2\\0\\0\\0\\0\\0\\1{}')", "Done instead of HelloReply"),
        ("os.write(1, b'\\0\\0\\0\\2\\0\\0\\0\\0\\0\\0{}')", "Done answers nothing"),
        ("os.write(1, b'\\0\\0\\0\\2\\0\\0\\0\\0\\0\\t{}')", "answers a request never made"),
        ("os.write(1, b'\\0\\0\\0\\0\\x77\\0\\0\\0\\0\\1')", "unknown type 0x77"),
    ],
)
def test_garbage_ends_the_session_with_its_reason(guest: Guest, code: str, complaint: str) -> None:
    pipes = guest.fake(f"sys.stdin.buffer.read(1)\n{code}\nsys.stdout.flush()\ntime.sleep(60)")
    client = guest.client(pipes)
    with pytest.raises(WherryError, match=f"agent in the guest broke the protocol: .*{complaint}"):
        client.hello(timeout_s=WAIT_S)
    assert guest.lost_once.wait(WAIT_S)
    assert "broke the protocol" in guest.lost[0].message
    pipes.process.kill()
    client.close()


def test_another_agent_than_the_one_sent_is_refused(guest: Guest, tmp_path: Path) -> None:
    other = AgentBundle("agent-0123456789abcdef.pyz", BUNDLE.data)
    pipes = guest.spawn(
        ["/bin/sh", "-c", other.command(python=sys.executable, directory=os.fspath(tmp_path))]
    )
    client = guest.client(pipes)
    with pytest.raises(WherryError, match=r"is agent-0123456789abcdef\.pyz with protocol 1, not"):
        client.hello()
    client.close()


def test_a_program_that_never_starts_fails_hello_at_once(guest: Guest) -> None:
    command = BUNDLE.command(python="no-such-python", directory="/nowhere")
    pipes = guest.spawn(["/bin/sh", "-c", command])
    with pytest.raises(WherryError, match=r"agent in the guest has ended|connection .* was lost"):
        guest.client(pipes).hello()


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 10,
        Frame(BULK, 1, b"").encode(),
        pack(Failure(message="not for an agent"), 1),
        Frame(HealthRequest.TYPE, 1, b"{}").encode(),
    ],
    ids=["too large", "unknown bulk", "unexpected", "wrong fields"],
)
def test_the_agent_tells_why_it_ends_the_session(guest: Guest, data: bytes) -> None:
    pipes = guest.agent()
    pipes.sendall(BUNDLE.data + data)
    answer = b""
    while piece := pipes.recv(MAX_PAYLOAD_BYTES):
        answer += piece
    (frame,) = Decoder().feed(answer)
    message = unpack(frame)
    assert isinstance(message, Failure)
    assert frame.id == 0
    assert pipes.process.wait(WAIT_S) == 1
    assert guest.log == f"wherry agent: {message.message}\n"


def test_the_agent_is_small(guest: Guest, engine: Engine) -> None:
    engine.release.set()
    pipes = guest.agent()
    client = guest.client(pipes)
    client.hello()
    assert client.health().engine_ready
    status = Path(f"/proc/{pipes.process.pid}/status").read_text()
    resident_kib = int(status.partition("VmRSS:")[2].split()[0])
    client.close()
    assert resident_kib < 20 * 1024
