"""A real SSH agent, reached by way of a real sshd: what containers get at a socket of the guest."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loopback_sshd import LoopbackSshd, echo, unix_server

from wherry.config.layout import Layout
from wherry.platform import current
from wherry.service import ssh_agent
from wherry.service.ssh_agent import SshAgent
from wherry.tunnel.connection import Connection

pytestmark = pytest.mark.skipif(not Path("/usr/sbin/sshd").exists(), reason="needs openssh-server")

WAIT_S = 10.0


@pytest.fixture
def guest_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where sshd listens for the agent."""
    path = tmp_path / "in-the-guest.sock"
    monkeypatch.setattr(ssh_agent, "_TUNNEL_SOCKET", str(path))
    return path


class Offer:
    """An offer of the agent that a machine's settings name."""

    def __init__(self, sshd: LoopbackSshd, home: Path) -> None:
        layout = Layout(home, current())
        self._paths = layout.machine("default")
        self._paths.directory.mkdir(parents=True)
        self.agent = SshAgent(layout, self._paths)
        self._sshd = sshd
        self._connections: list[Connection] = []

    def connect(self) -> Connection:
        made = Connection.connect(
            self._sshd.address,
            user=self._sshd.user,
            user_key=self._sshd.keys.user,
            host_public=self._sshd.keys.host.public,
            timeout_s=WAIT_S,
        )
        self._connections.append(made)
        self.agent.offer(made)
        return made

    def choose(self, path: Path) -> None:
        self._paths.config.write_text(f'ssh.agent = "{path}"\n')

    def close(self) -> None:
        for each in self._connections:
            each.close()
        self.agent.close()


@pytest.fixture
def offer(
    sshd: LoopbackSshd, guest_socket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Offer]:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    before = set(threading.enumerate())
    made = Offer(sshd, tmp_path / "home")
    yield made
    made.close()
    assert set(threading.enumerate()) <= before


@contextlib.contextmanager
def agent(path: Path, key: Path) -> Iterator[None]:
    """An ssh-agent that has the key."""
    process = subprocess.Popen(["ssh-agent", "-D", "-a", path], stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: listens(path), "the agent's socket")
        subprocess.run(["ssh-add", "-q", key], env=environment(path), check=True)
        yield
    finally:
        process.terminate()
        process.wait(WAIT_S)


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def environment(path: Path) -> dict[str, str]:
    return {**os.environ, "SSH_AUTH_SOCK": str(path)}


def wait_for(condition: Any, what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def keys(path: Path) -> str:
    """What ``ssh-add -l`` says in the guest."""
    done = subprocess.run(
        ["ssh-add", "-l"], env=environment(path), capture_output=True, text=True, timeout=WAIT_S
    )
    return done.stdout + done.stderr


@pytest.fixture
def key(tmp_path: Path) -> tuple[Path, str]:
    """A key and its fingerprint."""
    path = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return path, subprocess.check_output(["ssh-keygen", "-lf", path], text=True).split()[1]


def test_the_agent_signs_for_the_guest(
    offer: Offer, guest_socket: Path, key: tuple[Path, str], tmp_path: Path
) -> None:
    offer.agent.follow(str(tmp_path / "agent"))
    with agent(tmp_path / "agent", key[0]):
        offer.connect()
        assert key[1] in keys(guest_socket)
        public = key[0].with_suffix(".pub")
        (tmp_path / "text").write_text("to be signed")
        signed = subprocess.run(
            ["ssh-keygen", "-Y", "sign", "-f", public, "-n", "test", tmp_path / "text"],
            env=environment(guest_socket), capture_output=True, timeout=WAIT_S,
        )  # fmt: skip
        assert signed.returncode == 0, signed.stderr
        assert b"BEGIN SSH SIGNATURE" in (tmp_path / "text.sig").read_bytes()


def test_the_agent_is_looked_up_for_each_client(
    offer: Offer,
    guest_socket: Path,
    key: tuple[Path, str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    offer.connect()
    assert key[1] not in keys(guest_socket)
    assert "names none" in caplog.text
    path = tmp_path / "agent"
    offer.agent.follow(str(path))
    offer.agent.follow("")  # a session without one
    assert key[1] not in keys(guest_socket)
    assert f"{path} does not answer" in caplog.text
    with agent(path, key[0]):
        assert key[1] in keys(guest_socket)
        offer.choose(tmp_path / "other")
        assert key[1] not in keys(guest_socket)
        assert f"{tmp_path}/other does not answer" in caplog.text


def test_a_new_connection_takes_over(
    sshd: LoopbackSshd, offer: Offer, guest_socket: Path, key: tuple[Path, str], tmp_path: Path
) -> None:
    offer.choose(tmp_path / "agent")
    with agent(tmp_path / "agent", key[0]):
        first = offer.connect()
        assert key[1] in keys(guest_socket)
        first.close()
        second = offer.connect()
        assert key[1] in keys(guest_socket)
        # Also from one that the guest has not missed yet.
        offer.connect()
        assert key[1] in keys(guest_socket)
        second.close()
        wait_for(lambda: len(sshd.sessions()) <= 2, "the session before has ended")
        assert key[1] in keys(guest_socket)


def test_many_clients_at_once(offer: Offer, guest_socket: Path, tmp_path: Path) -> None:
    """Both ends tell each other of their end, and nothing is lost or left."""
    with unix_server(tmp_path / "echo", echo) as path:
        offer.choose(Path(path))
        connection = offer.connect()
        data = os.urandom(300_000)
        answers: list[bytes] = []

        def ask() -> None:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(guest_socket))
                sender = threading.Thread(target=client.sendall, args=(data,))
                sender.start()
                got = b""
                while len(got) < len(data):
                    got += client.recv(65536)
                sender.join()
                client.shutdown(socket.SHUT_WR)
                assert client.recv(1) == b""
                answers.append(got)

        clients = [threading.Thread(target=ask) for _ in range(20)]
        for each in clients:
            each.start()
        for each in clients:
            each.join(WAIT_S)
        assert answers == [data] * 20
        # What else the connection carries goes on.
        assert connection.run("echo well", timeout_s=WAIT_S).stdout == b"well\n"


def test_a_guest_that_forbids_it_is_used_all_the_same(
    tmp_path: Path, guest_socket: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = LoopbackSshd(tmp_path / "strict", streamlocal=False)
    offer = Offer(server, tmp_path / "home")
    try:
        connection = offer.connect()
        assert "containers get no SSH agent" in caplog.text
        assert connection.run("echo well", timeout_s=WAIT_S).stdout == b"well\n"
    finally:
        offer.close()
        server.stop()
