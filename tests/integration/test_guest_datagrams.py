"""UDP that is published on an IPv6 address alone: the host's relay and the agent's, joined.

A connection of sockets stands for the tunnel's stream, and this computer's ``::1`` for the
guest's.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from fake_monitor import free_port
from sandbox import wait_until
from stub_engine import SocketStream

if sys.platform != "linux":
    pytest.skip("the agent is for Linux", allow_module_level=True)

from wherry.core.errors import TunnelError
from wherry.ports import guest_datagrams
from wherry.ports.conflicts import try_bind
from wherry.ports.desired import Forward
from wherry.ports.guest_datagrams import GuestDatagramRelay
from wherry_guest import datagrams, system
from wherry_wire.frames import DATAGRAM, Decoder, Frame
from wherry_wire.messages import DatagramsListen, DatagramsTo, Done, Message, pack

UDP = socket.SOCK_DGRAM


class Guest:
    """Where the relay's connections end; it can refuse them, and lose them."""

    def __init__(self) -> None:
        self.refuses = False
        self.asked = 0
        self.opened = 0
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def open(self) -> SocketStream:
        self.asked += 1
        if self.refuses:
            raise TunnelError("there is no guest")
        self.opened += 1
        ours, theirs = socket.socketpair()
        self._ends.append(theirs)
        self._threads.append(threading.Thread(target=datagrams.serve, args=(theirs,)))
        self._threads[-1].start()
        return SocketStream(ours)

    def cut(self) -> None:
        for each in self._ends:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def all_ended(self) -> bool:
        return not any(each.is_alive() for each in self._threads)


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest()
    yield made
    made.cut()
    wait_until(made.all_ended, 10, "the agent's threads end")


@pytest.fixture
def echo() -> Iterator[int]:
    """A server on ::1 that adds something, so that nothing comes back by itself."""
    with socket.socket(socket.AF_INET6, UDP) as server:
        server.bind(("::1", 0))
        server.settimeout(0.05)
        over = threading.Event()

        def run() -> None:
            while not over.is_set():
                with contextlib.suppress(TimeoutError):
                    data, client = server.recvfrom(65536)
                    server.sendto(data + b"!", client)

        thread = threading.Thread(target=run)
        thread.start()
        yield server.getsockname()[1]
        over.set()
        thread.join()


@contextlib.contextmanager
def relay(guest: Guest, port: int) -> Iterator[Forward]:
    forward = Forward("udp", "::1", free_port(UDP))
    made = GuestDatagramRelay(forward, ("::1", port), guest.open)
    made.start()
    try:
        yield forward
    finally:
        made.close()
    assert try_bind(forward) is None
    assert len(made._numbers) == len(made._clients)
    wait_until(guest.all_ended, 10, "its connections end with it")


def client(forward: Forward) -> socket.socket:
    made = socket.socket(socket.AF_INET6, UDP)
    made.settimeout(5)
    made.connect((forward.address, forward.port))
    return made


def answered(sock: socket.socket, data: bytes, tries: int = 20) -> bool:
    """Whether an answer comes at last; datagrams may be lost."""
    sock.settimeout(0.3)
    for _ in range(tries):
        sock.send(data)
        with contextlib.suppress(TimeoutError):
            if sock.recv(65536) == data + b"!":
                return True
    return False


def test_answers_find_their_clients(guest: Guest, echo: int) -> None:
    with relay(guest, echo) as forward:
        assert guest.opened == 0, "nobody has sent anything yet"
        with client(forward) as one, client(forward) as two:
            for round in range(200):
                one.send(b"one%d" % round)
                two.send(b"two%d" % round)
                assert one.recv(100) == b"one%d!" % round
                assert two.recv(100) == b"two%d!" % round
    assert guest.opened == 1


def test_datagrams_of_all_sizes_keep_their_ends(guest: Guest, echo: int) -> None:
    """The largest is what IPv6's length allows (RFC 8200, 4.5), less what is added here."""
    with relay(guest, echo) as forward, client(forward) as sock:
        for size in (0, 1, 1472, 1500, 40_000, 65_526):
            data = os.urandom(size)
            sock.send(data)
            assert sock.recv(65536) == data + b"!"


def test_a_crowd_of_clients_gets_each_its_own(guest: Guest, echo: int) -> None:
    with relay(guest, echo) as forward, contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(client(forward)) for _ in range(100)]
        dice = random.Random(1)
        for _ in range(2000):
            at = dice.randrange(len(crowd))
            crowd[at].send(b"%d" % at)
            assert crowd[at].recv(100) == b"%d!" % at


def test_more_clients_than_are_remembered(
    guest: Guest, echo: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (guest_datagrams, datagrams):
        monkeypatch.setattr(module, "_CLIENTS", 4)
    before = psutil.Process().num_fds()
    with relay(guest, echo) as forward, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(client(forward)) for _ in range(20)]
        for _ in range(3):
            for each in clients:
                each.send(b"x")
                assert each.recv(10) == b"x!"
        # Ours, the relay's own six, and the sockets of four clients.
        assert psutil.Process().num_fds() <= before + len(clients) + 6 + 4


