"""The host's listeners of published ports, on the loopback; QEMU is played by sockets."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from fake_monitor import Monitor
from loopback import answering, free_port
from sandbox import wait_until

from wherry.core.errors import TunnelError, WherryError
from wherry.platform import current
from wherry.ports.choices import Choices
from wherry.ports.conflicts import explain, find_holder, in_use, try_bind
from wherry.ports.datagrams import DatagramRelay
from wherry.ports.desired import Choice, Forward, Owner
from wherry.ports.guest_datagrams import GuestDatagramRelay
from wherry.ports.keeper import PortKeeper, PortTaken
from wherry.ports.qemu import QemuForwards
from wherry.ports.streams import StreamRelays, to_local

WEB = Owner("abc", "web", 80)


class Kept:
    """A keeper and what it was asked to prepare."""

    def __init__(self) -> None:
        self.monitor = Monitor()
        self.prepared: list[str] = []

        async def prepare(address: str) -> None:
            self.prepared.append(address)

        def open_guest(address: str, port: int) -> Any:
            raise TunnelError("there is no guest")

        self.keeper = PortKeeper(
            QemuForwards(lambda line: self.monitor.human(line), "net0"),
            current(),
            {},
            open_guest=open_guest,
            open_datagrams=lambda: open_guest("", 0),
            prepare=prepare,
        )

    async def forwards(self) -> list[Forward]:
        """Return what QEMU forwards."""
        return self.monitor.forwards()

    async def __aenter__(self) -> Kept:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.keeper.close()
        self.monitor.close()


def in_a_loop(body: Any) -> None:
    async def run() -> None:
        async with Kept() as kept:
            await body(kept)

    asyncio.run(run())


def both(port: int, owner: Owner = WEB) -> dict[Forward, Owner]:
    return {Forward("tcp", "0.0.0.0", port): owner, Forward("tcp", "::", port): owner}


def test_a_reservation_becomes_a_forward_and_goes_with_its_container() -> None:
    async def body(kept: Kept) -> None:
        port, keeper = free_port(), kept.keeper
        await keeper.reserve("start", both(port))
        assert try_bind(Forward("tcp", "127.0.0.1", port)) is not None
        assert try_bind(Forward("tcp", "::1", port)) is not None
        await keeper.update(both(port))
        await keeper.release("start")
        assert [each.kind for each in keeper.published()] == ["hostfwd", "relay"]
        assert kept.monitor.lines == [f"hostfwd_add net0 tcp:0.0.0.0:{port}-:{port}"]
        await keeper.update({})
        assert try_bind(Forward("tcp", "0.0.0.0", port)) is None
        assert try_bind(Forward("tcp", "::", port)) is None
        assert not keeper.busy

    in_a_loop(body)


def test_a_start_that_failed_leaves_nothing() -> None:
    async def body(kept: Kept) -> None:
        port = free_port()
        await kept.keeper.reserve("start", both(port))
        await kept.keeper.release("start")
        assert try_bind(Forward("tcp", "0.0.0.0", port)) is None
        assert try_bind(Forward("tcp", "::", port)) is None

    in_a_loop(body)


def test_all_ports_of_a_start_or_none() -> None:
    async def body(kept: Kept) -> None:
        free = free_port()
        with socket.create_server(("0.0.0.0", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(PortTaken, match=f"0.0.0.0:{port}/tcp: address already in use by"):
                await kept.keeper.reserve("start", {**both(free), **both(port)})
        assert kept.keeper.published() == []
        assert kept.monitor.sockets == {}
        assert try_bind(Forward("tcp", "::", free)) is None

    in_a_loop(body)


def test_a_port_of_another_container_is_left_to_the_engine() -> None:
    async def body(kept: Kept) -> None:
        port = free_port()
        await kept.keeper.update(both(port))
        overlapping = {Forward("tcp", "127.0.0.1", port): Owner("xyz", "other", 80)}
        await kept.keeper.reserve("start", overlapping)
        await kept.keeper.release("start")
        assert [each.owner for each in kept.keeper.published()] == [WEB, WEB]
        assert len(kept.monitor.sockets) == 1

    in_a_loop(body)


def test_a_forward_that_died_is_made_again() -> None:
    async def body(kept: Kept) -> None:
        port = free_port()
        await kept.keeper.update(both(port))
        kept.monitor.sockets.pop(f"tcp:0.0.0.0:{port}").close()
        await kept.keeper.verify(kept.forwards)
        assert kept.monitor.forwards() == [Forward("tcp", "0.0.0.0", port)]

    in_a_loop(body)


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("beside_ipv4", [False, True])
def test_a_relay_that_died_is_made_again(
    monkeypatch: pytest.MonkeyPatch, protocol: str, beside_ipv4: bool
) -> None:
    """Of an error of ours, which is logged."""
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM

    async def body(kept: Kept) -> None:
        port = free_port(kind)
        addresses = ("0.0.0.0", "::") if beside_ipv4 else ("::",)
        wanted = {Forward(protocol, each, port): WEB for each in addresses}
        await kept.keeper.update(wanted)
        await kept.keeper.verify(kept.forwards)
        live = None
        if protocol == "tcp" and beside_ipv4:
            listener = kept.monitor.sockets[f"tcp:0.0.0.0:{port}"]

            def accepted() -> socket.socket:
                listener.settimeout(10)
                return listener.accept()[0]

            live = socket.create_connection(("::1", port), 10)
            served = await asyncio.to_thread(accepted)
            live.sendall(b"before")
            assert await asyncio.to_thread(served.recv, 10) == b"before"

        def threads() -> list[str]:
            names = ("ports-accept", f"port-{port}")
            return [each.name for each in threading.enumerate() if each.name in names]

        def fail(*_: object) -> None:
            raise RuntimeError("made for this test")

        with monkeypatch.context() as patch:
            for owner, name in (
                (StreamRelays, "_accept"),
                (DatagramRelay, "_from_client"),
                (GuestDatagramRelay, "_from_client"),
            ):
                patch.setattr(owner, name, fail)
            before = len(threads())
            with socket.socket(socket.AF_INET6, kind) as client:
                client.connect(("::1", port))
                with contextlib.suppress(OSError):
                    client.send(b"x")
                await asyncio.to_thread(
                    wait_until, lambda: len(threads()) < before, 10, "it has died"
                )
        if protocol == "tcp":
            # One that is added meanwhile is served as well.
            late = {Forward("tcp", "::", free_port()): WEB}
            await kept.keeper.update(wanted | late)
        await kept.keeper.verify(kept.forwards)
        assert len(threads()) == before
        if live is not None:
            live.sendall(b"after")
            assert await asyncio.to_thread(served.recv, 10) == b"after"
            new = socket.create_connection(("::1", port), 10)
            serves = await asyncio.to_thread(accepted)
            new.sendall(b"new")
            assert await asyncio.to_thread(serves.recv, 10) == b"new"
            for each in (live, served, new, serves):
                each.close()
        assert try_bind(Forward(protocol, "::", port)) is not None
        assert all(each.kind and not each.problem for each in kept.keeper.published())
        await kept.keeper.update({})
        assert try_bind(Forward(protocol, "::", port)) is None

    in_a_loop(body)


def test_the_relay_leads_to_nothing_of_the_host_s_own() -> None:
    """A port on IPv6 whose IPv4 somebody else has would be a way to that one."""

    async def body(kept: Kept) -> None:
        port = free_port()
        with socket.create_server(("127.0.0.1", port)):
            await kept.keeper.update(both(port))
            first, second = kept.keeper.published()
            assert "address already in use" in first.problem
            assert second.problem == first.problem
            assert try_bind(Forward("tcp", "::", port)) is None
        await kept.keeper.update(both(port))
        assert [each.kind for each in kept.keeper.published()] == ["hostfwd", "relay"]
        # Later QEMU loses its own, and somebody takes the port before we see it.
        kept.monitor.sockets.pop(f"tcp:0.0.0.0:{port}").close()
        with socket.create_server(("127.0.0.1", port)):
            await kept.keeper.verify(kept.forwards)
            assert [each.kind for each in kept.keeper.published()] == ["", ""]
            assert try_bind(Forward("tcp", "::", port)) is None
        await kept.keeper.verify(kept.forwards)
        assert [each.kind for each in kept.keeper.published()] == ["hostfwd", "relay"]

    in_a_loop(body)


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_forward_of_which_qemu_s_answer_was_lost_is_removed(cancelled: bool) -> None:
    async def body(kept: Kept) -> None:
        port, human = free_port(), kept.monitor.human

        async def lost(line: str) -> str:
            await human(line)
            if cancelled:
                raise asyncio.CancelledError
            raise WherryError("QEMU did not answer in time")

        kept.monitor.human = lost  # type: ignore[method-assign]
        with pytest.raises(asyncio.CancelledError if cancelled else PortTaken):
            await kept.keeper.reserve("start", both(port))
        kept.monitor.human = human  # type: ignore[method-assign]
        await kept.keeper.release("start")
        await kept.keeper.verify(kept.forwards)
        assert kept.monitor.forwards() == []
        await kept.keeper.reserve("start again", both(port))
        assert [each.kind for each in kept.keeper.published()] == ["hostfwd", "relay"]

    in_a_loop(body)


def test_what_a_container_listens_on_in_the_host_s_network_is_no_fault_of_its_start() -> None:
    async def body(kept: Kept) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            owner = Owner("abc", "web", port, host_network=True)
            await kept.keeper.update_listening({Forward("tcp", "127.0.0.1", port): owner})
            assert "address already in use" in kept.keeper.published()[0].problem
            assert kept.keeper.problems_of("abc") == []

    in_a_loop(body)


def test_a_port_that_could_not_be_bound_is_tried_again() -> None:
    async def body(kept: Kept) -> None:
        port = free_port()
        with socket.create_server(("127.0.0.1", port)):
            await kept.keeper.update({Forward("tcp", "127.0.0.1", port): WEB})
            (found,) = kept.keeper.published()
            assert "address already in use" in found.problem
            assert kept.keeper.problems_of("abc") == [found.problem]
        await kept.keeper.update({Forward("tcp", "127.0.0.1", port): WEB})
        assert kept.keeper.problems_of("abc") == []
        assert kept.monitor.lines[-1] == f"hostfwd_add net0 tcp:127.0.0.1:{port}-127.0.0.1:{port}"

    in_a_loop(body)


def test_only_addresses_that_the_guest_does_not_have_are_prepared() -> None:
    async def body(kept: Kept) -> None:
        port = free_port()
        await kept.keeper.update({Forward("tcp", "127.0.0.2", port): WEB})
        await kept.keeper.update({Forward("tcp", "192.0.2.7", port): WEB})
        assert kept.prepared == ["192.0.2.7"]
        (problem,) = kept.keeper.problems_of("abc")
        assert "cannot assign requested address: this computer has no address" in problem

    in_a_loop(body)


# -- why a port cannot be bound ----------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("address", ["0.0.0.0", "127.0.0.1"])
def test_who_holds_a_port(protocol: str, address: str) -> None:
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as taken:
        taken.bind(("127.0.0.1", 0))
        if protocol == "tcp":
            taken.listen()
        holder = find_holder(Forward(protocol, address, taken.getsockname()[1]))
    assert holder.endswith(f"(process {os.getpid()})")


def test_a_holder_elsewhere_is_not_blamed() -> None:
    with socket.create_server(("127.0.0.2", 0)) as taken:
        assert find_holder(Forward("tcp", "127.0.0.1", taken.getsockname()[1])) == ""


@pytest.mark.parametrize("ipv6_first", [False, True])
def test_of_two_families_the_one_asked_for_is_blamed(
    ipv6_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A port that is published on all addresses is bound for IPv4 before IPv6 fails."""
    port = free_port()
    with socket.create_server(("::", port), family=socket.AF_INET6):
        listens = (
            "import socket, sys\n"
            f"with socket.create_server(('0.0.0.0', {port})): print(); sys.stdin.read()\n"
        )
        ipv4 = [sys.executable, "-c", listens]
        with subprocess.Popen(ipv4, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout is not None
            assert other.stdin is not None
            other.stdout.readline()
            listeners = sorted(
                psutil.net_connections("tcp"),
                key=lambda each: each.family == socket.AF_INET6,
                reverse=ipv6_first,
            )
            monkeypatch.setattr(psutil, "net_connections", lambda kind: listeners)
            assert find_holder(Forward("tcp", "::", port)).endswith(f"{os.getpid()})")
            assert find_holder(Forward("tcp", "0.0.0.0", port)).endswith(f"{other.pid})")
            other.stdin.close()


@pytest.mark.skipif(
    os.geteuid() != 0 or sys.platform != "linux", reason="needs Linux, and a user to become"
)
def test_a_low_port_comes_with_the_remedy() -> None:
    """Bound by a user without rights, for real."""
    code = (
        "import os\n"
        "from wherry.ports.conflicts import explain, try_bind\n"
        "from wherry.ports.desired import Forward\n"
        "from wherry.platform import current\n"
        "platform = current()\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "low = Forward('tcp', '0.0.0.0', 80)\n"
        "print(explain(low, try_bind(low), platform))\n"
    )
    # A network of its own has the kernel's default for low ports.
    inside = ["unshare", "--net", sys.executable, "-c", code]
    done = subprocess.run(inside, capture_output=True, text=True, timeout=30, check=True)
    assert "failed to bind host port 0.0.0.0:80/tcp: permission denied" in done.stdout
    assert "sudo sysctl net.ipv4.ip_unprivileged_port_start=80" in done.stdout


def test_other_errors_are_the_system_s_words() -> None:
    said = explain(Forward("tcp", "::1", 80), OSError(errno.EMFILE, "Too many files"), current())
    assert said == "failed to bind host port [::1]:80/tcp: Too many files"


# -- what the engine may choose ----------------------------------------------------------------


def test_listeners_connections_and_datagrams_are_in_use() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as connection,
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as datagrams,
    ):
        datagrams.bind(("::1", 0))
        expected = {
            ("tcp", server.getsockname()[1]),
            ("tcp", connection.getsockname()[1]),
            ("udp", datagrams.getsockname()[1]),
        }
        assert expected <= in_use()


