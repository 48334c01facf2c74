"""The tunnel through a real sshd on loopback."""

from __future__ import annotations

import contextlib
import io
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from loopback import free_port
from loopback_sshd import LoopbackSshd, echo, unix_server

from wherry.core.errors import TunnelError
from wherry.tunnel import transport, tunnel, windows
from wherry.tunnel.connection import Connection
from wherry.tunnel.keys import make_keys
from wherry.tunnel.packetizer import FastPacketizer
from wherry.tunnel.stream import Stream
from wherry.tunnel.tunnel import State, Tunnel
from wherry.tunnel.windows import WINDOW_BYTES

pytestmark = pytest.mark.skipif(not Path("/usr/sbin/sshd").exists(), reason="needs openssh-server")

WAIT_S = 10.0


@pytest.fixture
def own_sshd(tmp_path: Path) -> Iterator[LoopbackSshd]:
    """One that the test may stop."""
    server = LoopbackSshd(tmp_path / "sshd")
    yield server
    server.stop()


def connect(sshd: LoopbackSshd, **options: Any) -> Connection:
    options = {"user_key": sshd.keys.user, "host_public": sshd.keys.host.public} | options
    return Connection.connect(sshd.address, user=sshd.user, timeout_s=WAIT_S, **options)


@pytest.fixture
def connection(sshd: LoopbackSshd) -> Iterator[Connection]:
    before = set(threading.enumerate())
    with contextlib.closing(connect(sshd)) as made:
        yield made
    assert set(threading.enumerate()) <= before


