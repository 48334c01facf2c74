"""The machine's keys, read by OpenSSH itself where it is installed."""

from __future__ import annotations

import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from wherry.core.errors import TunnelError
from wherry.tunnel.keys import known_hosts_line, load_keys, make_keys


def test_keys_are_made_once_and_loaded(tmp_path: Path) -> None:
    made = make_keys(tmp_path)
    assert make_keys(tmp_path) == made == load_keys(tmp_path)
    assert made.user.public.startswith("ssh-ed25519 ")
    assert made.user != made.host
    assert "PRIVATE" not in repr(made)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")
def test_private_keys_are_the_users_alone(tmp_path: Path) -> None:
    make_keys(tmp_path)
    for name in ("user_ed25519", "host_ed25519"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_openssh_reads_the_keys(tmp_path: Path) -> None:
    keys = make_keys(tmp_path)
    shown = subprocess.run(
        ["ssh-keygen", "-y", "-f", str(keys.user_path)], capture_output=True, check=True
    )
    assert shown.stdout.decode().split()[:2] == keys.user.public.split()
    known = tmp_path / "known_hosts"
    known.write_text(known_hosts_line("127.0.0.1", 2222, keys.host.public) + "\n")
    found = subprocess.run(
        ["ssh-keygen", "-F", "[127.0.0.1]:2222", "-f", str(known)], capture_output=True, check=True
    )
    assert keys.host.public in found.stdout.decode()


@pytest.mark.parametrize("content", [b"", b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n"])
def test_a_damaged_key_is_named(tmp_path: Path, content: bytes) -> None:
    make_keys(tmp_path)
    (tmp_path / "host_ed25519").write_bytes(content)
    with pytest.raises(TunnelError, match="host_ed25519 is damaged"):
        load_keys(tmp_path)
    with pytest.raises(TunnelError, match="host_ed25519 is damaged"):
        make_keys(tmp_path)  # must not replace a key that a guest trusts


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(TunnelError, match="user_ed25519 cannot be read"):
        load_keys(tmp_path)
