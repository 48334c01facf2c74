"""Registries behind private authorities, with the real engine and a real registry."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from registry import tls_registry
from sandbox import Sandbox

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]


def travels(machine: Sandbox, registry: str) -> str:
    """Push an image and pull it again; return what failed, or nothing."""
    name = f"{registry}/team/tool:1"
    machine.docker("tag", "busybox", name)
    pushed = machine.docker("push", "-q", name, check=False)
    machine.docker("rmi", name)
    if pushed.returncode != 0:
        return pushed.stderr.decode()
    machine.docker("pull", "-q", name)
    machine.docker("rmi", name)
    return ""


@pytest.fixture
def stranger() -> trustme.CA:
    """An authority that this computer does not know."""
    return trustme.CA()


def test_what_this_computer_trusts_is_trusted_from_the_start(
    machine: Sandbox, authority: trustme.CA, tmp_path: Path
) -> None:
    with tls_registry(tmp_path, authority) as name:
        assert travels(machine, name) == ""


def test_a_registry_s_own_certificates(
    machine: Sandbox, stranger: trustme.CA, tmp_path: Path
) -> None:
    """Those the engine reads each time: it is not restarted."""
    server, trusted = tmp_path / "registry", tmp_path / "trusted"
    server.mkdir()
    trusted.mkdir()
    with tls_registry(server, stranger, clients=stranger) as registry:
        place = trusted / registry
        place.mkdir()
        stranger.cert_pem.write_to_path(place / "ca.crt")
        client = stranger.issue_cert("me")
        client.private_key_pem.write_to_path(place / "client.key")
        client.cert_chain_pems[0].write_to_path(place / "client.cert")
        try:
            done = machine.wherry("config", "set", "certificates.directory", str(trusted))
            assert done.stderr == b""
            assert travels(machine, registry) == ""
            (place / "client.key").unlink()
            done = machine.wherry("config", "set", "certificates.directory", str(trusted))
            assert b"client.key is missing" in done.stderr
            assert travels(machine, registry) != ""
        finally:
            machine.wherry("config", "unset", "certificates.directory")
        assert "unknown authority" in travels(machine, registry)


@pytest.fixture
def container(machine: Sandbox) -> Iterator[str]:
    """A container that runs."""
    made = machine.docker("run", "-d", "busybox", "sleep", "1000").stdout.decode().strip()
    yield made
    machine.docker("rm", "-f", made)


def test_an_authority_of_the_user_s(
    machine: Sandbox, container: str, stranger: trustme.CA, tmp_path: Path
) -> None:
    """The engine that runs learns of it, while containers go on."""

    def started() -> bytes:
        state = "{{.State.Running}} {{.State.StartedAt}}"
        return machine.docker("inspect", "-f", state, container).stdout

    before = started()
    assert before.startswith(b"true")
    trusted = machine.home / "certs.d"
    trusted.mkdir()
    with tls_registry(tmp_path, stranger) as registry:
        assert "unknown authority" in travels(machine, registry)
        # It stays: to take it away again would take another start.
        stranger.cert_pem.write_to_path(trusted / "stranger.crt")
        (trusted / "broken.pem").write_text("nonsense")
        done = machine.wherry("config", "unset", "certificates.directory")
        (trusted / "broken.pem").unlink()
        assert b"The engine has started anew" in done.stderr
        assert done.stderr.count(b"broken.pem is left out") == 1
        assert travels(machine, registry) == ""
    # One that came since, with what is changed for its registry: the engine starts once.
    (trusted / "stranger.crt").unlink()
    another = trustme.CA()
    another.cert_pem.write_to_path(trusted / "another.crt")
    (tmp_path / "another").mkdir()
    with tls_registry(tmp_path / "another", another) as registry:
        dockerd = ("shell", "--", "pgrep", "-x", "dockerd")
        pid = machine.wherry(*dockerd).stdout
        done = machine.wherry("config", "set", "engine.debug", "true")
        assert done.stderr.count(b"started anew") == 1
        assert machine.wherry(*dockerd).stdout != pid
        assert travels(machine, registry) == ""
    machine.wherry("config", "unset", "engine.debug")
    assert started() == before