def test_starts_that_choose_hold_what_is_in_use_until_they_are_over() -> None:
    async def body() -> None:
        holds: list[set[tuple[str, int]]] = []
        choices = Choices(holds.append)
        with (
            socket.create_server(("127.0.0.1", 0)) as one,
            socket.create_server(("127.0.0.1", 0)) as two,
            socket.create_server(("127.0.0.1", 0)) as ours,
        ):
            first, second, given = [each.getsockname()[1] for each in (one, two, ours)]
            mine = [Forward("tcp", "127.0.0.1", given)]
            await choices.narrow("a", {Choice("tcp", first, first)}, mine)
            await choices.narrow(
                "b", {Choice("tcp", second, second), Choice("tcp", given, given)}, mine
            )
            await choices.narrow("c", {Choice("udp", first, first)}, mine)
            for token in ("a", "c", "b", "b"):
                await choices.release(token)
        both = {("tcp", first), ("tcp", second)}
        assert holds == [{("tcp", first)}, both, both, {("tcp", second)}, set()]

    asyncio.run(body())


# -- TCP on IPv6 -------------------------------------------------------------------------------


class Echo:
    """Sends back what it gets, and ends when the client's direction does."""

    def __init__(self) -> None:
        self.server = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            threading.Thread(target=self._one, args=[connection], daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(65536):
                connection.sendall(data)
            connection.sendall(b"end")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()


@pytest.fixture
def server() -> Iterator[Echo]:
    made = Echo()
    yield made
    made.close()


@pytest.fixture
def relays() -> Iterator[StreamRelays]:
    made = StreamRelays()
    yield made
    made.close()
    left = [each.name for each in threading.enumerate() if each.name.startswith("port")]
    assert not left


def connect(port: int) -> socket.socket:
    return socket.create_connection(("::1", port), timeout=10)


def read_all(connection: socket.socket) -> bytes:
    found = b""
    while data := connection.recv(65536):
        found += data
    return found


def test_bytes_and_ends_pass_in_both_directions(server: Echo, relays: StreamRelays) -> None:
    port = free_port()
    relays.add(Forward("tcp", "::1", port), to_local(server.port), pushes=False)
    data = os.urandom(1 << 20)
    with connect(port) as client:
        sender = threading.Thread(
            target=lambda: (client.sendall(data), client.shutdown(socket.SHUT_WR))
        )
        sender.start()
        assert read_all(client) == data + b"end"
        sender.join()


def test_a_removed_port_is_free_and_its_connections_live_on(
    server: Echo, relays: StreamRelays
) -> None:
    forward = Forward("tcp", "::1", free_port())
    relays.add(forward, to_local(server.port), pushes=False)
    with connect(forward.port) as client:
        client.sendall(b"a")
        assert client.recv(1) == b"a"
        relays.remove(forward)
        assert try_bind(forward) is None
        client.sendall(b"b")
        assert client.recv(1) == b"b"


def test_a_client_is_turned_away_when_nobody_answers(relays: StreamRelays) -> None:
    forward = Forward("tcp", "::1", free_port())
    relays.add(forward, to_local(free_port()), pushes=False)
    with connect(forward.port) as client:
        assert client.recv(1) == b""


def test_many_connections_one_after_the_other_and_at_once(
    server: Echo, relays: StreamRelays
) -> None:
    port = free_port()
    relays.add(Forward("tcp", "::1", port), to_local(server.port), pushes=False)
    for _ in range(3):
        clients = [connect(port) for _ in range(100)]
        for client in clients:
            client.sendall(b"x")
        for client in clients:
            assert client.recv(1) == b"x"
            client.close()


def test_a_client_that_never_reads_stalls_nobody_else(server: Echo, relays: StreamRelays) -> None:
    port = free_port()
    relays.add(Forward("tcp", "::1", port), to_local(server.port), pushes=False)
    with connect(port) as deaf:
        deaf.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            while True:
                deaf.sendall(bytes(1 << 20))
        with connect(port) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"


def test_two_listeners_on_one_port_are_refused(server: Echo, relays: StreamRelays) -> None:
    forward = Forward("tcp", "::1", free_port())
    relays.add(forward, to_local(server.port), pushes=False)
    with pytest.raises(OSError) as caught:
        StreamRelays.add(relays, forward, to_local(server.port), pushes=False)
    assert caught.value.errno == errno.EADDRINUSE


# -- other programs' listeners -------------------------------------------------------------------

LISTENER = """
import socket, sys
made = socket.socket()
made.bind(("127.0.0.1", 0))
made.listen(1)
print(made.getsockname()[1], flush=True)
sys.stdin.read()
"""


def waiting_clients(port: int) -> int:
    """Return how many of 50 clients are connected at once, though none is accepted."""
    clients = []
    for _ in range(50):
        client = socket.socket()
        client.setblocking(False)
        client.connect_ex(("127.0.0.1", port))
        clients.append(client)
    time.sleep(0.1)
    connected = 0
    for client in clients:
        with contextlib.suppress(OSError):
            client.getpeername()
            connected += 1
        client.close()
    return connected


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process do that")
def test_more_clients_wait_at_a_listener_of_another_process() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LISTENER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        assert waiting_clients(port) <= 3
        time.sleep(0.1)
        current().lengthen_queue(process.pid, "127.0.0.1", port + 1)  # is not there
        current().lengthen_queue(process.pid, "127.0.0.1", port)
        assert waiting_clients(port) >= 45
        process.communicate(timeout=10)
    with pytest.raises(OSError):
        current().lengthen_queue(process.pid, "127.0.0.1", port)


def test_what_qemu_listens_for_is_told_of_and_what_it_refuses_is_not() -> None:
    async def body() -> None:
        monitor, told = Monitor(), list[Forward]()

        async def listening(forward: Forward) -> None:
            told.append(forward)

        forwards = QemuForwards(monitor.human, "net0", listening)
        port = free_port()
        tcp, udp = Forward("tcp", "127.0.0.1", port), Forward("udp", "127.0.0.1", port)
        assert not await forwards.add(tcp, "")
        assert not await forwards.add(udp, "")
        assert await forwards.add(tcp, "")
        assert told == [tcp]
        monitor.close()

    asyncio.run(body())


# -- UDP on IPv6 -------------------------------------------------------------------------------


@pytest.fixture
def udp_server() -> Iterator[int]:
    with answering("127.0.0.1") as port:
        yield port


def udp_client(port: int) -> socket.socket:
    made = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    made.settimeout(5)
    made.connect(("::1", port))
    return made


def test_answers_find_their_clients(udp_server: int) -> None:
    forward = Forward("udp", "::1", free_port(socket.SOCK_DGRAM))
    relay = DatagramRelay(forward, ("127.0.0.1", udp_server))
    relay.start()
    try:
        with udp_client(forward.port) as one, udp_client(forward.port) as two:
            for round in range(50):
                one.send(b"one%d" % round)
                two.send(b"two%d" % round)
                assert one.recv(100) == b"one%d!" % round
                assert two.recv(100) == b"two%d!" % round
    finally:
        relay.close()
    assert try_bind(forward) is None


def test_more_clients_than_are_remembered(udp_server: int, monkeypatch: Any) -> None:
    monkeypatch.setattr("wherry.ports.datagrams._CLIENTS", 4)
    forward = Forward("udp", "::1", free_port(socket.SOCK_DGRAM))
    relay = DatagramRelay(forward, ("127.0.0.1", udp_server))
    relay.start()
    try:
        clients = [udp_client(forward.port) for _ in range(10)]
        for _ in range(2):
            for client in clients:
                client.send(b"x")
                assert client.recv(10) == b"x!"
                time.sleep(0.001)
        assert len(relay._clients) == 4
        for client in clients:
            client.close()
    finally:
        relay.close()
