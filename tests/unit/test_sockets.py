"""A descriptor is not given back while a thread may be about to use its number."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from wherry.core.sockets import SharedSocket
from wherry.relay.pump import Ending

WAIT_S = 10


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    yield one, other
    one.close()
    other.close()


def test_it_is_closed_when_the_last_has_left(ends: tuple[socket.socket, socket.socket]) -> None:
    sock, other = ends
    number = sock.fileno()
    shared = SharedSocket(sock)

    def in_a_call() -> None:
        shared.close()
        # It has ended, but its number is still its own, and nobody else comes in.
        assert other.recv(1) == b""
        os.fstat(number)
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            shared.send(b"x")

    shared._call(in_a_call)
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        os.fstat(number)
    assert shared.fileno() == -1
    shared.close()


def test_closing_wakes_whoever_waits_in_it(ends: tuple[socket.socket, socket.socket]) -> None:
    sock, other = ends
    shared = SharedSocket(sock)
    got: list[int] = []
    reader = threading.Thread(target=lambda: got.append(shared.recv_into(memoryview(bytearray(9)))))
    reader.start()
    other.sendall(b"")
    while not shared._users:
        pass
    shared.close()
    reader.join(WAIT_S)
    assert got == [0]
    assert sock.fileno() == -1


def test_nothing_goes_through_it_afterwards(ends: tuple[socket.socket, socket.socket]) -> None:
    shared = SharedSocket(ends[0])
    assert shared.sendmsg is not None
    assert shared.sendmsg([b"a", b"b"]) + shared.send(b"c") == 3
    shared.sendall(b"d")
    assert ends[1].recv(9) == b"abcd"
    shared.close()
    for call in (
        lambda: shared.send(b"x"),
        lambda: shared.sendall(b"x"),
        lambda: shared.recv(1),
        lambda: shared.shutdown(socket.SHUT_WR),
    ):
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            call()


class Slow(socket.socket):
    """One whose shutdown takes as long as a test wants."""

    entered: threading.Event
    leave: threading.Event

    def shutdown(self, how: int) -> None:
        self.entered.set()
        assert self.leave.wait(WAIT_S)
        super().shutdown(how)


def test_a_stream_is_not_closed_while_another_thread_ends_it(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    sock, other = Slow(fileno=ends[0].detach()), ends[1]
    sock.entered, sock.leave = threading.Event(), threading.Event()
    ending = Ending(sock)
    shuts = threading.Thread(target=ending.shut, args=(socket.SHUT_WR,))
    shuts.start()
    assert sock.entered.wait(WAIT_S)
    closes = threading.Thread(target=ending.close)
    closes.start()
    closes.join(0.1)
    assert closes.is_alive()
    sock.leave.set()
    closes.join(WAIT_S)
    shuts.join(WAIT_S)
    assert sock.fileno() == -1
    assert other.recv(1) == b""
    sock.entered.clear()
    ending.shut(socket.SHUT_RDWR)
    assert not sock.entered.is_set()
