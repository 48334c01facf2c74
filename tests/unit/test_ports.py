"""Which forwards containers ask for, and which way each takes; no sockets."""

from __future__ import annotations

from typing import Any

import pytest

from wherry.ports.desired import (
    Choice,
    Forward,
    Owner,
    host_network,
    listening,
    planned,
    running,
)
from wherry.ports.reconcile import Changes, Route, reconcile, route

WEB = Owner("abc", "web", 80)


def port(private: int, public: int | None, ip: str = "", protocol: str = "tcp") -> dict[str, Any]:
    found: dict[str, Any] = {"PrivatePort": private, "Type": protocol}
    return found | ({"PublicPort": public, "IP": ip} if public else {})


def listed(*ports: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"Id": "abc", "Names": ["/web"], "Ports": list(ports), **more}


def inspected(bindings: Any, **settings: Any) -> dict[str, Any]:
    settings = {"NetworkMode": "bridge", "PortBindings": bindings, **settings}
    return {"Id": "abc", "Name": "/web", "HostConfig": settings}


def test_what_runs_tells_its_ports() -> None:
    found = running(
        [
            listed(
                port(80, 8080, "0.0.0.0"),
                port(80, 8080, "::"),
                port(53, 5353, "127.0.0.1", "udp"),
                port(443, None),
                port(99, 99, "0.0.0.0", "sctp"),
            ),
            listed(),
        ]
    )
    assert found == {
        Forward("tcp", "0.0.0.0", 8080): WEB,
        Forward("tcp", "::", 8080): WEB,
        Forward("udp", "127.0.0.1", 5353): Owner("abc", "web", 53),
    }


@pytest.mark.parametrize(
    ("binding", "addresses"),
    [
        ({"HostIp": "", "HostPort": "8080"}, ["0.0.0.0", "::"]),
        ({"HostPort": "8080"}, ["0.0.0.0", "::"]),
        ({"HostIp": "0.0.0.0", "HostPort": "8080"}, ["0.0.0.0"]),
        ({"HostIp": "::", "HostPort": "8080"}, ["::"]),
        ({"HostIp": "::0001", "HostPort": "8080"}, ["::1"]),
        ({"HostIp": "192.168.1.7", "HostPort": "8080"}, ["192.168.1.7"]),
        ({"HostIp": "localhost", "HostPort": "8080"}, []),
    ],
)
def test_what_will_be_published(binding: dict[str, str], addresses: list[str]) -> None:
    plan = planned(inspected({"80/tcp": [binding]}))
    assert plan.fixed == {Forward("tcp", each, 8080): WEB for each in addresses}
    assert plan.chosen == set()


@pytest.mark.parametrize(
    ("asked", "first", "last"), [("", 32768, 60999), ("0", 32768, 60999), ("8000-8010", 8000, 8010)]
)
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_ports_that_the_engine_chooses_are_not_known_before(
    asked: str, first: int, last: int, protocol: str
) -> None:
    plan = planned(inspected({f"80/{protocol}": [{"HostIp": "", "HostPort": asked}]}))
    assert plan == ({}, {Choice(protocol, first, last)})


def test_publishing_all_lets_the_engine_choose() -> None:
    plan = planned(inspected(None, PublishAllPorts=True))
    assert plan == ({}, {Choice("tcp", 32768, 60999), Choice("udp", 32768, 60999)})


@pytest.mark.parametrize("mode", ["host", "none", "container:xyz"])
def test_networks_without_ports_publish_nothing(mode: str) -> None:
    bindings = {"80/tcp": [{"HostPort": "8080"}]}
    assert planned(inspected(bindings, NetworkMode=mode)) == ({}, set())


def test_sctp_is_left_to_the_engine() -> None:
    assert planned(inspected({"80/sctp": [{"HostPort": "8080"}]})) == ({}, set())


def test_containers_on_the_host_s_network() -> None:
    found = [listed(HostConfig={"NetworkMode": "host"}), listed(HostConfig={"NetworkMode": "x"})]
    assert host_network(found) == {"abc": "web"}


