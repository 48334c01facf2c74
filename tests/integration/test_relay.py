"""The relay between a local listener and Unix sockets behind a real sshd."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loopback_sshd import Handler, LoopbackSshd, echo, unix_server
from plain_relay import Relay

from wherry.platform import current
from wherry.tunnel.connection import Connection
from wherry.tunnel.tunnel import State, Tunnel

pytestmark = pytest.mark.skipif(not Path("/usr/sbin/sshd").exists(), reason="needs openssh-server")

WAIT_S = 20.0
MB = 1_000_000


class Chain:
    """Client socket, relay, tunnel, sshd, server socket."""

    def __init__(self, directory: Path, **tunnel_options: Any) -> None:
        self.directory = directory
        self.sshd = LoopbackSshd(directory / "sshd")
        self.lost = threading.Event()
        self.tunnel = Tunnel(
            self._connect, changed=self._changed, longest_delay_s=0.1, **tunnel_options
        )
        self.tunnel.start()
        self._number = 0

    def _connect(self, watcher: Any) -> Connection:
        return Connection.connect(
            self.sshd.address,
            user=self.sshd.user,
            user_key=self.sshd.keys.user,
            host_public=self.sshd.keys.host.public,
            timeout_s=WAIT_S,
            watcher=watcher,
        )

    def _changed(self, state: State, error: object) -> None:
        if state is State.LOST:
            self.lost.set()

    @contextlib.contextmanager
    def serve(self, handler: Handler, **options: Any) -> Iterator[Endpoint]:
        """A server with a handler, and a relay to it."""
        self._number += 1
        local = self.directory / f"l{self._number}"
        with unix_server(self.directory / f"r{self._number}", handler) as remote:
            relay = Relay(
                current().listen_local(local),
                lambda: self.tunnel.begin_unix(remote),
                **options,
            )
            relay.start()
            try:
                yield Endpoint(local, relay)
            finally:
                relay.close()

    def close(self) -> None:
        self.tunnel.close()
        self.sshd.stop()


class Endpoint:
    """Where clients connect."""

    def __init__(self, path: Path, relay: Relay) -> None:
        self.path = path
        self.relay = relay

    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.settimeout(WAIT_S)
        client.connect(str(self.path))
        return client


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    made = Chain(tmp_path_factory.mktemp("chain"))
    yield made
    made.close()


@pytest.fixture
def own_chain(tmp_path: Path) -> Iterator[Chain]:
    made = Chain(tmp_path, outage_timeout_s=WAIT_S)
    yield made
    made.close()


def read_all(client: socket.socket) -> bytes:
    data = bytearray()
    while part := client.recv(1 << 20):
        data += part
    return bytes(data)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


# -- both directions, and their ends ---------------------------------------------------------


def test_echo_and_counters(chain: Chain) -> None:
    with chain.serve(echo) as endpoint:
        with endpoint.connect() as client:
            client.sendall(b"hello")
            assert client.recv(100) == b"hello"
            assert endpoint.relay.counters.active == 1
            client.shutdown(socket.SHUT_WR)
            assert client.recv(100) == b""
        wait_for(lambda: endpoint.relay.counters.active == 0, "the connection did not end")
        counters = endpoint.relay.counters
        assert (counters.connections, counters.bytes_up, counters.bytes_down) == (1, 5, 5)


def test_data_follows_the_clients_half_close(chain: Chain) -> None:
    def handler(server: socket.socket) -> None:
        total = len(read_all(server))
        time.sleep(0.1)
        server.sendall(b"%d" % total + b"." * 3 * MB)

    with chain.serve(handler) as endpoint, endpoint.connect() as client:
        client.sendall(bytes(MB))
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"1000000" + b"." * 3 * MB


def test_data_follows_the_servers_half_close(chain: Chain) -> None:
    got: list[int] = []
    done = threading.Event()

    def handler(server: socket.socket) -> None:
        server.sendall(b"all that I say")
        server.shutdown(socket.SHUT_WR)
        got.append(len(read_all(server)))
        done.set()

    with chain.serve(handler) as endpoint, endpoint.connect() as client:
        assert read_all(client) == b"all that I say"
        time.sleep(0.1)
        client.sendall(bytes(3 * MB))
        client.shutdown(socket.SHUT_WR)
        assert done.wait(WAIT_S)
    assert got == [3 * MB]


def test_a_client_that_went_closes_the_channel(chain: Chain) -> None:
    ended = threading.Event()

    def handler(server: socket.socket) -> None:
        server.recv(1)
        read_all(server)
        ended.set()

    with chain.serve(handler) as endpoint:
        endpoint.connect().close()
        assert ended.wait(WAIT_S)
        wait_for(lambda: endpoint.relay.counters.active == 0, "the connection did not end")


def test_a_client_that_half_closed_and_went_closes_the_channel(chain: Chain) -> None:
    """``docker logs -f`` killed while there is nothing to log."""
    hold = threading.Event()
    try:
        with chain.serve(lambda server: hold.wait(WAIT_S) and None) as endpoint:
            client = endpoint.connect()
            client.shutdown(socket.SHUT_WR)
            wait_for(lambda: endpoint.relay.counters.active == 1, "there is no connection")
            time.sleep(0.1)
            client.close()
            wait_for(lambda: endpoint.relay.counters.active == 0, "the connection did not end")
            hold.set()
    finally:
        hold.set()


def test_a_client_that_went_while_data_came_ends_the_server(chain: Chain) -> None:
    failed = threading.Event()

    def handler(server: socket.socket) -> None:
        try:
            while True:
                server.sendall(bytes(100_000))
        except OSError:
            failed.set()

    with chain.serve(handler) as endpoint:
        client = endpoint.connect()
        client.recv(1)
        client.close()
        assert failed.wait(WAIT_S)
        wait_for(lambda: endpoint.relay.counters.active == 0, "the connection did not end")


def test_a_client_that_went_while_its_data_is_stuck(chain: Chain) -> None:
    """The thread that would notice its end waits for the server's window."""
    gone = threading.Event()
    failed = threading.Event()

    def handler(server: socket.socket) -> None:
        gone.wait(WAIT_S)
        server.sendall(b"x")
        time.sleep(0.1)
        # It never reads; that the channel was closed shows in what it sends.
        try:
            while True:
                server.sendall(bytes(100_000))
        except OSError:
            failed.set()

    with chain.serve(handler) as endpoint:
        client = endpoint.connect()
        client.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            client.sendall(bytes(50 * MB))
        client.close()
        gone.set()
        assert failed.wait(WAIT_S)
        wait_for(lambda: endpoint.relay.counters.active == 0, "the connection did not end")


