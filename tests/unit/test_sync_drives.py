"""What a Windows host's paths become in requests, in every form in which clients write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wherry.sync import drives, sources
from wherry.sync.drives import PathRefused, to_guest, to_host
from wherry.sync.sources import Source


@pytest.mark.parametrize(
    ("path", "guest"),
    [
        ("C:\\Users\\ann\\my app", "/c/Users/ann/my app"),
        ("c:\\Users", "/c/Users"),
        ("C:/Users/ann", "/c/Users/ann"),
        ("D:\\a/b\\c/", "/d/a/b/c"),
        ("/c/Users/ann", "/c/Users/ann"),
        ("/C/Users", "/c/Users"),
        ("//c/Users", "/c/Users"),
        ("C:\\", "/c"),
        ("C:", "/c"),
        ("\\\\?\\C:\\very\\long", "/c/very/long"),
        ("//var/run/docker.sock", "/var/run/docker.sock"),
        ("/c", "/c"),
        ("C:\\a\\.\\b\\..\\..\\..\\d", "/c/d"),
        ("C:\\ünïcode\\日本", "/c/ünïcode/日本"),
        # Neither a drive nor a share: names of volumes, and the guest's own.
        ("volume", "volume"),
        ("/var/run/docker.sock", "/var/run/docker.sock"),
        ("/", "/"),
        ("/etc", "/etc"),
        ("", ""),
    ],
)
def test_a_path(path: str, guest: str) -> None:
    assert to_guest(path) == guest


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("\\\\server\\share\\x", "not on a drive"),
        ("//server/share/x", "not on a drive"),
        ("\\\\?\\UNC\\server\\share", "not on a drive"),
        ("\\\\.\\pipe\\docker", "not on a drive"),
        ("\\\\wsl$\\Debian\\home", "not on a drive"),
        ("C:x", "depends on the current"),
        ("\\x", "depends on the current"),
    ],
)
def test_a_path_that_is_refused(path: str, why: str) -> None:
    with pytest.raises(PathRefused, match=why) as refused:
        to_guest(path)
    assert path in str(refused.value)
    with pytest.raises(PathRefused):
        drives.of_container({"HostConfig": {"Binds": [f"{path}:/x"]}})


names = st.text(st.characters(exclude_characters="\\/", exclude_categories=["Cs"]), min_size=1)
parts = st.lists(names.filter(lambda name: name not in (".", "..")), max_size=4)


@given(st.sampled_from("ACZacz"), parts)
def test_there_and_back(letter: str, names: list[str]) -> None:
    path = f"{letter}:\\" + "\\".join(names)
    guest = to_guest(path)
    assert to_host(guest) == path[0].upper() + path[1:]
    assert to_guest(guest) == to_guest(to_host(guest)) == guest


@given(st.text(st.sampled_from("Cc:/\\.1 ?")))
def test_nothing_leads_above_a_drive(path: str) -> None:
    try:
        guest = to_guest(path)
    except PathRefused:
        return
    if guest != path:
        assert guest.startswith("/c")
        assert ".." not in guest.split("/")


def test_what_is_not_on_a_drive_is_not_the_hosts() -> None:
    for path in ("/etc", "/", "", "/cc/x", "c"):
        with pytest.raises(ValueError, match="not on a drive"):
            to_host(path)


@pytest.mark.parametrize(
    ("bind", "rewritten", "source"),
    [
        ("C:\\src:/src", "/c/src:/src", Source("/c/src", create=True)),
        ("C:\\src:/src:ro", "/c/src:/src:ro", Source("/c/src", read_only=True, create=True)),
        ("c:/src:/src:rw,z", "/c/src:/src:rw,z", Source("/c/src", create=True)),
        ("//c/src:/src", "/c/src:/src", Source("/c/src", create=True)),
        ("/c/src:/src", "/c/src:/src", Source("/c/src", create=True)),
        ("C:\\:/all", "/c:/all", Source("/c", create=True)),
        ("\\\\?\\C:\\src:/src", "/c/src:/src", Source("/c/src", create=True)),
        ("cache:/var/cache", "cache:/var/cache", None),
        ("/anonymous", "/anonymous", None),
    ],
)
def test_binds(bind: str, rewritten: str, source: Source | None) -> None:
    body = drives.of_container({"Image": "x", "HostConfig": {"Binds": [bind], "Other": 1}})
    assert body == {"Image": "x", "HostConfig": {"Binds": [rewritten], "Other": 1}}
    assert sources.of_container(body) == ([source] if source else [])


def test_mounts() -> None:
    """As Compose writes them, and ``docker run --mount``."""
    bound = {"type": "none", "o": "bind", "device": "D:\\data"}
    body = {
        "HostConfig": {
            "Mounts": [
                {"Type": "bind", "Source": "C:\\src", "Target": "/src", "ReadOnly": True},
                {"Type": "volume", "Source": "named", "Target": "/v"},
                {"Type": "tmpfs", "Target": "/t"},
                {
                    "Type": "volume",
                    "Source": "made",
                    "VolumeOptions": {"DriverConfig": {"Options": bound}},
                },
                {
                    "Type": "volume",
                    "VolumeOptions": {"DriverConfig": {"Name": "nfs", "Options": bound}},
                },
                "nonsense",
            ]
        }
    }
    rewritten = drives.of_container(body)
    assert sources.of_container(rewritten) == [Source("/c/src", read_only=True), Source("/d/data")]
    mounts = rewritten["HostConfig"]["Mounts"]
    # Another driver's options are its own.
    assert [mounts[index] for index in (1, 2, 4, 5)] == [
        body["HostConfig"]["Mounts"][index] for index in (1, 2, 4, 5)
    ]
    assert bound["device"] == "D:\\data", "what came is not changed"


def test_volumes() -> None:
    options = {"type": "none", "o": "bind,ro", "device": "C:/data"}
    made = drives.of_volume({"Name": "v", "DriverOpts": options})
    assert sources.of_volume(made) == [Source("/c/data", read_only=True)]
    for body in (
        {"Name": "v"},
        {"Name": "v", "Driver": "other", "DriverOpts": options},
        {"DriverOpts": {"type": "tmpfs", "device": "tmpfs"}},
        {"DriverOpts": None},
    ):
        assert {key: value for key, value in drives.of_volume(body).items() if value} == {
            key: value for key, value in body.items() if value
        }


@pytest.mark.parametrize("body", [{}, {"HostConfig": None}, {"HostConfig": {"Binds": None}}])
def test_what_is_not_there_is_not_made(body: dict[str, object]) -> None:
    assert drives.of_container(body) == body
