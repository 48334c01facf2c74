"""Every kind of request while what is below it is cut at random moments.

Each client has a right answer or an error, in time, and the next request works. What is asked,
in which order, and the dice of the cuts follow from a seed that a failure shows; to have them
again: ``WHERRY_STORM=SEED pytest …``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from api_proxy import Proxy
from http_messages import INPUT
from loopback_sshd import LoopbackSshd
from stub_engine import Client, eventually, pattern

from wherry.api.hooks import Hooks, Request, Watch
from wherry.api.http import ResponseHead
from wherry.api.server import Endpoint
from wherry.platform import current
from wherry.tunnel.tunnel import Tunnel

REQUESTS = 200
CLIENTS = 8
ANSWER_S = 15.0
SIZES = [10, 5000, 400_000, 3_000_000]
REWRITTEN = b', "by": "a hook"}'
RESULT = b'{"StatusCode":7,"Error":{"Message":"not brought"}}'
DONE = (200, b"OK")


class Refused(Exception):
    """The endpoint said that there is no engine, as it should."""


# -- what is asked: each returns when all was right -----------------------------------------------


def take(client: Client, method: str = "GET") -> tuple[int, bytes]:
    """Read an answer; return what it says, or, if it may say nothing, how long that would be."""
    status, headers, body = client.answer(method=method)
    if status in (502, 503):
        assert headers["connection"] == "close"
        assert method == "HEAD" or "message" in json.loads(body)
        raise Refused
    return status, headers["content-length"].encode() if method == "HEAD" else body


def begin(client: Client) -> int:
    """Read the head of an answer that goes on; return its status."""
    status = int(client.until(b"\r\n\r\n").split()[1])
    if status in (502, 503):
        raise Refused
    return status


def ask(client: Client, method: str, target: str, *headers: str, body: bytes | None = None) -> None:
    """Send a request; one that is cut off meanwhile may have its answer all the same."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        client.request(method, target, *headers, body=body)


def ping(client: Client, dice: random.Random) -> None:
    for _ in range(5):
        ask(client, "GET", "/_ping")
        assert take(client) == DONE


def head(client: Client, dice: random.Random) -> None:
    size = dice.choice(SIZES)
    for _ in range(2):
        ask(client, "HEAD", f"/bytes?n={size}")
        assert take(client, "HEAD") == (200, b"%d" % size)
        ask(client, "GET", "/_ping")
        assert take(client) == DONE


def download(client: Client, dice: random.Random) -> None:
    form, size = dice.choice(["bytes", "chunked"]), dice.choice(SIZES)
    ask(client, "GET", f"/{form}?n={size}")
    assert take(client) == (200, pattern(size))


def upload(client: Client, dice: random.Random) -> None:
    data = pattern(dice.choice(SIZES), dice.randrange(256))
    ask(client, "POST", "/echo", body=data)
    assert take(client) == (200, data)


def create(client: Client, dice: random.Random) -> None:
    """A hook reads and rewrites the body."""
    body = json.dumps({"Image": "box", "Cmd": "x" * dice.choice([10, 100_000])}).encode()
    form = dice.choice(["length", "chunked", "expect"])
    if form == "length":
        ask(client, "POST", "/v1.51/containers/create?name=c", body=body)
    else:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            framing = "Transfer-Encoding: chunked" if form == "chunked" else "Expect: 100-continue"
            length = f"Content-Length: {len(body)}" if form == "expect" else "X-Form: chunked"
            client.request("POST", "/containers/create", framing, length)
            if form == "expect":
                client.send(body)
            else:
                middle = dice.randrange(1, len(body))
                for part in (body[:middle], body[middle:]):
                    client.send(b"%x\r\n%b\r\n" % (len(part), part))
                client.send(b"0\r\nX-Sum: 1\r\n\r\n")
    digest = hashlib.sha256(body[:-1] + REWRITTEN).hexdigest()
    assert take(client) == (201, b'{"Id":"%s"}\n' % digest.encode())


def run(client: Client, dice: random.Random) -> None:
    """A hook holds the start, and another one gives the wait another result."""
    ask(client, "POST", "/v1.51/containers/c/start")
    assert take(client) == (204, b"")
    ask(client, "POST", "/v1.51/containers/c/wait?condition=next-exit")
    assert take(client) == (200, RESULT + b"\n")


def copy(client: Client, dice: random.Random) -> None:
    """What docker cp asks for, with hooks on both sides of it."""
    size = dice.choice(SIZES)
    data, target = pattern(size, dice.randrange(256)), f"/containers/c/archive?path=%2Fx&n={size}"
    ask(client, "HEAD", target)
    assert take(client, "HEAD") == (200, b"0")
    ask(client, "PUT", target, body=data)
    assert take(client) == (200, hashlib.sha256(data).hexdigest().encode())
    ask(client, "GET", target)
    assert take(client) == (200, pattern(size))


