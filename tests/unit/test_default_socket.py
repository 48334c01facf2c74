"""``/var/run/docker.sock``: claimed where nothing is, and never taken from anybody."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from wherry.config.layout import Layout, MachinePaths
from wherry.config.model import build
from wherry.core.errors import WherryError
from wherry.platform import current
from wherry.service.default_socket import DefaultSocket, describe

NOBODY = 65534


@pytest.fixture
def place(tmp_path: Path) -> DefaultSocket:
    return DefaultSocket(tmp_path / "docker.sock", tmp_path / "a machine" / "docker.sock")


@contextlib.contextmanager
def read_only() -> Iterator[Path]:
    """A directory that may be looked into and not written to."""
    # Not pytest's own directory, which nobody else may enter.
    directory = Path(tempfile.mkdtemp(prefix="wherry-test-"))
    directory.chmod(0o555)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(NOBODY)
        yield directory
    finally:
        os.seteuid(user)
        directory.chmod(0o755)
        shutil.rmtree(directory)


def refusals(place: DefaultSocket) -> list[WherryError]:
    """What is told beforehand, and when it is tried."""
    told = place.problem()
    assert told is not None
    with pytest.raises(WherryError) as caught:
        place.claim()
    return [told, caught.value]


def test_the_system_s_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WHERRY_DEFAULT_SOCKET")
    assert current().default_docker_socket() == Path("/var/run/docker.sock")


def test_a_free_place_is_claimed_and_released(place: DefaultSocket) -> None:
    assert place.path is not None
    for _ in range(2):
        assert place.problem() is None
        place.claim()
        assert place.path.readlink() == place.target
        assert place.is_ours()
    for _ in range(2):
        place.release()
        assert not os.path.lexists(place.path)


def test_a_link_that_leads_here_by_another_way_is_ours(
    place: DefaultSocket, tmp_path: Path
) -> None:
    assert place.path is not None
    (tmp_path / "way").symlink_to(place.target.parent)
    place.path.symlink_to(tmp_path / "way" / "docker.sock")
    place.claim()
    assert place.path.readlink() == tmp_path / "way" / "docker.sock"
    place.release()
    assert not os.path.lexists(place.path)


@pytest.mark.parametrize(
    "kind", ["socket", "stale socket", "file", "directory", "link", "dangling"]
)
def test_what_is_another_s_stays(place: DefaultSocket, tmp_path: Path, kind: str) -> None:
    assert place.path is not None
    other = tmp_path / "other.sock"
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        if kind in ("socket", "stale socket"):
            listener.bind(str(place.path))
            if kind == "socket":
                listener.listen()
        elif kind == "file":
            place.path.write_text("kept")
        elif kind == "directory":
            place.path.mkdir()
        else:
            place.path.symlink_to(other)
            if kind == "link":
                other.write_text("")
        before = place.path.lstat()
        for refused in refusals(place):
            assert str(place.path) in refused.message
            assert "left as it is" in refused.message
            assert f"sudo rm {place.path}" in refused.hint
            if "link" in kind or kind == "dangling":
                assert str(other) in refused.message
        place.release()
        after = place.path.lstat()
        assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)


def test_who_may_not_make_it_is_told_how() -> None:
    with read_only() as directory:
        place = DefaultSocket(directory / "docker.sock", Path("/home/a user/docker.sock"))
        for refused in refusals(place):
            assert refused.hint.endswith(
                f"sudo ln -s '/home/a user/docker.sock' {directory}/docker.sock"
            )


@pytest.mark.skipif(os.geteuid() != 0, reason="makes the link as root, for another user")
def test_a_link_that_root_made_for_us_is_ours() -> None:
    with read_only() as directory:
        place = DefaultSocket(directory / "docker.sock", Path("/home/user/docker.sock"))
        os.seteuid(0)
        (directory / "docker.sock").symlink_to(place.target)
        os.seteuid(NOBODY)
        assert place.problem() is None
        place.claim()
        with pytest.raises(WherryError, match="still leads to this machine") as caught:
            place.release()
        assert caught.value.hint.endswith(f"sudo rm {directory}/docker.sock")
        assert place.is_ours()


def test_a_system_without_one() -> None:
    place = DefaultSocket(None, Path("target"))
    place.release()
    assert not place.is_ours()
    with pytest.raises(WherryError, match="no default socket"):
        place.claim()


def test_what_status_tells(layout: Layout, paths: MachinePaths) -> None:
    off = build({}, layout.platform)
    on = build({"endpoint.default_socket": True}, layout.platform)
    assert describe(layout, paths, off) is None
    place = DefaultSocket.of(layout, paths)
    assert place.path is not None
    path = str(place.path)
    assert describe(layout, paths, on) == {
        "path": path, "claimed": False, "problem": "", "hint": "",
    }  # fmt: skip
    place.claim()
    told = describe(layout, paths, on)
    assert told is not None
    assert told["claimed"]
    place.path.unlink()
    place.path.write_text("")
    told = describe(layout, paths, on)
    assert told is not None
    assert not told["claimed"]
    assert "another program's" in str(told["problem"])
