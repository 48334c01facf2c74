"""``endpoint.default_socket`` through the command line and a real service."""

from __future__ import annotations

import os
import socket

from fake_host import FakeHost, kill

KEY = "endpoint.default_socket"


def answers(host: FakeHost) -> bool:
    """Whether an engine answers where Docker clients look by default."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(host.default_socket))
        client.sendall(b"GET /_ping HTTP/1.1\r\nHost: d\r\nConnection: close\r\n\r\n")
        return client.recv(65536).startswith(b"HTTP/1.1 200")


def test_it_is_there_while_the_machine_runs(host: FakeHost) -> None:
    host.make()
    assert host.run("config", "set", KEY, "true").stderr == ""
    assert not os.path.lexists(host.default_socket)
    host.good("start")
    assert answers(host)
    status = host.status()["default_socket"]
    assert (status["path"], status["claimed"]) == (str(host.default_socket), True)
    assert str(host.default_socket) in host.good("status")
    host.good("restart")
    assert answers(host)
    host.good("stop")
    assert not os.path.lexists(host.default_socket)


def test_a_running_machine_takes_it_and_gives_it_back_at_once(host: FakeHost) -> None:
    host.good("start")
    assert not os.path.lexists(host.default_socket)
    host.good("config", "set", KEY, "true")
    assert answers(host)
    host.good("config", "unset", KEY)
    assert not os.path.lexists(host.default_socket)
    host.good("config", "set", KEY, "true")
    host.good("delete", "--yes")
    assert not os.path.lexists(host.default_socket)


def test_a_dead_service_s_link_goes_with_stop_by_force(host: FakeHost) -> None:
    host.make(**{KEY: "true"})
    host.good("start")
    kill(host.status()["service_pid"])
    host.good("stop", "--force")
    assert not os.path.lexists(host.default_socket)


def test_what_is_another_s_is_left_and_the_reason_is_shown(host: FakeHost) -> None:
    """The machine runs without it; when it is free, the next set takes it."""
    host.default_socket.write_text("another's")
    host.make()
    told = host.run("config", "set", KEY, "true")
    assert told.status == 0
    assert f"{host.default_socket} is another program's" in told.stderr
    assert host.good("config", "get", KEY) == "true\n"
    started = host.run("start")
    assert started.status == 0, started.stderr
    assert "is another program's" in started.stderr
    assert f"sudo rm {host.default_socket}" in started.stderr
    assert "is another program's" in host.good("status")
    assert "is another program's" in host.service_log()
    host.good("stop")
    assert host.default_socket.read_text() == "another's"


def test_of_two_machines_the_first_has_it(host: FakeHost) -> None:
    host.make(**{KEY: "true"})
    host.good("start")
    host.good("start", "other")
    told = host.run("config", "set", "--machine", "other", KEY, "true")
    assert f"leads to {host.paths.docker_socket}" in told.stderr
    host.good("stop", "other")
    assert answers(host)
    host.good("stop")