def events(client: Client, dice: random.Random) -> None:
    """They are shown to a hook one by one; who has seen enough leaves."""
    number = dice.choice([1, 100])
    ask(client, "GET", f"/events?n={number}")
    assert begin(client) == 200
    chunks = client.chunks()
    assert [next(chunks) for _ in range(number)] == [b'{"n":%d}\n' % n for n in range(number)]


def ahead(client: Client, dice: random.Random) -> None:
    """Many requests at once, whose answers come in their order."""
    body = pattern(3000, dice.randrange(256))
    digest = hashlib.sha256(b"{" + REWRITTEN).hexdigest().encode()
    known = {
        b"GET /_ping HTTP/1.1\r\nHost: x\r\n\r\n": ("GET", 200, b"OK"),
        b"HEAD /bytes?n=9 HTTP/1.1\r\nHost: x\r\n\r\n": ("HEAD", 200, b"9"),
        b"GET /chunked?n=7000 HTTP/1.1\r\nHost: x\r\n\r\n": ("GET", 200, pattern(7000)),
        b"POST /containers/c/start HTTP/1.1\r\nHost: x\r\n\r\n": ("POST", 204, b""),
        b"POST /containers/create HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}": (
            *("POST", 201),
            b'{"Id":"%s"}\n' % digest,
        ),
        b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3000\r\n\r\n" + body: (
            *("POST", 200),
            body,
        ),
    }
    chosen = dice.choices(list(known), k=8)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        client.send(b"".join(chosen))
    for each in chosen:
        method, *expected = known[each]
        assert [*take(client, method)] == expected


def converse(client: Client, dice: random.Random, request: bytes, early: bytes = b"") -> None:
    """Have a raw stream, whose engine says what was said to it; end it, and hear of that."""
    said = early + dice.choice(INPUT) + pattern(dice.choice(SIZES[:3]), dice.randrange(256))
    cut = dice.randrange(len(early), len(said))
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        client.send(request + early)
    assert begin(client) == (101 if b"Upgrade: " in request else 200)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for part in (said[len(early) : cut], said[cut:]):
            client.send(part)
        client.sock.shutdown(1)
    heard = client.rest()
    whole = said + b"<end>"
    assert whole.startswith(heard)
    if heard != whole:
        raise Refused  # a raw stream that breaks off has no other sign of it


def execute(client: Client, dice: random.Random) -> None:
    upgrade = dice.choice([b"Connection: Upgrade\r\nUpgrade: tcp\r\n", b""])
    converse(
        client, dice,
        b"POST /v1.51/exec/e/start HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n%b\r\n{}" % upgrade,
    )  # fmt: skip


def websocket(client: Client, dice: random.Random) -> None:
    converse(
        client, dice,
        b"GET /containers/c/attach/ws?stream=1 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n"
        b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\r\n",
    )  # fmt: skip


def h2c(client: Client, dice: random.Random) -> None:
    """BuildKit's, which speaks before it has an answer."""
    converse(
        client, dice,
        b"POST /%b HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
        % dice.choice([b"session", b"grpc"]),
        early=INPUT[0],
    )  # fmt: skip


ASKED: list[Callable[[Client, random.Random], None]] = [
    *(ping, head, download, upload, create, run, copy),
    *(events, ahead, execute, websocket, h2c),
]


class Held:
    """Hooks as those of bind mounts: they read, rewrite, wait, and watch; counted."""

    def __init__(self, hooks: Hooks) -> None:
        self.begun = self.ended = 0
        self._lock = threading.Lock()
        hooks.on("POST", "/containers/create", self._create, body_limit=1 << 20)
        hooks.on("POST", "/containers/{id}/wait", lambda request: self._watch(line=self._result))
        hooks.on("GET", "/chunked", lambda request: self._watch(line=lambda line: None))
        hooks.on("GET", "/events", lambda request: self._watch(line=self._event))
        for method, path in (
            *(("POST", "/containers/{id}/start"), ("POST", "/exec/{id}/start")),
            *((method, "/containers/{id}/archive") for method in ("HEAD", "PUT", "GET")),
            *(("GET", "/containers/{id}/attach/ws"), ("POST", "/session")),
        ):
            hooks.on(method, path, self._around)

    def _create(self, request: Request) -> Watch:
        assert request.body is not None
        request.replace_body(request.body[:-1] + REWRITTEN)
        return self._around(request)

    def _around(self, request: Request) -> Watch:
        """Wait on both sides of the request, as for a barrier."""
        never = threading.Event()
        request.wait(never, 0.005)

        def held(head: ResponseHead) -> None:
            request.wait(never, 0.005)

        return self._watch(head=held)

    def _result(self, line: bytes) -> bytes:
        return RESULT

    def _event(self, line: bytes) -> None:
        assert json.loads(line)["n"] >= 0

    def _watch(
        self,
        head: Callable[[ResponseHead], None] | None = None,
        line: Callable[[bytes], bytes | None] | None = None,
    ) -> Watch:
        with self._lock:
            self.begun += 1
        return Watch(head, line, self._end)

    def _end(self, complete: bool) -> None:
        with self._lock:
            self.ended += 1


