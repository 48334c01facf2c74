"""Which paths of the host a request is about."""

from __future__ import annotations

from typing import Any

import pytest

from wherry.sync.sources import Source, of_container, of_inspected, of_volume, volumes_of


def container(**host_config: Any) -> dict[str, Any]:
    return {"Image": "busybox", "HostConfig": host_config}


@pytest.mark.parametrize(
    ("bind", "expected"),
    [
        ("/a:/b", [Source("/a", create=True)]),
        ("/a:/b:ro", [Source("/a", read_only=True, create=True)]),
        ("/a:/b:z,ro", [Source("/a", read_only=True, create=True)]),
        ("/a/../c//d/./:/b", [Source("/c/d", create=True)]),
        ("/../..:/b", [Source("/", create=True)]),
        ("/with:/colon:rw", [Source("/with", create=True)]),
        ("name:/b", []),
        ("/only-a-target", []),
    ],
)
def test_binds(bind: str, expected: list[Source]) -> None:
    assert of_container(container(Binds=[bind])) == expected


def test_mounts() -> None:
    mounts = [
        {"Type": "bind", "Source": "/a", "Target": "/t"},
        {"Type": "bind", "Source": "/b", "ReadOnly": True},
        {"Type": "bind", "Source": "/c", "BindOptions": {"CreateMountpoint": True}},
        {"Type": "tmpfs", "Target": "/t"},
        {"Type": "volume", "Source": "name"},
        {
            "Type": "volume",
            "VolumeOptions": {
                "DriverConfig": {"Options": {"type": "none", "o": "bind", "device": "/d"}}
            },
        },
    ]
    assert of_container(container(Mounts=mounts)) == [
        Source("/a"),
        Source("/b", read_only=True),
        Source("/c", create=True),
        Source("/d"),
    ]


def test_one_writable_mount_of_a_path_makes_it_writable() -> None:
    found = of_container(container(Binds=["/a:/x:ro", "/a:/y"]))
    assert found == [Source("/a", create=True)]


def test_volumes() -> None:
    options = {"type": "none", "o": "rbind,ro", "device": "/d"}
    assert of_volume({"Name": "v", "DriverOpts": options}) == [Source("/d", read_only=True)]
    assert of_volume({"Name": "v", "Driver": "nfs", "DriverOpts": options}) == []
    assert of_volume({"DriverOpts": {"type": "tmpfs", "o": "size=1m", "device": "tmpfs"}}) == []
    body = container(Binds=["v:/v", "/a:/b"], Mounts=[{"Type": "volume", "Source": "w"}])
    assert volumes_of(body) == ["v", "w"]


def test_an_inspection() -> None:
    mounts = [
        {"Type": "bind", "Source": "/a", "RW": True},
        {"Type": "bind", "Source": "/b", "RW": False},
        {"Type": "volume", "Name": "v", "Source": "/var/lib/docker/volumes/v/_data"},
    ]
    assert of_inspected({"Mounts": mounts}) == [Source("/a"), Source("/b", read_only=True)]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"HostConfig": None},
        {"HostConfig": {"Binds": None, "Mounts": None}},
        {"HostConfig": {"Binds": "x", "Mounts": {"a": 1}}},
        {"HostConfig": {"Binds": [1, None, {}], "Mounts": [1, None, {"Type": "bind"}]}},
    ],
)
def test_what_the_engine_will_refuse_is_left_to_it(body: dict[str, Any]) -> None:
    assert of_container(body) == []
    assert volumes_of(body) in ([], ["1", "None", "{}"])


def test_fields_are_found_in_any_case_as_go_finds_them() -> None:
    body = {
        "hostconfig": {
            "binds": ["/home/u/src:/src:ro", "cache:/c"],
            "MOUNTS": [
                {"type": "bind", "source": "/home/u/x", "readonly": True},
                {
                    "Type": "volume",
                    "volumeoptions": {
                        "driverconfig": {"options": {"o": "bind", "device": "/home/u/y"}}
                    },
                },
            ],
        }
    }
    assert of_container(body) == [
        Source("/home/u/src", read_only=True, create=True),
        Source("/home/u/x", read_only=True),
        Source("/home/u/y"),
    ]
    assert volumes_of(body) == ["cache"]
    assert of_volume({"driveropts": {"o": "bind", "device": "/home/u/z"}}) == [Source("/home/u/z")]