def test_connections_that_end_from_all_sides_at_once_harm_no_other(chain: Chain) -> None:
    """One message too many for a channel that is closed would end the whole connection."""
    chain.tunnel.wait(WAIT_S)
    before = chain.tunnel.counters.connections

    def handler(server: socket.socket) -> None:
        while data := server.recv(1 << 16):
            server.sendall(data * 3)

    for _ in range(8):
        with chain.serve(handler) as endpoint:
            clients = [endpoint.connect() for _ in range(20)]
            for client in clients:
                client.sendall(bytes(1000))
            for client in clients[:15]:  # answers are on their way; five are cut by close()
                client.close()
        for client in clients:
            client.close()
    assert chain.tunnel.run("echo well", timeout_s=WAIT_S).stdout == b"well\n"
    assert chain.tunnel.counters.connections == before


def test_a_server_that_went_ends_a_client_that_sends(chain: Chain) -> None:
    def send_for_ever(client: socket.socket) -> None:
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            client.sendall(bytes(100_000))

    with (
        chain.serve(lambda server: server.recv(1) and None) as endpoint,
        endpoint.connect() as client,
        pytest.raises(OSError, match=r"pipe|reset"),
    ):
        send_for_ever(client)


def test_no_server_closes_the_client(chain: Chain) -> None:
    relay = Relay(
        current().listen_local(chain.directory / "none"),
        lambda: chain.tunnel.begin_unix("/nowhere/at/all"),
    )
    relay.start()
    with Endpoint(chain.directory / "none", relay).connect() as client:
        assert client.recv(1) == b""
    relay.close()


# -- much data ---------------------------------------------------------------------------------


def test_100_mb_each_way_arrive_unchanged(chain: Chain) -> None:
    block = random.Random(1).randbytes(1_000_003)
    expected = hashlib.sha256(block * 100).digest()
    digests: list[bytes] = []

    def digest(end: socket.socket) -> bytes:
        sum_ = hashlib.sha256()
        while part := end.recv(1 << 18):
            sum_.update(part)
        return sum_.digest()

    def send(end: socket.socket) -> None:
        for _ in range(100):
            end.sendall(block)
        end.shutdown(socket.SHUT_WR)

    def handler(server: socket.socket) -> None:
        sender = threading.Thread(target=send, args=(server,))
        sender.start()
        digests.append(digest(server))
        sender.join()

    with chain.serve(handler) as endpoint, endpoint.connect() as client:
        sender = threading.Thread(target=send, args=(client,))
        sender.start()
        assert digest(client) == expected
        sender.join()
        wait_for(lambda: bool(digests), "the server did not get all")
        assert digests == [expected]
        wait_for(lambda: endpoint.relay.counters.active == 0, "the connection did not end")
        assert endpoint.relay.counters.bytes_up == 100 * len(block)
        assert endpoint.relay.counters.bytes_down == 100 * len(block)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.integers(1, 200_000), min_size=1, max_size=12),
    st.lists(st.integers(1, 300_000), min_size=1, max_size=5),
)
def test_chunks_of_any_size_are_echoed(chain: Chain, sends: list[int], reads: list[int]) -> None:
    data = [os.urandom(size) for size in sends]
    with chain.serve(echo) as endpoint, endpoint.connect() as client:

        def send() -> None:
            for part in data:
                client.sendall(part)
            client.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        got = bytearray()
        turn = 0
        while part := client.recv(reads[turn % len(reads)]):
            got += part
            turn += 1
        sender.join()
        assert got == b"".join(data)


