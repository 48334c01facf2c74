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
from loopback import answering, free_port, one_more_ipv6
from sandbox import wait_until
from stub_engine import SocketStream

if sys.platform != "linux":
    pytest.skip("the agent is for Linux", allow_module_level=True)

from wherry.core.errors import TunnelError
from wherry.ports import guest_datagrams
from wherry.ports.conflicts import try_bind
from wherry.ports.datagrams import DatagramRelay
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
    with answering("::1") as port:
        yield port


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
    assert len(made._by_number) == len(made._clients)
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


@contextlib.contextmanager
def few_clients(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[socket.socket, Forward, contextlib.ExitStack]]:
    """A server, a relay to it that remembers four clients, and where to leave those."""
    for module in (guest_datagrams, datagrams):
        monkeypatch.setattr(module, "_CLIENTS", 4)
    with socket.socket(socket.AF_INET6, UDP) as server, contextlib.ExitStack() as stack:
        server.bind(("::1", 0))
        server.settimeout(5)
        yield server, stack.enter_context(relay(guest, server.getsockname()[1])), stack


def test_who_goes_on_talking_is_not_the_one_forgotten(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    with few_clients(guest, monkeypatch) as (server, forward, stack):
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
    monkeypatch.setattr(datagrams, "_IDLE_S", 1.0)
    with relay(guest, echo) as forward, client(forward) as sock:
        for data in (b"x", b"y"):
            sock.send(data)
            assert sock.recv(10) == data + b"!"
            wait_until(lambda: not datagrams._sockets, 10, "it is forgotten")


def test_who_listens_only_is_not_forgotten(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A subscriber says something once; others come and go."""
    with few_clients(guest, monkeypatch) as (server, forward, stack):
        subscriber = stack.enter_context(client(forward))
        subscriber.send(b"subscribe")
        _, address = server.recvfrom(100)
        for number in range(10):
            other = stack.enter_context(client(forward))
            other.send(b"other")
            assert server.recvfrom(100)[0] == b"other"
            server.sendto(b"%d" % number, address)
            assert subscriber.recv(100) == b"%d" % number


def test_no_client_s_number_is_another_s_soon(guest: Guest, echo: int) -> None:
    """An answer that comes late finds its client or nobody."""
    with relay(guest, echo) as forward, contextlib.ExitStack() as stack:
        steady = stack.enter_context(client(forward))
        for number in range(400):
            steady.send(b"steady")
            assert steady.recv(100) == b"steady!"
            with client(forward) as other:
                other.send(b"%d" % number)
                assert other.recv(100) == b"%d!" % number


def test_all_ports_together_take_no_more_than_the_agent_has(
    echo: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datagrams, "_ALL_CLIENTS", 6)
    with contextlib.ExitStack() as stack:
        for round in range(3):
            forward = stack.enter_context(relay(Guest(), echo))
            for _ in range(5):
                sock = stack.enter_context(client(forward))
                assert answered(sock, b"x", tries=20 if round < 2 else 1) is (round < 2)
            assert len(datagrams._sockets) <= 6


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


@pytest.mark.parametrize("noise", [b"", b"\xff" * 100])
def test_a_guest_that_ends_each_connection_is_not_asked_again_at_once(noise: bytes) -> None:
    forward = Forward("udp", "::1", free_port(UDP))
    asked = []

    def open_() -> SocketStream:
        ours, theirs = socket.socketpair()
        theirs.sendall(noise)
        theirs.close()
        asked.append(ours)
        return SocketStream(ours)

    made = GuestDatagramRelay(forward, ("::1", 7), open_)
    made.start()
    try:
        with client(forward) as sock:
            end = time.monotonic() + 1.5
            while time.monotonic() < end:
                sock.send(b"x")
                time.sleep(0.001)
        assert 1 <= len(asked) <= 3
    finally:
        made.close()


def test_while_a_connection_is_opened_nothing_waits_for_it() -> None:
    """A close does not, and what is opened too late is closed again."""
    forward = Forward("udp", "::1", free_port(UDP))
    opened, ours, theirs = threading.Event(), *socket.socketpair()

    def open_() -> SocketStream:
        opened.wait(20)
        return SocketStream(ours)

    made = GuestDatagramRelay(forward, ("::1", 7), open_)
    made.start()
    with client(forward) as sock, theirs:
        sock.send(b"x")
        wait_until(lambda: made._reader is not None, 10, "it is being opened")
        begun = time.monotonic()
        made.close()
        assert time.monotonic() - begun < 2
        assert try_bind(forward) is None
        opened.set()
        theirs.settimeout(5)
        assert theirs.recv(1) == b""


def test_a_close_waits_for_no_guest_that_takes_nothing() -> None:
    """Not for the first bytes on a new connection either."""
    forward = Forward("udp", "::1", free_port(UDP))
    sending, closed, ends = threading.Event(), threading.Event(), socket.socketpair()

    class Stuck(SocketStream):
        def sendall(
            self, data: memoryview | bytes, waiting: Callable[[], None] | None = None
        ) -> None:
            sending.set()
            closed.wait(20)
            raise TunnelError("it was closed")

        def close(self) -> None:
            closed.set()
            super().close()

    made = GuestDatagramRelay(forward, ("::1", 7), lambda: Stuck(ends[0]))
    made.start()
    with client(forward) as sock, ends[1]:
        for _ in range(10):
            sock.send(b"x")
        assert sending.wait(10)
        begun = time.monotonic()
        made.close()
        assert time.monotonic() - begun < 2
        assert try_bind(forward) is None


def test_what_comes_while_a_connection_is_opened_arrives(echo: int, guest: Guest) -> None:
    forward = Forward("udp", "::1", free_port(UDP))
    opened = threading.Event()

    def open_() -> SocketStream:
        opened.wait(20)
        return guest.open()

    made = GuestDatagramRelay(forward, ("::1", echo), open_)
    made.start()
    try:
        with client(forward) as sock:
            for number in range(10):
                sock.send(b"%d" % number)
            wait_until(lambda: len(made._waiting) == 10, 10, "they wait")
            opened.set()
            assert {sock.recv(10) for _ in range(10)} == {b"%d!" % each for each in range(10)}
    finally:
        made.close()


def test_a_guest_that_takes_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_datagrams, "_SEND_S", 0.3)
    forward = Forward("udp", "::1", free_port(UDP))
    streams: list[Full] = []

    class Full(SocketStream):
        """What is never read: a window that stays full after the first bytes."""

        def __init__(self, sock: socket.socket) -> None:
            super().__init__(sock)
            self.sent = 0
            streams.append(self)

        def sendall(
            self, data: memoryview | bytes, waiting: Callable[[], None] | None = None
        ) -> None:
            self.sent += len(data)
            while self.sent > 2000:
                assert waiting is not None
                waiting()
                time.sleep(0.01)

    ends: list[socket.socket] = []

    def open_() -> SocketStream:
        ours, theirs = socket.socketpair()
        ends.append(theirs)
        return Full(ours)

    made = GuestDatagramRelay(forward, ("::1", 7), open_)
    made.start()
    try:
        with client(forward) as sock:

            def again() -> bool:
                sock.send(bytes(1000))
                return len(streams) > 1

            wait_until(again, 20, "it is given up for another one")
    finally:
        made.close()
        for each in ends:
            each.close()


@pytest.fixture
def other_ipv6() -> Iterator[str]:
    with one_more_ipv6() as address:
        yield address


@pytest.mark.parametrize("through_guest", [False, True])
def test_answers_come_from_the_address_that_was_asked(
    guest: Guest, echo: int, other_ipv6: str, through_guest: bool
) -> None:
    """The system would choose ::1 for a client on ::1."""
    forward = Forward("udp", "::", free_port(UDP))
    made: GuestDatagramRelay | DatagramRelay
    with socket.socket(socket.AF_INET, UDP) as server:
        if through_guest:
            made = GuestDatagramRelay(forward, ("::1", echo), guest.open)
        else:
            server.bind(("127.0.0.1", 0))
            made = DatagramRelay(forward, server.getsockname())
        made.start()
        try:
            with socket.socket(socket.AF_INET6, UDP) as sock:
                sock.bind(("::1", 0))
                sock.settimeout(5)
                for asked in (other_ipv6, "::1", other_ipv6):
                    sock.sendto(b"x", (asked, forward.port))
                    if not through_guest:
                        server.sendto(b"x!", server.recvfrom(10)[1])
                    data, address = sock.recvfrom(10)
                    assert (data, address[0]) == (b"x!", asked)
        finally:
            made.close()


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
            # Longer than any datagram: this one cannot be sent, and no other one is lost.
            theirs.sendall(Frame(DATAGRAM, frames[1].id, bytes(70_000)).encode())
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
    # Each has a thread: one that stays is in nobody's way. Who had the path before is gone.
    held = threading.Event()
    system.listen(path, lambda connection: held.wait(20) and connection.close())
    with socket.socket(socket.AF_UNIX) as one, socket.socket(socket.AF_UNIX) as two:
        for each in (one, two):
            each.settimeout(5)
            each.connect(path)
        held.set()
        assert (one.recv(1), two.recv(1)) == (b"", b"")


def test_the_agent_goes_on_accepting_when_it_could_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when it has no descriptor left, or no memory for a thread."""
    start, accept = system._thread.start_new_thread, socket.socket.accept
    failures = {"thread": 2, "accept": 2}

    def start_new_thread(function: Callable[..., object], arguments: tuple[object, ...]) -> int:
        if arguments and failures["thread"]:
            failures["thread"] -= 1
            raise RuntimeError("can't start new thread")
        return start(function, arguments)

    def accept_one(listener: socket.socket) -> tuple[socket.socket, object]:
        if failures["accept"]:
            failures["accept"] -= 1
            raise OSError("too many open files")
        return accept(listener)

    def serve(connection: socket.socket) -> None:
        with connection:
            connection.sendall(b"here")

    monkeypatch.setattr(system._thread, "start_new_thread", start_new_thread)
    monkeypatch.setattr(socket.socket, "accept", accept_one)
    path = f"{tmp_path}/s.sock"
    system.listen(path, serve)
    for answer in (b"", b"", b"here"):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(path)
            assert connection.recv(10) == answer
    assert capsys.readouterr().err.count("a connection cannot be served: ") == 4