def storm(path: Path, cut: Callable[[random.Random], None], every_s: float) -> Counter[str]:
    """Ask for everything, by many clients, while something is cut again and again.

    :returns: how often each kind had its right answer, and how often there was an error.
    """
    seed = int(os.environ.get("WHERRY_STORM") or random.randrange(1 << 30))
    dice = random.Random(seed)
    chosen = (ASKED * REQUESTS)[:REQUESTS]
    dice.shuffle(chosen)
    asked = iter(enumerate(chosen))
    over, lock = threading.Event(), threading.Lock()
    wrong: list[str] = []
    outcomes = Counter[str]()

    def cut_on() -> None:
        while not over.wait(dice.random() * every_s):
            cut(dice)

    def once(number: int, kind: Callable[[Client, random.Random], None]) -> str:
        try:
            with Client(path, timeout_s=ANSWER_S) as client:
                kind(client, random.Random(seed + number))
            return kind.__name__
        except Refused:
            return "error"
        except TimeoutError:
            what = "hangs"
        except ConnectionError:
            return "error"
        except AssertionError as error:
            what = str(error)[:1000]
            if "the stream ended" in what:
                return "error"
        wrong.append(f"WHERRY_STORM={seed}, request {number}, {kind.__name__}: {what}")
        return "wrong"

    def work() -> None:
        while True:
            with lock:
                following = next(asked, None)
            if following is None:
                return
            outcome = once(*following)
            with lock:
                outcomes[outcome] += 1

    threads = [threading.Thread(target=each) for each in [work] * CLIENTS]
    cutter = threading.Thread(target=cut_on)
    cutter.start()
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        over.set()
        cutter.join()
    assert not wrong
    assert outcomes.total() == REQUESTS
    return outcomes


@pytest.mark.parametrize("kind", ASKED)
def test_each_is_answered_while_nothing_is_cut(
    proxy: Proxy, kind: Callable[[Client, random.Random], None]
) -> None:
    held = Held(proxy.hooks)
    proxy.engine.exit.set()
    for number in range(6):
        with proxy.client() as client:
            kind(client, random.Random(number))
    eventually(lambda: proxy.endpoint.counters.active == 0)
    assert held.begun == held.ended


def test_200_requests_while_connections_are_cut(proxy: Proxy) -> None:
    """And then the next request works."""
    held = Held(proxy.hooks)
    proxy.engine.exit.set()

    def cut(dice: random.Random) -> None:
        streams = [stream for stream in proxy.streams if not stream._closed]
        if streams:
            dice.choice(streams).cut()

    outcomes = storm(proxy.path, cut, 0.02)
    assert min(outcomes["error"], REQUESTS - outcomes["error"]) >= 10, outcomes
    for _ in range(5):
        proxy.ping()
    eventually(lambda: proxy.endpoint.counters.active == 0)
    assert held.begun == held.ended


@pytest.mark.skipif(not Path("/usr/sbin/sshd").exists(), reason="needs openssh-server")
def test_200_requests_while_the_tunnel_is_cut(proxy: Proxy, tmp_path: Path) -> None:
    """A real tunnel to a real sshd, whose sessions are killed; the endpoint recovers by itself."""
    sshd = LoopbackSshd(tmp_path / "sshd")
    held = Held(proxy.hooks)
    proxy.engine.exit.set()
    cuts = 0
    with contextlib.ExitStack() as stack:
        stack.callback(sshd.stop)
        tunnel = Tunnel(lambda watcher: sshd.connect(watcher, timeout_s=10))
        stack.callback(tunnel.close)
        tunnel.start()
        tunnel.wait(10)
        remote = str(proxy.engine.path)
        endpoint = Endpoint(
            current().listen_local(tmp_path / "tunnelled.sock"),
            lambda: tunnel.begin_unix(remote),
            prepare=lambda: tunnel.prepare_unix(remote),
            hooks=proxy.hooks,
        )
        stack.callback(endpoint.close)
        endpoint.start()

        def cut(dice: random.Random) -> None:
            nonlocal cuts
            cuts += bool(sshd.sessions())
            sshd.signal_sessions(signal.SIGKILL)

        outcomes = storm(tmp_path / "tunnelled.sock", cut, 0.25)
        assert cuts > 3
        assert REQUESTS - outcomes["error"] > 20, outcomes

        def answers() -> bool:
            with Client(tmp_path / "tunnelled.sock", timeout_s=ANSWER_S) as client:
                client.request("GET", "/_ping")
                return client.answer()[0] == 200

        eventually(answers)  # the last cut may be a moment ago
        eventually(lambda: endpoint.counters.active == 0)
        assert held.begun == held.ended
