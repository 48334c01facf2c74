"""Names of machines, and where their files are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wherry.config.layout import Layout, check_name
from wherry.core.errors import UsageError, WherryError
from wherry.platform import Platform


@pytest.mark.parametrize("name", ["default", "a", "0", "my-box_2", "v1.2", "x" * 40, "console"])
def test_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        "a/b",
        "a\\b",
        "..",
        ".",
        ".hidden",
        "a..b",
        "a.",
        "-a",
        "a b",
        " a",
        "a\n",
        "A",
        "Default",
        "ä",
        "a\0",
        "\udcff",
        "x" * 41,
        "x" * 200,
        "con",
        "nul",
        "com1",
        "lpt9",
        "aux.txt",
    ],
)
def test_what_is_no_name_is_bad_usage(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_name(name)
    assert caught.value.exit_status == 2
    said = str(caught.value)
    assert len(said) < 200
    assert said.isprintable()


@given(st.text(max_size=60))
def test_a_name_never_leaves_its_directory(name: str) -> None:
    try:
        check_name(name)
    except UsageError:
        return
    assert Path("machines", name).resolve().parent == Path("machines").resolve()
    assert name == name.lower()
    assert not name.startswith(".")


def test_sockets_are_in_the_machines_directory(layout: Layout) -> None:
    paths = Layout(Path("/home/me/.local/share/wherry"), layout.platform).machine("default")
    assert paths.docker_socket == paths.directory / "docker.sock"
    assert paths.control_socket.name == "control.sock"
    assert paths.qmp_socket.name == "qmp.sock"


@pytest.mark.parametrize("depth", range(60, 120))
def test_every_socket_fits_its_address_at_any_depth(depth: int, host: Platform) -> None:
    host._sockets = Path("/run/user/1000/wherry")  # type: ignore[attr-defined]
    host.make_private_directory = lambda path: None  # type: ignore[method-assign]
    home = Path("/" + "d" * (depth - 1))
    paths = Layout(home, host).machine("default")
    for socket in (paths.docker_socket, paths.control_socket, paths.qmp_socket):
        assert len(os.fsencode(socket)) <= 103
    assert paths.config == home / "machines/default/config.toml"


def test_deep_machines_have_sockets_of_their_own(layout: Layout, tmp_path: Path) -> None:
    one, two = (
        Layout(tmp_path / ("d" * 100) / part, layout.platform).machine("default")
        for part in ("one", "two")
    )
    assert one.docker_socket.parent == two.docker_socket.parent
    assert len({one.docker_socket, two.docker_socket, one.qmp_socket, one.control_socket}) == 4
    again = Layout(tmp_path / ("d" * 100) / "one", layout.platform).machine("default")
    assert again.docker_socket == one.docker_socket


def test_the_limit_counts_bytes_and_not_letters(host: Platform) -> None:
    paths = Layout(Path("/" + "ü" * 50), host).machine("default")
    assert len(os.fsencode(paths.control_socket)) <= 103


def test_a_system_without_a_limit_keeps_them_together(
    host: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(host), "socket_path_limit", None)
    paths = Layout(Path("/" + "d" * 200), host).machine("default")
    assert paths.docker_socket.parent == paths.directory


def test_only_machines_are_listed(layout: Layout) -> None:
    for name in ("b", "a", ".a.new", ".b.deleted", "con", "x..y", "Capital"):
        (layout.machines / name).mkdir()
    (layout.machines / ".a.lock").touch()
    (layout.machines / "file").touch()
    assert layout.machine_names() == ["a", "b"]


def test_without_a_home_there_are_no_machines(tmp_path: Path, host: Platform) -> None:
    assert Layout(tmp_path / "absent", host).machine_names() == []


def test_the_home_is_private(layout: Layout) -> None:
    for directory in (layout.home, layout.machines, layout.images):
        assert directory.stat().st_mode & 0o777 == 0o700


def test_a_file_in_the_way_of_the_home_is_explained(tmp_path: Path, host: Platform) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WherryError, match=r"file.* cannot be used: .*set WHERRY_HOME"):
        Layout(tmp_path / "file", host).prepare()
    with pytest.raises(WherryError, match="set WHERRY_HOME"):
        Layout(tmp_path / "file" / "home", host).prepare()


def test_a_relative_home_is_made_absolute(host: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERRY_HOME", "here")
    assert Layout.current(host).home == Path.cwd() / "here"
    monkeypatch.setenv("WHERRY_HOME", "")
    assert Layout.current(host).home == host.data_directory


def test_docker_contexts_have_distinct_names(layout: Layout) -> None:
    assert layout.machine("default").docker_context == "wherry"
    assert layout.machine("dev").docker_context == "wherry-dev"