def test_listeners_that_mean_the_same_on_the_host() -> None:
    found = listening(
        [
            ("abc", "tcp", "0.0.0.0", 1),
            ("abc", "tcp", "::", 2),
            ("abc", "udp", "127.0.0.1", 3),
            ("abc", "tcp", "::1", 4),
            ("abc", "tcp", "172.17.0.1", 5),
            ("other", "tcp", "0.0.0.0", 6),
        ],
        {"abc": "web"},
    )
    assert {(each.protocol, each.address, each.port) for each in found} == {
        ("tcp", "0.0.0.0", 1),
        ("tcp", "0.0.0.0", 2),
        ("tcp", "::", 2),
        ("udp", "127.0.0.1", 3),
        ("tcp", "::1", 4),
    }
    assert found[Forward("tcp", "0.0.0.0", 1)] == Owner("abc", "web", 1, host_network=True)


@pytest.mark.parametrize(
    ("address", "others", "way"),
    [
        ("0.0.0.0", [], Route("hostfwd")),
        ("127.0.0.1", [], Route("hostfwd", "127.0.0.1")),
        ("192.168.1.7", [], Route("hostfwd", "192.168.1.7")),
        ("::", ["0.0.0.0"], Route("relay")),
        ("::1", ["127.0.0.1"], Route("relay")),
        ("::", ["192.168.1.7"], Route("tunnel", "::1")),
        ("::1", [], Route("tunnel", "::1")),
        ("fd00::7", [], Route("tunnel", "fd00::7")),
    ],
)
def test_the_way_of_a_forward(address: str, others: list[str], way: Route) -> None:
    wanted = {Forward("tcp", each, 8080): WEB for each in [address, *others]}
    assert route(Forward("tcp", address, 8080), wanted) == way


def test_a_relay_never_leads_to_another_container() -> None:
    six = Forward("tcp", "::1", 8080)
    wanted = {six: WEB, Forward("tcp", "127.0.0.1", 8080): Owner("xyz", "other", 80)}
    assert route(six, wanted) == Route("tunnel", "::1")


def test_what_is_made_and_removed() -> None:
    stays = Forward("tcp", "0.0.0.0", 1)
    moved = Forward("tcp", "127.0.0.1", 2)
    gone = Forward("tcp", "0.0.0.0", 3)
    four, six = Forward("tcp", "0.0.0.0", 9), Forward("tcp", "::", 9)
    present = {stays: Route("hostfwd"), moved: Route("hostfwd"), gone: Route("hostfwd")}
    changes = reconcile({six: WEB, four: WEB, stays: WEB, moved: WEB}, present)
    assert changes.remove == (gone, moved)
    assert changes.add == (
        (four, Route("hostfwd")),
        (moved, Route("hostfwd", "127.0.0.1")),
        (six, Route("relay")),
    )


def test_a_relay_goes_with_what_it_leads_to() -> None:
    four, six = Forward("tcp", "0.0.0.0", 9), Forward("tcp", "::", 9)
    wanted = {four: WEB, six: WEB}
    both = {four: Route("hostfwd"), six: Route("relay")}
    assert reconcile(wanted, both) == Changes((), ())
    for present in ({six: Route("relay")}, {**both, four: Route("hostfwd", "127.0.0.1")}):
        changes = reconcile(wanted, present)
        assert six in changes.remove
        assert changes.add == ((four, Route("hostfwd")), (six, Route("relay")))


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        (Forward("tcp", "0.0.0.0", 1), Forward("tcp", "127.0.0.1", 1), True),
        (Forward("tcp", "127.0.0.1", 1), Forward("tcp", "127.0.0.1", 1), True),
        (Forward("tcp", "127.0.0.1", 1), Forward("tcp", "127.0.0.2", 1), False),
        (Forward("tcp", "0.0.0.0", 1), Forward("tcp", "::", 1), False),
        (Forward("tcp", "::", 1), Forward("tcp", "::1", 1), True),
        (Forward("tcp", "0.0.0.0", 1), Forward("udp", "0.0.0.0", 1), False),
    ],
)
def test_which_forwards_cannot_both_be(one: Forward, other: Forward, overlap: bool) -> None:
    assert one.overlaps(other) is overlap
    assert other.overlaps(one) is overlap


def test_a_forward_reads_as_docker_writes_it() -> None:
    assert str(Forward("tcp", "::1", 80)) == "[::1]:80/tcp"
    assert str(Forward("udp", "0.0.0.0", 53)) == "0.0.0.0:53/udp"
