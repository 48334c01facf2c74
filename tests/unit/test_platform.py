"""The system's edge on POSIX: private directories and Unix sockets."""

from __future__ import annotations

import os
import platform
import resource
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from wherry.platform import Platform, current, posix
from wherry.platform.macos import MacOS
from wherry.platform.posix import Posix


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def test_this_system_is_one() -> None:
    here = current()
    assert here.accelerators[-1] == "tcg"
    assert here.accelerator_problem("tcg") is None
    assert here.accelerator_problem("nonsense")
    assert here.cpu_count() >= 1
    assert here.memory_bytes() > 1 << 28
    assert here.cpu_model()
    assert here is current()


@pytest.mark.parametrize(
    ("said", "named"), [("arm64", "aarch64"), ("AMD64".lower(), "x86_64"), ("x86_64", "x86_64")]
)
def test_architectures_have_one_name(
    said: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: said)
    assert Posix().architecture() == named


def test_macos_knows_its_accelerators() -> None:
    assert MacOS().accelerators == ("hvf", "tcg")
    assert MacOS().accelerator_problem("kvm") == "macOS does not have it"


def test_a_socket_is_the_users_alone_whatever_the_umask(host: Platform, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        listener = host.listen_local(tmp_path / "s")
        assert os.umask(0) == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600
    assert host.docker_host(tmp_path / "s", "wherry") == f"unix://{tmp_path}/s"
    listener.close()
    listener.close()
    assert not (tmp_path / "s").exists()


def test_a_stale_socket_is_replaced(host: Platform, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "s"))
    listener = host.listen_local(tmp_path / "s")
    assert listens(tmp_path / "s")
    listener.close()


def test_a_socket_in_use_is_not_taken(host: Platform, tmp_path: Path) -> None:
    first = host.listen_local(tmp_path / "s")
    with pytest.raises(OSError, match="another program listens there"):
        host.listen_local(tmp_path / "s")
    assert listens(tmp_path / "s")
    first.close()


def test_what_is_no_socket_is_not_removed(host: Platform, tmp_path: Path) -> None:
    (tmp_path / "s").write_text("precious")
    with pytest.raises(OSError, match="no socket"):
        host.listen_local(tmp_path / "s")
    assert (tmp_path / "s").read_text() == "precious"
    (tmp_path / "link").symlink_to(tmp_path / "s")
    with pytest.raises(OSError, match="no socket"):
        host.listen_local(tmp_path / "link")


def test_closing_leaves_what_took_its_place(host: Platform, tmp_path: Path) -> None:
    old = host.listen_local(tmp_path / "s")
    (tmp_path / "s").unlink()
    new = host.listen_local(tmp_path / "s")
    old.close()
    assert listens(tmp_path / "s")
    new.close()


def test_closing_wakes_who_waits_for_a_connection(host: Platform, tmp_path: Path) -> None:
    listener = host.listen_local(tmp_path / "s")
    ended: list[type[BaseException]] = []

    def accept() -> None:
        try:
            while True:
                listener.accept().close()
        except OSError as error:
            ended.append(type(error))

    thread = threading.Thread(target=accept)
    thread.start()
    listens(tmp_path / "s")
    listener.close()
    thread.join(10)
    assert ended


def test_connecting(host: Platform, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        host.connect_local(tmp_path / "s", 1)
    listener = host.listen_local(tmp_path / "s")
    client = host.connect_local(tmp_path / "s", 5)
    server = listener.accept()
    client.sendall(b"hello")
    assert server.recv(10) == b"hello"
    client.close()
    assert server.recv(10) == b""
    server.close()
    listener.close()


def test_a_directory_is_made_private_and_narrowed(host: Platform, tmp_path: Path) -> None:
    path = tmp_path / "a/b"
    host.make_private_directory(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    path.chmod(0o755)
    host.make_private_directory(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to give a directory away")
def test_another_users_directory_is_not_ours(host: Platform, tmp_path: Path) -> None:
    path = tmp_path / "theirs"
    path.mkdir()
    os.chown(path, 65534, 65534)
    with pytest.raises(PermissionError, match="belongs to another user"):
        host.make_private_directory(path)


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What stands for /tmp; the directory for sockets in it."""
    monkeypatch.setattr(posix, "_SHARED", tmp_path)
    return tmp_path / f"wherry-{os.getuid()}"


def test_the_short_directory_is_private_and_the_same_from_anywhere(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for runtime in (None, str(tmp_path)):
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime or "")
        assert current().short_directory() == shared
        assert stat.S_IMODE(shared.stat().st_mode) == 0o700


def test_a_link_in_place_of_the_short_directory_is_not_followed(
    shared: Path, tmp_path: Path
) -> None:
    """Anybody may plant one in /tmp."""
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o755)
    for target in (theirs, tmp_path / "nowhere"):
        shared.symlink_to(target)
        with pytest.raises(NotADirectoryError, match="something is in the way"):
            current().short_directory()
        shared.unlink()
    assert stat.S_IMODE(theirs.stat().st_mode) == 0o755
    assert not (tmp_path / "nowhere").exists()


def test_the_descriptor_limit_is_raised_and_never_lowered(host: Platform) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        assert host.raise_descriptor_limit(300) == 300
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (300, hard)
        assert host.raise_descriptor_limit(200) == 300
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (300, hard)
        if hard != resource.RLIM_INFINITY:
            assert host.raise_descriptor_limit(hard + 1) == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


KEEPS = """
import sys
from pathlib import Path
from wherry.platform import current

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

if sys.argv[1:]:
    current().give_memory_back()
bytearray(20 << 20)  # by which glibc learns that such pieces come again, and are to be kept
before = resident_mib()
pieces = [bytearray(b"x") * (1 << 20) for _ in range(60)]
last = bytearray(100_000)
del pieces
print(resident_mib() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="others give it back by themselves")
def test_memory_that_is_freed_is_given_back() -> None:
    kept = [
        int(subprocess.check_output([sys.executable, "-c", KEEPS, *argv])) for argv in ([], ["y"])
    ]
    assert kept[0] > 40
    assert kept[1] < 10


BETWEEN = """
from pathlib import Path
from {module} import {name}

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

before = resident_mib()
pieces = [bytearray(b"x") * 8192 for _ in range(6000)]
del pieces[::2], pieces[::2], pieces[::2], pieces[::2]
kept = resident_mib() - before
{call}.give_memory_back()
print(kept, resident_mib() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="others have no such call")
@pytest.mark.parametrize(
    ("module", "name", "call"),
    [("wherry.platform", "current", "current()"), ("wherry_guest", "system", "system")],
)
def test_memory_that_is_free_between_what_is_used_is_given_back(
    module: str, name: str, call: str
) -> None:
    script = BETWEEN.format(module=module, name=name, call=call)
    kept, left = map(int, subprocess.check_output([sys.executable, "-c", script]).split())
    assert kept > 40
    assert left < kept // 3


@pytest.mark.parametrize("status", [0, 7])
def test_a_leash_passes_output_and_status(host: Platform, status: int) -> None:
    script = f'echo "$1"; read -r x && exit 99; exit {status}'
    argv = host.leash(["/bin/sh", "-c", script, "-", "a  b"])
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as leashed:
        assert leashed.wait(20) == status
        assert leashed.stdout is not None
        assert leashed.stdout.read() == b"a  b\n"