def wait_for(condition: Any, what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


# -- commands ------------------------------------------------------------------------------


def test_the_fast_cipher_is_agreed_on(connection: Connection) -> None:
    assert connection.cipher == "aes128-gcm@openssh.com"


def test_small_packets_wait_for_no_others(connection: Connection) -> None:
    """Each new channel would take 40 ms more (tcp(7), TCP_NODELAY)."""
    sock = connection._transport.sock._sock
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_run(connection: Connection) -> None:
    done = connection.run("cat; echo error >&2; exit 3", b"input", timeout_s=WAIT_S)
    assert (done.status, done.stdout, done.stderr) == (3, b"input", b"error\n")


def test_run_takes_more_than_the_window_of_both_outputs(connection: Connection) -> None:
    command = "head -c 6000000 /dev/zero >&2; head -c 6000000 /dev/zero; cat >/dev/null"
    done = connection.run(command, bytes(5_000_000), timeout_s=WAIT_S)
    assert (len(done.stdout), len(done.stderr)) == (6_000_000, 6_000_000)
    done = connection.run("yes | head -c 3000000", timeout_s=WAIT_S, limit_bytes=10)
    assert done.stdout == b"y\n" * 5


def test_run_tells_the_signal(connection: Connection) -> None:
    assert connection.run("kill -KILL $$", timeout_s=WAIT_S).status == 128 + signal.SIGKILL


def test_run_is_bounded(connection: Connection) -> None:
    start = time.monotonic()
    with pytest.raises(TunnelError, match="did not end within"):
        connection.run("sleep 30", timeout_s=0.5)
    with pytest.raises(TunnelError, match=r"in time|did not end"):
        connection.run("sleep 30", bytes(20_000_000), timeout_s=0.5)
    assert time.monotonic() - start < 5
    assert connection.run("echo still here", timeout_s=WAIT_S).stdout == b"still here\n"


def test_a_command_need_not_read_its_input(connection: Connection) -> None:
    assert connection.run("exit 4", bytes(20_000_000), timeout_s=WAIT_S).status == 4


def test_exec_is_a_stream_both_ways(connection: Connection) -> None:
    process = connection.exec("while read x; do echo got $x; done; echo bye >&2; exit 5")
    process.stdio.sendall(b"one\n")
    assert process.stdio.recv(100) == b"got one\n"
    process.stdio.shutdown_write()
    assert process.stdio.recv(100) == b""
    assert process.recv_stderr(100) == b"bye\n"
    assert process.wait(WAIT_S) == 5
    process.close()


def test_a_little_is_sent_past_much(connection: Connection, tmp_path: Path) -> None:
    """Whoever has much to send holds a lock that the others with much to send wait for."""
    with unix_server(tmp_path / "s", echo) as path:
        stream = connection.open_unix(path)
        with connection._transport._bulk:
            stream.sendall(b"a")
            stream.send_from(lambda parts: io.BytesIO(b"b").readinto(parts[0]))
            assert stream.recv(1) + stream.recv(1) == b"ab"
            much = threading.Thread(target=stream.sendall, args=(bytes(100_000),))
            much.start()
            much.join(0.05)
            assert much.is_alive()
        much.join(WAIT_S)
        stream.close()


def test_the_end_of_writing_does_not_wait_for_a_silent_guest(
    own_sshd: LoopbackSshd, tmp_path: Path
) -> None:
    """A program that connects and says nothing has to learn that nobody is there, too."""
    told: list[TunnelError | None] = []

    class Sink:
        def write(self, parts: list[memoryview]) -> int:
            return sum(map(len, parts))

        def stalled(self) -> None:
            pass

        def ended(self, error: TunnelError | None) -> None:
            told.append(error)

        def hung_up(self) -> None:
            pass

    with unix_server(tmp_path / "s", echo) as path, contextlib.closing(connect(own_sshd)) as made:
        own_sshd.signal_sessions(signal.SIGSTOP)
        try:
            stream = made.begin_unix(path, timeout_s=0.5)
            stream.deliver_to(Sink())
            stream.shutdown_write()
        finally:
            own_sshd.signal_sessions(signal.SIGCONT)
        assert "in time" in str(told[0])
        assert made.run("echo still here", timeout_s=WAIT_S).stdout == b"still here\n"


# -- refusals ---------------------------------------------------------------------------------


def test_another_host_key_is_refused(sshd: LoopbackSshd, tmp_path: Path) -> None:
    threads = set(threading.enumerate())
    with pytest.raises(TunnelError, match="host key is not this machine's"):
        connect(sshd, host_public=make_keys(tmp_path).host.public)
    assert set(threading.enumerate()) <= threads


def test_another_user_key_is_refused(sshd: LoopbackSshd, tmp_path: Path) -> None:
    threads = set(threading.enumerate())
    with pytest.raises(TunnelError, match="does not accept the machine's key"):
        connect(sshd, user_key=make_keys(tmp_path).user)
    assert set(threading.enumerate()) <= threads


def test_a_server_that_says_nothing_is_bounded(tmp_path: Path) -> None:
    keys = make_keys(tmp_path)
    threads = set(threading.enumerate())
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        with pytest.raises(TunnelError, match="longer than"):
            Connection.connect(
                silent.getsockname(),
                user_key=keys.user,
                host_public=keys.host.public,
                timeout_s=0.3,
            )
        assert time.monotonic() - start < 3
        port = silent.getsockname()[1]
    with pytest.raises(TunnelError, match=f"no connection to .*127.0.0.1:{port}"):
        Connection.connect(
            ("127.0.0.1", port), user_key=keys.user, host_public=keys.host.public, timeout_s=1
        )
    assert set(threading.enumerate()) <= threads


def test_a_socket_that_is_not_there_is_named(connection: Connection, tmp_path: Path) -> None:
    with pytest.raises(TunnelError, match=f"nothing answers at {tmp_path}/none"):
        connection.open_unix(f"{tmp_path}/none")
    stream = connection.begin_unix(f"{tmp_path}/none")
    with pytest.raises(TunnelError, match="nothing answers"):
        stream.recv(1)
    with pytest.raises(TunnelError, match="nothing answers"):
        stream.sendall(b"x")
    assert not connection.closed


def test_concurrent_refusals_keep_their_reasons(connection: Connection, tmp_path: Path) -> None:
    streams = [connection.begin_unix(f"{tmp_path}/none{n}") for n in range(20)]
    for number, stream in enumerate(streams):
        with pytest.raises(TunnelError, match=f"none{number} "):
            stream.recv(1)


# -- streams --------------------------------------------------------------------------------


def test_a_stream_echoes_and_ends(connection: Connection, tmp_path: Path) -> None:
    with unix_server(tmp_path / "s", echo) as path:
        stream = connection.open_unix(path)
        stream.sendall(b"hello")
        assert stream.recv(100) == b"hello"
        stream.shutdown_write()
        stream.shutdown_write()
        assert stream.recv(1) == b""
        stream.close()
        stream.close()
        with pytest.raises(TunnelError, match="closed"):
            stream.sendall(b"x")


def test_many_streams_are_together_no_further_ahead_than_one(
    connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small answer waits for what all of them were sent before it."""
    monkeypatch.setattr(windows, "BUSY_S", WAIT_S)  # also where a thread waits long for its turn

    def pour(server: socket.socket) -> None:
        while True:
            server.sendall(bytes(1 << 16))

    taken = [0] * 8

    def take(stream: Stream, index: int) -> None:
        buffer = memoryview(bytearray(1 << 16))
        with contextlib.suppress(TunnelError):
            while count := stream.recv_into(buffer):
                taken[index] += count

    def reached(goals: list[int]) -> bool:
        return all(count >= goal for count, goal in zip(taken, goals, strict=True))

    with unix_server(tmp_path / "s", pour) as path:
        streams: list[Any] = [connection.open_unix(path) for _ in taken]
        threads = [
            threading.Thread(target=take, args=(stream, index))
            for index, stream in enumerate(streams)
        ]
        for thread in threads:
            thread.start()
        for _ in range(2):  # until all are known to bring much, and then once more
            goals = [count + WINDOW_BYTES for count in taken]
            wait_for(partial(reached, goals), "each stream goes on")
        owed = [stream.in_window_sofar for stream in streams]
        for stream in streams:
            stream.close()
        for thread in threads:
            thread.join(WAIT_S)
    assert sum(WINDOW_BYTES - each for each in owed) <= WINDOW_BYTES + 8 * (1 << 16)


def test_closing_wakes_a_reader_and_a_writer(connection: Connection, tmp_path: Path) -> None:
    go = threading.Event()
    with unix_server(tmp_path / "s", lambda c: go.wait(WAIT_S) and None) as path:
        stream = connection.open_unix(path)
        errors: list[BaseException] = []

        def keep(action: Any, argument: Any) -> None:
            try:
                action(argument)
            except TunnelError as error:
                errors.append(error)

        threads = [
            threading.Thread(target=keep, args=(stream.recv, 1)),
            threading.Thread(target=keep, args=(stream.sendall, bytes(50_000_000))),
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        stream.close()
        for thread in threads:
            thread.join(WAIT_S)
        go.set()
        assert len(errors) == 2


def test_a_stream_closed_while_opening_does_not_stay_open(
    connection: Connection, tmp_path: Path
) -> None:
    ended = threading.Event()

    def handler(c: socket.socket) -> None:
        c.recv(1)
        ended.set()

    with unix_server(tmp_path / "s", handler) as path:
        connection.begin_unix(path).close()
        assert ended.wait(WAIT_S)


def test_new_keys_during_a_transfer(
    sshd: LoopbackSshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FastPacketizer, "REKEY_BYTES", 3_000_000)
    data = random.Random(1).randbytes(30_000_000)
    received: list[bool] = []
    with unix_server(tmp_path / "s", echo) as path, contextlib.closing(connect(sshd)) as made:
        stream = made.open_unix(path)

        def receive() -> None:
            got = bytearray()
            while len(got) < len(data) and (more := stream.recv(1 << 20)):
                got += more
            received.append(got == data)

        reader = threading.Thread(target=receive)
        reader.start()
        session = made._transport.H
        source = io.BytesIO(data)
        while source.tell() < len(data):
            if source.tell() % 3:
                stream.sendall(source.read(1_000_000))
            else:
                stream.send_from(lambda parts: sum(map(source.readinto, parts)))
            # Channels that end while keys are exchanged must not wait for that.
            made.begin_unix(path).close()
        reader.join(WAIT_S)
        assert received == [True]
        assert session != made._transport.H


# -- the connection's end ----------------------------------------------------------------------


def test_a_killed_server_ends_streams_with_an_error(own_sshd: LoopbackSshd, tmp_path: Path) -> None:
    with (
        unix_server(tmp_path / "s", echo) as path,
        contextlib.closing(connect(own_sshd)) as made,
    ):
        stream = made.open_unix(path)
        own_sshd.stop()
        with pytest.raises(TunnelError, match="lost"):
            stream.recv(1)
        with pytest.raises(TunnelError, match="lost"):
            stream.sendall(b"x")
        assert made.closed
        with pytest.raises(TunnelError, match="lost"):
            made.open_unix(path)


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "sending"])
def test_a_frozen_server_is_noticed(own_sshd: LoopbackSshd, tmp_path: Path, busy: bool) -> None:
    errors: list[TunnelError] = []
    over = threading.Event()

    class Watcher:
        def started(self, connection: Connection) -> None: ...

        def ended(self, error: TunnelError) -> None:
            errors.append(error)
            over.set()

    with unix_server(tmp_path / "s", lambda c: [*iter(lambda: c.recv(1 << 20), b"")]) as path:
        made = connect(own_sshd, keepalive_s=0.3, dead_after_s=1.0, watcher=Watcher())
        stream = made.open_unix(path)
        sender = threading.Thread(target=_send_for_ever, args=(stream,))
        if busy:
            sender.start()
            time.sleep(0.1)
        own_sshd.signal_sessions(signal.SIGSTOP)
        start = time.monotonic()
        try:
            assert over.wait(WAIT_S)
        finally:
            own_sshd.signal_sessions(signal.SIGCONT)
            made.close()
        assert 0.5 < time.monotonic() - start < 4
        assert "no sign of life" in str(errors[0])
        if busy:
            sender.join(WAIT_S)
            assert not sender.is_alive()


def _send_for_ever(stream: Any) -> None:
    with contextlib.suppress(TunnelError):
        while True:
            stream.sendall(bytes(1_000_000))


def test_silence_alone_is_no_end(sshd: LoopbackSshd) -> None:
    with contextlib.closing(connect(sshd, keepalive_s=0.3, dead_after_s=1.5)) as made:
        time.sleep(2.5)
        assert made.run("echo here", timeout_s=WAIT_S).stdout == b"here\n"


def test_closing_leaves_no_thread(sshd: LoopbackSshd, tmp_path: Path) -> None:
    threads = set(threading.enumerate())
    made = connect(sshd)
    made.run("true", timeout_s=WAIT_S)
    time.sleep(0.3)  # until nothing comes any more that would wake the reader
    start = time.monotonic()
    made.close()
    made.close()
    assert time.monotonic() - start < 2
    assert set(threading.enumerate()) <= threads
    with pytest.raises(TunnelError, match="lost"):
        made.run("true", timeout_s=1)


# -- Tunnel ---------------------------------------------------------------------------------


class Kept:
    """A tunnel to a server, and the states it went through."""

    def __init__(self, sshd: LoopbackSshd, **options: Any) -> None:
        self.sshd = sshd
        self.states: list[State] = []
        self.addresses: list[tuple[str, int]] = []
        self.tunnel = Tunnel(
            self._connect,
            changed=lambda state, error: self.states.append(state),
            longest_delay_s=0.1,
            **options,
        )
        self.tunnel.start()

    def _connect(self, watcher: Any) -> Connection:
        self.addresses.append(self.sshd.address)
        return connect(self.sshd, watcher=watcher)


def test_the_tunnel_comes_back(own_sshd: LoopbackSshd) -> None:
    threads = set(threading.enumerate())
    kept = Kept(own_sshd, outage_timeout_s=WAIT_S)
    assert kept.tunnel.run("echo 1", timeout_s=WAIT_S).stdout == b"1\n"
    own_sshd.stop()
    wait_for(lambda: State.LOST in kept.states, "the loss was not told")
    wait_for(lambda: kept.tunnel.counters.failures, "it is not tried again")
    # The port may be another one after a restart.
    own_sshd.port = free_port()
    starting = threading.Timer(0.3, own_sshd.start)
    starting.start()
    # During the outage it waits, and then works.
    assert kept.tunnel.run("echo 2", timeout_s=WAIT_S).stdout == b"2\n"
    starting.join()
    assert kept.addresses[0] != kept.addresses[-1]
    assert kept.tunnel.counters.connections == 2
    kept.tunnel.reconnect()
    assert kept.tunnel.run("echo 3", timeout_s=WAIT_S).stdout == b"3\n"
    kept.tunnel.close()
    kept.tunnel.close()
    assert kept.states[:2] == [State.CONNECTING, State.CONNECTED]
    assert kept.states[-1] == State.CLOSED
    wait_for(lambda: set(threading.enumerate()) <= threads, "a thread was left")
    with pytest.raises(TunnelError, match="closed"):
        kept.tunnel.run("true", timeout_s=1)


def test_an_outage_is_bounded(own_sshd: LoopbackSshd) -> None:
    own_sshd.stop()
    kept = Kept(own_sshd, outage_timeout_s=0.3)
    wait_for(lambda: kept.tunnel.counters.failures, "nothing is tried")
    start = time.monotonic()
    with pytest.raises(TunnelError, match=r"there is no connection.*refused"):
        kept.tunnel.open_unix("/nowhere")
    assert 0.2 < time.monotonic() - start < 3
    kept.tunnel.close()


def test_closing_does_not_wait_for_a_handshake(tmp_path: Path) -> None:
    keys = make_keys(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tunnel = Tunnel(
            lambda watcher: Connection.connect(
                silent.getsockname(),
                user_key=keys.user,
                host_public=keys.host.public,
                timeout_s=60,
                watcher=watcher,
            )
        )
        tunnel.start()
        silent.accept()[0].close()  # the first attempt fails, another follows
        peer, _ = silent.accept()
        start = time.monotonic()
        tunnel.close()
        peer.close()
        assert time.monotonic() - start < 3


class Counted:
    """Echoes, and counts the connections that came and ended."""

    def __init__(self) -> None:
        self.came = self.ended = 0
        self.connections: list[socket.socket] = []

    def __call__(self, connection: socket.socket) -> None:
        self.came += 1
        self.connections.append(connection)
        try:
            echo(connection)
        finally:
            self.ended += 1


def echoes(connection: Connection, path: str) -> bool:
    stream = connection.begin_unix(path)
    try:
        stream.sendall(b"hello")
        return stream.recv(5) == b"hello"
    finally:
        stream.close()


def test_a_prepared_stream_is_the_next_one(connection: Connection, tmp_path: Path) -> None:
    server = Counted()
    with unix_server(tmp_path / "s", server) as path:
        connection.prepare_unix(path)
        connection.prepare_unix(path)
        wait_for(lambda: server.came == 1, "the stream is not opened ahead")
        assert echoes(connection, path)
        assert server.came == 1
        assert echoes(connection, path)
        assert server.came == 2
        connection.prepare_unix(path)
        assert echoes(connection, path), "one that is not confirmed yet"
        assert server.came == 3


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 408\r\n\r\n"], ids=["ended", "spoke"])
def test_a_prepared_stream_that_the_server_touched_is_not_used(
    sshd: LoopbackSshd, tmp_path: Path, says: bytes
) -> None:
    server = Counted()
    with (
        unix_server(tmp_path / "s", server) as path,
        contextlib.closing(connect(sshd, keepalive_s=0.2)) as connection,
    ):
        connection.prepare_unix(path)
        wait_for(lambda: server.came == 1, "the stream is not opened ahead")
        channel, _ = connection._transport._spares[path]
        if says:
            server.connections[0].sendall(says)
        else:
            server.connections[0].shutdown(socket.SHUT_RDWR)
        wait_for(lambda: not channel.untouched, "the channel does not know")
        assert echoes(connection, path)
        wait_for(lambda: server.ended == 2, "the touched one is still open")
        wait_for(lambda: not connection._transport._spares, "the touched one is kept")


def test_a_prepared_stream_is_refused_quietly(connection: Connection, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    connection.prepare_unix(path)
    with pytest.raises(TunnelError, match="nothing answers"):
        connection.open_unix(path)
    with unix_server(Path(path), echo):
        assert echoes(connection, path)


def test_a_prepared_stream_that_nobody_takes_is_closed(
    sshd: LoopbackSshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "SPARE_AGE_S", 0.3)
    server = Counted()
    with (
        unix_server(tmp_path / "s", server) as path,
        contextlib.closing(connect(sshd, keepalive_s=0.2)) as connection,
    ):
        connection.prepare_unix(path)
        wait_for(lambda: server.came == 1, "the stream is not opened ahead")
        wait_for(lambda: server.ended == 1, "the stream is kept for ever")
        wait_for(lambda: not connection._transport._channels.values(), "the channel is kept")
        assert echoes(connection, path)


def test_data_does_not_wait_for_the_acknowledgement_of_an_opening(
    connection: Connection, tmp_path: Path
) -> None:
    """sshd sends by Nagle's algorithm, and a system acknowledges after 40 ms."""
    times = []
    with unix_server(tmp_path / "s", echo) as path:
        stream = connection.open_unix(path)
        for _ in range(15):
            start = time.monotonic()
            connection.prepare_unix(path)
            stream.sendall(b"x")
            assert stream.recv(1) == b"x"
            times.append(time.monotonic() - start)
            other = connection.open_unix(path)
            other.close()
        stream.close()
    assert sorted(times)[len(times) // 2] < 0.03


def test_a_tunnel_whose_attempt_does_not_end_is_closed_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tunnel, "_JOIN_S", 0.1)
    begun, end = threading.Event(), threading.Event()

    def connect(watcher: object) -> Connection:
        begun.set()
        end.wait(30)
        raise TunnelError("too late")

    made = Tunnel(connect)
    made.start()
    assert begun.wait(5)
    started = time.monotonic()
    made.close()
    assert time.monotonic() - started < 5
    end.set()
    made._thread.join(5)