def test_who_goes_on_talking_is_not_the_one_forgotten(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (guest_datagrams, datagrams):
        monkeypatch.setattr(module, "_CLIENTS", 4)
    with socket.socket(socket.AF_INET6, UDP) as server, contextlib.ExitStack() as stack:
        server.bind(("::1", 0))
        server.settimeout(5)
        forward = stack.enter_context(relay(guest, server.getsockname()[1]))
        steady = stack.enter_context(client(forward))
        seen = set()
        for _ in range(10):
            steady.send(b"steady")
            seen.add(server.recvfrom(100)[1])
            other = stack.enter_context(client(forward))
            other.send(b"other")
            assert server.recvfrom(100)[0] == b"other"
        assert len(seen) == 1


def test_who_was_silent_is_forgotten_and_answered_again(
    guest: Guest, echo: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datagrams, "_IDLE_S", 0.2)
    with relay(guest, echo) as forward, client(forward) as sock:
        sock.send(b"x")
        assert sock.recv(10) == b"x!"
        with_socket = psutil.Process().num_fds()
        wait_until(lambda: psutil.Process().num_fds() < with_socket, 10, "it is forgotten")
        sock.send(b"y")
        assert sock.recv(10) == b"y!"


def test_a_lost_connection_is_made_again(
    guest: Guest, echo: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest_datagrams, "_RETRY_S", 0.05)
    with relay(guest, echo) as forward, client(forward) as sock:
        assert answered(sock, b"one")
        guest.refuses = True
        guest.cut()
        assert not answered(sock, b"two", tries=2)
        guest.refuses = False
        assert answered(sock, b"three")
    assert guest.opened == 2


def test_a_guest_that_is_away_is_not_asked_for_each_datagram(guest: Guest, echo: int) -> None:
    guest.refuses = True
    with relay(guest, echo) as forward, client(forward) as sock:
        for _ in range(50):
            sock.send(b"x")
        assert not answered(sock, b"x", tries=1)
        assert guest.asked == 1
        guest.refuses = False
        assert answered(sock, b"x")


def test_where_nobody_listens_nothing_comes_and_nothing_ends(guest: Guest) -> None:
    port = free_port(UDP)
    with relay(guest, port) as forward, client(forward) as sock:
        assert not answered(sock, b"x", tries=3)
        with socket.socket(socket.AF_INET6, UDP) as late:
            late.bind(("::1", port))
            late.settimeout(5)
            sock.send(b"y")
            while late.recv(10) != b"y":
                pass
    assert guest.opened == 1


def test_a_client_that_never_reads_stalls_nobody_else(guest: Guest, echo: int) -> None:
    with relay(guest, echo) as forward, client(forward) as deaf, client(forward) as sock:
        for _ in range(2000):
            deaf.send(bytes(1000))
        assert answered(sock, b"x")


@pytest.mark.parametrize(
    "wire",
    [
        pytest.param(lambda: Frame(DATAGRAM, 1, b"x").encode(), id="no address"),
        pytest.param(lambda: pack(Done(), 0), id="another message"),
        pytest.param(lambda: b"\xff" * 20, id="noise"),
    ],
)
def test_the_agent_ends_what_is_no_such_connection(wire: Callable[[], bytes]) -> None:
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=datagrams.serve, args=(theirs,))
    thread.start()
    with ours:
        ours.settimeout(5)
        ours.sendall(wire())
        assert ours.recv(1) == b""
    thread.join(5)
    assert not thread.is_alive()


def test_an_address_that_is_none_loses_what_is_sent_there() -> None:
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=datagrams.serve, args=(theirs,))
    thread.start()
    with ours:
        to: Message = DatagramsTo(address="no address", port=7)
        ours.sendall(pack(to, 0) + Frame(DATAGRAM, 1, b"x").encode())
        time.sleep(0.05)
        assert thread.is_alive()
    thread.join(5)
    assert not thread.is_alive()


def test_a_guest_that_answers_for_nobody_or_with_noise_reaches_no_client() -> None:
    forward = Forward("udp", "::1", free_port(UDP))
    ours, theirs = socket.socketpair()
    made = GuestDatagramRelay(forward, ("::1", 7), lambda: SocketStream(ours))
    made.start()
    try:
        with client(forward) as sock, theirs:
            sock.send(b"x")
            decoder = Decoder()
            theirs.settimeout(5)
            frames: list[Frame] = []
            while len(frames) < 2:
                frames += decoder.feed(theirs.recv(1000))
            theirs.sendall(Frame(DATAGRAM, frames[1].id + 1, b"wrong").encode())
            theirs.sendall(pack(Done(), frames[1].id))
            theirs.sendall(Frame(DATAGRAM, frames[1].id, b"right").encode())
            assert sock.recv(100) == b"right"
            theirs.sendall(b"\xff" * 100)
            assert theirs.recv(1) == b"", "the connection is ended"
    finally:
        made.close()


def test_the_agent_listens_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, echo: int) -> None:
    monkeypatch.setattr(datagrams, "_SOCKET", f"{tmp_path}/agent/d-%d")
    agent = datagrams.Datagrams()
    path = agent.listen(DatagramsListen()).socket
    made = Path(path).stat().st_ino
    assert agent.listen(DatagramsListen()).socket == path
    assert Path(path).stat().st_ino == made
    for _ in range(2):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(path)
            to: Message = DatagramsTo(address="::1", port=echo)
            connection.sendall(pack(to, 0) + Frame(DATAGRAM, 9, b"x").encode())
            (frame,) = Decoder().feed(connection.recv(1000))
            assert frame == Frame(DATAGRAM, 9, b"x!")
    # Who had the path before is gone.
    system.listen(path, lambda connection: connection.close())
