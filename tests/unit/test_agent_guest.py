"""What the agent does in the guest, as far as it can be told without one."""

from __future__ import annotations

import os
import socket
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from wherry_wire.frames import Decoder, Frame
from wherry_wire.messages import ClockSet, Done, Failure, Message, PowerOff, Trim, pack, unpack

if sys.platform != "linux":
    pytest.skip("the agent is for Linux", allow_module_level=True)

from wherry_guest import engine, system
from wherry_guest.agent import Agent
from wherry_guest.session import Session


@pytest.mark.parametrize(
    ("answer", "version"),
    [
        (b"HTTP/1.0 200 OK\r\nServer: Docker/28.5.2 (linux)\r\n\r\nOK", "28.5.2"),
        (b"HTTP/1.1 200 OK\r\nserver:Docker/29.0.0-rc.1\r\n\r\nOK", "29.0.0-rc.1"),
        (b"HTTP/1.0 200 OK\r\nServer: Libpod/5.4.2 (linux)\r\n\r\nOK", ""),
        (b"HTTP/1.0 200\r\n\r\n", ""),
    ],
)
def test_the_engine_s_answer_is_understood(answer: bytes, version: str) -> None:
    assert engine.parse(answer) == version


@pytest.mark.parametrize(
    "answer", [b"", b"\r\n", b"\xff" * 1000, b"HTTP/1.0", b"HTTP/1.0 500 Oh no\r\n\r\n", b"OK"]
)
def test_an_unwell_engine_is_an_error(answer: bytes) -> None:
    with pytest.raises(OSError, match="the engine answered"):
        engine.parse(answer)


def test_an_engine_that_accepts_nobody_is_an_error_at_once(tmp_path: Path) -> None:
    path = os.fspath(tmp_path / "docker.sock")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(path)
        listener.listen(0)
        first.connect(path)  # Now the backlog is full.
        with pytest.raises(OSError):
            engine.ping(path, 0.2)


def test_an_engine_that_answers_byte_by_byte_is_cut_off(tmp_path: Path) -> None:
    path = os.fspath(tmp_path / "docker.sock")
    asked = threading.Event()

    def drip() -> None:
        with listener.accept()[0] as connection:
            try:
                while not asked.wait(0.01):
                    connection.sendall(b"H")
            except BrokenPipeError:
                pass

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        thread = threading.Thread(target=drip)
        thread.start()
        with pytest.raises(TimeoutError):
            engine.ping(path, 0.05)
        asked.set()
        thread.join(10)


def test_memory_is_in_bytes() -> None:
    text = "MemTotal:  2048 kB\nMemFree: 1 kB\nMemAvailable: 1024 kB\nHugePages_Total:  0\n"
    assert system.parse_memory(text) == (2 << 20, 1 << 20)
    with pytest.raises(OSError, match="no 'MemAvailable:'"):
        system.parse_memory("MemTotal: 1 kB\n")


def test_trim_makes_the_kernel_s_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def ioctl(descriptor: int, request: int, argument: bytearray) -> int:
        # struct fstrim_range of linux/fs.h: start, len, minlen; len is also the answer.
        calls.append((Path(f"/proc/self/fd/{descriptor}").readlink(), request, bytes(argument)))
        argument[8:16] = (4096).to_bytes(8, sys.byteorder)
        return 0

    monkeypatch.setattr("wherry_guest.system.fcntl.ioctl", ioctl)
    assert system.trim(os.fspath(tmp_path)) == 4096
    direction, size, letter, number = 3, 24, ord("X"), 121
    request = direction << 30 | size << 16 | letter << 8 | number
    assert calls == [(tmp_path, request, bytes(8) + b"\xff" * 8 + bytes(8))]


def test_a_disk_that_cannot_trim_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def ioctl(*_: object) -> int:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("wherry_guest.system.fcntl.ioctl", ioctl)
    with pytest.raises(OSError, match=r"Operation not supported \(FITRIM\): '/proc'"):
        system.trim("/proc")


@pytest.mark.parametrize(
    ("offset_s", "corrected"), [(0.4, False), (-0.4, False), (0.6, True), (-86400.0, True)]
)
def test_the_clock_is_corrected_beyond_the_threshold(
    offset_s: float, corrected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_to: list[float] = []
    monkeypatch.setattr(system, "set_clock", set_to.append)
    monkeypatch.setattr("wherry_guest.agent.time", SimpleNamespace(time=lambda: 1000.0 + offset_s))
    agent = Agent(Session(-1, -1))
    report = agent.set_clock(ClockSet(time_s=1000.0, threshold_s=0.5))
    assert report.offset_s == pytest.approx(offset_s)
    assert report.corrected is corrected
    assert set_to == [1000.0] * corrected


class Served:
    """A session on pipes, to which a test adds handlers."""

    def __init__(self) -> None:
        source, self._to = os.pipe()
        self._from, sink = os.pipe()
        self._descriptors = [source, self._from, sink]
        self.session = Session(source, sink)

    def converse(self, sent: bytes, replies: int) -> dict[int, Message]:
        thread = threading.Thread(target=self.session.run)
        thread.start()
        try:
            os.write(self._to, sent)
            decoder = Decoder()
            frames: list[Frame] = []
            while len(frames) < replies:
                frames += decoder.feed(os.read(self._from, 4096))
            return {frame.id: unpack(frame) for frame in frames}
        finally:
            os.close(self._to)
            thread.join(10)
            for descriptor in self._descriptors:
                os.close(descriptor)


def test_a_mistake_in_a_handler_is_its_request_s_failure(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def mistake(request: Trim) -> Done:
        raise ZeroDivisionError("oh")

    def odd_name(request: PowerOff) -> Done:
        raise FileNotFoundError(2, "No such file", b"\xff".decode(errors="surrogateescape"))

    served = Served()
    served.session.answer(Trim, mistake)
    served.session.answer(PowerOff, odd_name)
    replies = served.converse(pack(Trim(), 1) + pack(PowerOff(), 2), 2)
    assert replies[1] == Failure(message="ZeroDivisionError: oh")
    assert replies[2] == Failure(message="[Errno 2] No such file: '\\udcff'")
    assert "ZeroDivisionError: oh" in capsys.readouterr().err


def test_a_feature_can_take_frames_of_its_own() -> None:
    served = Served()
    served.session.on_frame(
        0x81, lambda frame: served.session.send(Failure(message=repr(frame)), frame.id)
    )
    replies = served.converse(Frame(0x81, 5, b"\0\1", 3).encode(), 1)
    assert replies == {5: Failure(message="Frame(0x81, 5, 2 bytes, 3)")}


def test_a_type_has_one_handler() -> None:
    session = Session(-1, -1)
    Agent(session)
    with pytest.raises(ValueError, match="has a handler"):
        session.answer(Trim, lambda request: Done())