def test_200_connections_at_once(chain: Chain) -> None:
    with chain.serve(echo) as endpoint, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(endpoint.connect()) for _ in range(200)]
        for number, client in enumerate(clients):
            client.sendall(b"%d" % number)
        for number, client in enumerate(clients):
            assert client.recv(100) == b"%d" % number
        assert endpoint.relay.counters.active == 200


def test_the_limit(chain: Chain) -> None:
    told: list[int] = []
    with chain.serve(echo, limit=2, on_limit=lambda: told.append(1)) as endpoint:
        with endpoint.connect() as one, endpoint.connect() as two:
            for client in (one, two):
                client.sendall(b"x")
                assert client.recv(1) == b"x"
            with endpoint.connect() as three:
                assert three.recv(1) == b""
        assert told == [1]
        assert endpoint.relay.counters.refused == 1
        wait_for(lambda: endpoint.relay.counters.active == 0, "the connections did not end")
        with endpoint.connect() as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"


# -- backpressure ------------------------------------------------------------------------------


def test_a_slow_reader_bounds_what_is_held(chain: Chain) -> None:
    """Neither side's data piles up in our process when the other side does not read."""
    sent = [0]
    go = threading.Event()

    def handler(server: socket.socket) -> None:
        server.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            while sent[0] < 200 * MB:
                sent[0] += server.send(bytes(MB))
        go.wait(WAIT_S)

    process = psutil.Process()
    with chain.serve(handler) as endpoint, endpoint.connect() as client:
        before = process.memory_info().rss
        wait_for(lambda: sent[0] > 0, "nothing was sent")
        client.setblocking(False)
        up = 0
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline and up < 200 * MB:
            try:
                up += client.send(bytes(MB))
            except BlockingIOError:
                time.sleep(0.01)
        # Two windows, and what the kernel's buffers on the way hold.
        assert up < 32 * MB
        assert sent[0] < 32 * MB
        assert process.memory_info().rss - before < 32 * MB
        go.set()


def test_a_stalled_client_does_not_stop_others(chain: Chain) -> None:
    def handler(server: socket.socket) -> None:
        if server.recv(1) == b"e":
            server.sendall(b"e")
            echo(server)
        else:
            for _ in range(50):
                server.sendall(bytes(MB))

    with chain.serve(handler) as endpoint, contextlib.ExitStack() as stack:
        stalled = [stack.enter_context(endpoint.connect()) for _ in range(3)]
        for client in stalled:
            client.sendall(b"d")  # asks for 50 MB and reads none of it
        time.sleep(0.3)
        start = time.monotonic()
        with endpoint.connect() as client:
            client.sendall(b"e")
            for _ in range(100):
                assert client.recv(1) == b"e"
                client.sendall(b"e")
        assert time.monotonic() - start < 3
        for client in stalled:  # it is all there when they want it
            client.sendall(b"x")
            client.shutdown(socket.SHUT_WR)
            assert sum(map(len, iter(lambda c=client: c.recv(1 << 20), b""))) == 50 * MB


# -- the tunnel's end, and ours -----------------------------------------------------------------


def test_the_listener_outlives_the_server(own_chain: Chain) -> None:
    with own_chain.serve(echo) as endpoint:
        with endpoint.connect() as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            own_chain.sshd.stop()
            with contextlib.suppress(ConnectionError):
                assert client.recv(1) == b""
        assert own_chain.lost.wait(WAIT_S)
        starting = threading.Timer(0.3, own_chain.sshd.start)
        starting.start()
        with endpoint.connect() as client:  # waits for the tunnel to come back
            client.sendall(b"y")
            assert client.recv(1) == b"y"
        starting.join()


def test_close_leaves_no_thread(chain: Chain) -> None:
    chain.tunnel.wait(WAIT_S)
    before = set(threading.enumerate())
    hold = threading.Event()

    def handler(server: socket.socket) -> None:
        if server.recv(1) == b"d":
            with contextlib.suppress(OSError):
                server.sendall(bytes(50 * MB))
        else:
            hold.wait(WAIT_S)

    with chain.serve(handler) as endpoint, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(endpoint.connect()) for _ in range(12)]
        for number, client in enumerate(clients):
            # Some idle, some with a stalled reader, some that send to a stalled server.
            client.sendall((b"d", b"i", b"u")[number % 3])
        for client in clients[2::3]:
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                for _ in range(40):
                    client.send(bytes(MB))
                    time.sleep(0.005)
        time.sleep(0.2)
        start = time.monotonic()
        endpoint.relay.close()
        endpoint.relay.close()
        assert time.monotonic() - start < 3
        hold.set()
    left = [t for t in threading.enumerate() if t not in before and not t.name.startswith("stub")]
    assert not left
    assert not endpoint.path.exists()
