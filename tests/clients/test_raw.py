"""A client of our own making: what an old client does, and more at once than any other here."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import random
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from docker_clients import Clients, wait_for
from stub_engine import Client

from wherry.api.http import HEAD_LIMIT_BYTES

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

ANSWER_S = 60.0
"""For one answer of a guest that is emulated on a busy computer."""

OUTPUTS = {1: "stdout", 2: "stderr"}


class Raw:
    """Sends requests by hand, of one version of the API.

    :param version: such as ``/v1.24``; empty for the engine's newest.
    """

    def __init__(self, clients: Clients, version: str = "") -> None:
        self._path = Path(clients.socket)
        self._version = version

    def connect(self) -> Client:
        return Client(self._path, timeout_s=ANSWER_S)

    def ask(self, method: str, target: str, body: object = None) -> tuple[int, bytes]:
        """Send one request on a connection of its own, and return the answer."""
        with self.connect() as client:
            self.send(client, method, target, body)
            status, _, content = client.answer(method=method)
            return status, content

    def send(self, client: Client, method: str, target: str, body: object = None) -> None:
        client.request(
            method, self._version + target, "Content-Type: application/json",
            body=None if body is None else json.dumps(body).encode(),
        )  # fmt: skip

    @contextlib.contextmanager
    def hijacked(self, target: str, body: object = None) -> Iterator[Client]:
        """Take a connection over without asking for an upgrade: the answer is a 200."""
        with self.connect() as client:
            self.send(client, "POST", target, body)
            head = client.until(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 OK\r\n"), head
            assert b"content-length" not in head.lower()
            assert b"transfer-encoding" not in head.lower()
            yield client

    def create(self, script: str) -> str:
        """Make a container that reads its input until it ends."""
        status, content = self.ask(
            "POST",
            "/containers/create",
            {
                "Image": "busybox",
                "Cmd": ["sh", "-c", script],
                "OpenStdin": True,
                "StdinOnce": True,
                "AttachStdin": True,
            },
        )
        assert status == 201, content
        identity: str = json.loads(content)["Id"]
        return identity


def frame(client: Client) -> tuple[str, bytes]:
    """Read one frame of two outputs in one stream (Engine API, ContainerAttach)."""
    output, size = struct.unpack(">BxxxI", client.take(8))
    return OUTPUTS[output], client.take(size)


def frames(client: Client) -> dict[str, bytes]:
    """Read frames until the stream ends."""
    found = {"stdout": b"", "stderr": b""}
    while client.buffer or client.more():
        output, data = frame(client)
        found[output] += data
    return found


@pytest.fixture(params=["/v1.24", ""])
def raw(request: pytest.FixtureRequest, clients: Clients) -> Raw:
    return Raw(clients, request.param)


def test_the_oldest_version_is_the_engine_s(clients: Clients) -> None:
    status, content = Raw(clients).ask("GET", "/version")
    assert status == 200
    assert json.loads(content)["MinAPIVersion"] == "1.24"
    status, content = Raw(clients, "/v1.23").ask("GET", "/info")
    assert (status, b"1.24" in content) == (400, True)


ECHO = "cat; echo after; echo beside >&2"


def converse(client: Client) -> None:
    """Talk to a program that runs :data:`ECHO` until both directions have ended."""
    client.send(b"first\n")
    assert frame(client) == ("stdout", b"first\n")
    client.send(b"second\n")
    client.sock.shutdown(socket.SHUT_WR)
    assert frames(client) == {"stdout": b"second\nafter\n", "stderr": b"beside\n"}


def test_attach_without_an_upgrade(raw: Raw) -> None:
    """What comes after the client has ended its input arrives, and then the stream ends."""
    box = raw.create(ECHO)
    with raw.hijacked(f"/containers/{box}/attach?stream=1&stdin=1&stdout=1&stderr=1") as client:
        assert raw.ask("POST", f"/containers/{box}/start")[0] == 204
        converse(client)
    assert json.loads(raw.ask("POST", f"/containers/{box}/wait")[1])["StatusCode"] == 0


def test_exec_without_an_upgrade(clients: Clients, raw: Raw) -> None:
    clients.docker("run", "-d", "--name", "box", "busybox", "sleep", "100000")
    kinds = {f"Attach{each}": True for each in ("Stdin", "Stdout", "Stderr")}
    status, content = raw.ask(
        "POST", "/containers/box/exec", {**kinds, "Cmd": ["sh", "-c", ECHO + "; exit 7"]}
    )
    assert status == 201, content
    identity = json.loads(content)["Id"]
    with raw.hijacked(f"/exec/{identity}/start", {"Detach": False, "Tty": False}) as client:
        converse(client)
    assert json.loads(raw.ask("GET", f"/exec/{identity}/json")[1])["ExitCode"] == 7


def test_input_arrives_after_the_program_has_ended_its_output(clients: Clients, raw: Raw) -> None:
    box = raw.create("echo said; exec >/got 2>&1; cat; echo end; exec sleep 100000")
    with raw.hijacked(f"/containers/{box}/attach?stream=1&stdin=1&stdout=1&stderr=1") as client:
        assert raw.ask("POST", f"/containers/{box}/start")[0] == 204
        assert frame(client) == ("stdout", b"said\n")
        client.send(b"late\n")
        client.sock.shutdown(socket.SHUT_WR)
        wait_for(
            lambda: clients.docker("exec", box, "cat", "/got").stdout == b"late\nend\n",
            "the input has arrived",
        )


BINARY, CLOSE = 2, 8
"""Kinds of a websocket's frames (RFC 6455 §5.2)."""

