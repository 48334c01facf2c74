"""Certificates through the command line, with a fake QEMU."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import trustme
from fake_host import FakeHost


def test_a_start_gives_what_is_usable_and_names_the_rest(host: FakeHost) -> None:
    """A file that is broken never keeps a machine from starting."""
    directory = host.home / "certs.d"
    directory.mkdir()
    authority = trustme.CA()
    authority.cert_pem.write_to_path(directory / "good.crt")
    (directory / "bad.crt").write_text("nonsense")
    done = host.run("start")
    assert done.status == 0
    warned = [line for line in done.stderr.splitlines() if "bad.crt" in line]
    reason = "it holds no certificate, or a broken one"
    assert warned == [f"wherry: warning: {directory}/bad.crt is left out: {reason}"]
    (given,) = [
        Path(word.partition("file=")[2])
        for word in host.calls()[-1]
        if word.startswith("name=opt/wherry/certificates,")
    ]
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(given.read_bytes()))) as tar:
        pem = tar.extractfile("roots.pem")
        assert pem is not None
        assert pem.read() == authority.cert_pem.bytes()


def test_a_guest_that_runs_is_asked_to_take_them(host: FakeHost) -> None:
    """This one, which has no program for it, refuses; the setting is kept all the same."""
    host.make()
    done = host.run("config", "set", "certificates.directory", str(host.directory))
    assert (done.status, done.stderr) == (0, "")
    host.good("start")
    done = host.run("config", "unset", "certificates.directory")
    assert done.status == 0
    assert "wherry: warning: the guest does not take the certificates" in done.stderr
    assert host.good("config", "get", "certificates.directory") == "\n"


def test_the_agent_s_socket_is_taken_at_once(host: FakeHost) -> None:
    host.good("start")
    done = host.run("config", "set", "ssh.agent", "/tmp/agent.sock")
    assert (done.status, done.stderr) == (0, "")
    assert host.good("config", "get", "ssh.agent") == "/tmp/agent.sock\n"