KEY = base64.b64encode(bytes(range(16)))
ACCEPT = base64.b64encode(
    hashlib.sha1(KEY + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11", usedforsecurity=False).digest()
)
"""What the engine makes of the key (RFC 6455 §1.3)."""


def websocket_frame(kind: int, data: bytes, mask: bytes) -> bytes:
    """A frame of a client's, which masks what it says."""
    if len(data) < 126:
        length = bytes([0x80 | len(data)])
    elif len(data) < 1 << 16:
        length = struct.pack(">BH", 0x80 | 126, len(data))
    else:
        length = struct.pack(">BQ", 0x80 | 127, len(data))
    masked = bytes(a ^ b for a, b in zip(data, itertools.cycle(mask), strict=False))
    return bytes([0x80 | kind]) + length + mask + masked


def websocket_frames(client: Client) -> Iterator[tuple[int, bytes]]:
    """Read the engine's frames until the stream ends."""
    while client.buffer or client.more():
        kind, size = client.take(2)
        if size >= 126:
            size = int.from_bytes(client.take(2 if size == 126 else 8), "big")
        yield kind & 0x0F, client.take(size)


@pytest.mark.parametrize("ending", ["a close frame", "a half-close", "the container"])
def test_attach_over_a_websocket(clients: Clients, ending: str) -> None:
    """Any bytes both ways, in frames that are cut anywhere, until one side ends."""
    raw, dice = Raw(clients), random.Random(ending)
    said = dice.randbytes(300_000)
    box = raw.create(
        (f"head -c {len(said)}" if ending == "the container" else "cat") + "; echo end"
    )
    assert raw.ask("POST", f"/containers/{box}/start")[0] == 204
    frames, at = b"", 0
    while at < len(said):
        size = dice.choice([1, 125, 126, 5000, 65535, 65536, 100_000])
        frames += websocket_frame(BINARY, said[at : at + size], dice.randbytes(4))
        at += size
    if ending == "a close frame":
        frames += websocket_frame(CLOSE, struct.pack(">H", 1000), dice.randbytes(4))
    cuts = [0, *sorted(dice.choices(range(len(frames)), k=50)), len(frames)]

    with raw.connect() as client, ThreadPoolExecutor(1) as pool:
        client.request(
            "GET",
            f"/containers/{box}/attach/ws?stream=1&stdin=1&stdout=1",
            *("Connection: Upgrade", "Upgrade: websocket", "Origin: http://localhost"),
            *("Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {KEY.decode()}"),
        )
        status, headers, _ = client.answer()
        assert (status, headers["sec-websocket-accept"].encode()) == (101, ACCEPT)

        def send() -> None:
            for begin, end in itertools.pairwise(cuts):
                client.send(frames[begin:end])
            if ending == "a half-close":
                client.sock.shutdown(socket.SHUT_WR)

        sending = pool.submit(send)
        heard = list(websocket_frames(client))
        sending.result(ANSWER_S)
    assert b"".join(data for kind, data in heard if kind == BINARY) == said + b"end\n"
    assert {kind for kind, _ in heard[:-1]} == {BINARY}
    assert heard[-1][0] == CLOSE
    assert json.loads(raw.ask("POST", f"/containers/{box}/wait")[1])["StatusCode"] == 0


def test_the_longest_head_that_the_engine_takes(clients: Clients) -> None:
    begin = b"GET /_ping HTTP/1.1\r\nHost: docker\r\nX-Registry-Config: "
    filler = HEAD_LIMIT_BYTES - len(begin) - 4
    for extra, expected in ((0, 200), (1, 400)):
        with Raw(clients).connect() as client:
            client.send(begin + b"e" * (filler + extra) + b"\r\n\r\n")
            assert client.answer()[0] == expected


def test_200_connections_of_which_100_listen(clients: Clients) -> None:
    """All at the same time: the listeners hear of what happens, the others are answered."""
    raw = Raw(clients)
    # A listener gets its head with the first event: one that is over is asked for as well.
    clients.docker("network", "create", "seen")
    clients.docker("network", "rm", "seen")
    wanted = "/events?since=1&filters=" + '{"network":["seen"]}'.replace('"', "%22")
    # Of one image: the order of those that were made in the same second is left to chance.
    asked = "/images/json?filters=" + '{"reference":["busybox"]}'.replace('"', "%22")
    with contextlib.ExitStack() as stack:
        listening = [stack.enter_context(raw.connect()) for _ in range(100)]
        for client in listening:
            raw.send(client, "GET", wanted)
        asking = [stack.enter_context(raw.connect()) for _ in range(100)]
        for _ in range(2):
            for client in asking:
                raw.send(client, "GET", asked)
            answers = [client.answer()[::2] for client in asking]
            assert answers[0][0] == 200
            assert set(answers) == {answers[0]}
        for client in listening:
            client.until(b'"Action":"destroy"')
        assert clients.engine_connections() >= 200
        clients.docker("network", "create", "seen")
        for client in listening:
            client.until(b'"Action":"create"')
    clients.docker("network", "rm", "seen")
    wait_for(lambda: clients.engine_connections() < 10, "the streams are closed")
