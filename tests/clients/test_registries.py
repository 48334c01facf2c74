"""Registries and proxies on this computer, and the engine's settings that lead to them.

Everything is given to the engine at once, while a container runs: dockerd starts anew for
it, which takes its time in emulation.
"""

from __future__ import annotations

import base64
import json
import os
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from docker_clients import Clients, write_tree
from loopback import free_port
from registries import PASSWORD, USER, Cutter, Server, registry, tinyproxy

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

BEHIND_PROXY = "registry.test"
AROUND_PROXY = "around.test"
LAYER_BYTES = 3 << 20
MTU_KEY = 'engine.default-network-opts.bridge."com.docker.network.driver.mtu"'


@pytest.fixture(scope="module")
def servers(
    tmp_path_factory: pytest.TempPathFactory, authority: trustme.CA
) -> Iterator[tuple[Server, Server, Server]]:
    """A registry with TLS and a password, one that is open, and a proxy."""
    directory = tmp_path_factory.mktemp("registries")
    with (
        registry(directory / "private", authority) as private,
        registry(directory / "open") as open_,
        tinyproxy(directory / "proxy", BEHIND_PROXY) as proxy,
    ):
        yield private, open_, proxy


@pytest.fixture(scope="module")
def cutter(servers: tuple[Server, Server, Server]) -> Iterator[Cutter]:
    """What leads to the open registry and breaks off."""
    made = Cutter(servers[1].port, after=LAYER_BYTES // 2, times=2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def engine(
    all_clients: Clients, servers: tuple[Server, Server, Server], cutter: Cutter
) -> Iterator[Clients]:
    """The engine, that knows the servers; a container has lived through its becoming so."""
    _, open_, proxy = servers
    clients, wherry = all_clients, all_clients.machine.wherry
    port = free_port()
    clients.docker(
        "run", "-d", "--name", "lives", "-p", f"{port}:80", "busybox",
        "sh", "-c", "mkdir /www; echo here >/www/index.html; exec httpd -f -h /www",
    )  # fmt: skip
    started = clients.said("inspect", "lives", "--format", "{{.State.StartedAt}}")
    insecure = [open_.name, cutter.name, f"{BEHIND_PROXY}:{open_.port}"]
    done = wherry(
        "config", "set",
        "engine.insecure-registries", ",".join(insecure),
        "engine.registry-mirrors", f"http://{open_.name}",
        "engine.host-gateway-ips", "192.0.2.7",
        MTU_KEY, "1380",
        "proxy.http", f"http://someone:s3cret@localhost:{proxy.port}",
        "proxy.https", f"127.0.0.1:{proxy.port}",
        "proxy.no_proxy", AROUND_PROXY,
        "proxy.containers", "true",
    )  # fmt: skip
    try:
        assert b"containers went on" in done.stderr
        assert clients.said("inspect", "lives", "--format", "{{.State.StartedAt}}") == started
        assert clients.said("exec", "lives", "echo", "alive") == "alive"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20) as answer:
            assert answer.read() == b"here\n"
        clients.docker("rm", "-f", "lives")
        yield clients
    finally:
        wherry(
            "config", "unset", "engine.insecure-registries", "engine.registry-mirrors",
            "engine.host-gateway-ips", MTU_KEY, "proxy.http", "proxy.https", "proxy.no_proxy",
            "proxy.containers",
        )  # fmt: skip
    info = json.loads(clients.said("info", "--format", "{{json .}}"))
    assert not info.get("HTTPProxy")
    assert open_.name not in str(info["RegistryConfig"])
    assert "proxies" not in (clients.machine.docker_config / "config.json").read_text()


@pytest.fixture(scope="module")
def image(engine: Clients, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image of layers that are long on the way."""
    context = write_tree(
        tmp_path_factory.mktemp("image"),
        {"Dockerfile": "FROM busybox\nCOPY one /one\nCOPY two /two\n"},
    )
    for name in ("one", "two"):
        (context / name).write_bytes(os.urandom(LAYER_BYTES))
    # BuildKit would keep the layers in its cache, and nothing would be pulled.
    engine.docker("build", "-q", "-t", "layered", context, env={"DOCKER_BUILDKIT": "0"})
    return "layered"


def docker_config(clients: Clients) -> str:
    return (Path(clients.env["DOCKER_CONFIG"]) / "config.json").read_text()


def test_a_private_registry_and_whose_the_password_is(
    engine: Clients, servers: tuple[Server, Server, Server], image: str
) -> None:
    """The password stays on this computer, in the docker CLI's own store."""
    private = servers[0]
    name = f"{private.name}/team/app:1"
    engine.docker("tag", image, name)
    refused = engine.docker("push", name, check=False)
    assert b"no basic auth credentials" in refused.stderr
    engine.docker("login", "-u", USER, "--password-stdin", private.name, input=PASSWORD.encode())
    token = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    assert token in docker_config(engine)
    engine.docker("push", name)
    layers = engine.said("inspect", name, "--format", "{{json .RootFS.Layers}}")
    engine.docker("rmi", name, image)
    engine.docker("pull", name)
    assert engine.said("inspect", name, "--format", "{{json .RootFS.Layers}}") == layers
    assert engine.said("run", "--rm", name, "wc", "-c", "/one", "/two").count(str(LAYER_BYTES)) == 2
    kept = engine.guest(
        "find", "/etc", "/run", "/root", "/tmp", "/var/log", "/data", "-xdev",
        "-name", "overlay2", "-prune", "-o", "-type", "f",
        "-exec", "grep", "-lF", "-e", PASSWORD, "-e", token, "{}", "+", check=False,
    )  # fmt: skip
    assert kept == ""
    engine.docker("logout", private.name)
    assert token not in docker_config(engine)
    assert b"no basic auth credentials" in engine.docker("pull", name, check=False).stderr
    engine.docker("tag", name, image)


def test_a_pull_through_a_proxy(engine: Clients, servers: tuple[Server, Server, Server]) -> None:
    """Only the proxy knows where that registry is."""
    private, _, proxy = servers
    target = f"{BEHIND_PROXY}:{private.port}"
    engine.docker("login", "-u", USER, "--password-stdin", target, input=PASSWORD.encode())
    try:
        engine.docker("pull", f"{target}/team/app:1")
    finally:
        engine.docker("logout", target)
    assert re.search(rf"CONNECT {target} HTTP/1.1", proxy.said())
    # What is on this computer itself needs none.
    assert f"CONNECT {private.name}" not in proxy.said()


def test_a_pull_without_tls_asks_a_proxy(
    engine: Clients, servers: tuple[Server, Server, Server]
) -> None:
    """And is answered.

    Tinyproxy passes one of several ``Accept`` on, and the engine sends them in an order of
    chance, so the registry may have the manifest in another form than the one asked for.
    """
    _, open_, proxy = servers
    engine.docker("tag", "busybox", f"{open_.name}/plain:1")
    engine.docker("push", f"{open_.name}/plain:1")
    target = f"{BEHIND_PROXY}:{open_.port}"
    done = engine.docker("pull", f"{target}/plain:1", check=False)
    assert done.returncode == 0 or b"manifest unknown" in done.stderr
    assert f" http://{target}/v2/plain/manifests/1 " in proxy.said()
    engine.docker("rmi", f"{open_.name}/plain:1")


def test_what_needs_no_proxy_by_the_settings_is_not_asked_of_it(
    engine: Clients, servers: tuple[Server, Server, Server]
) -> None:
    done = engine.docker("pull", f"{AROUND_PROXY}/app:1", check=False)
    assert b"no such host" in done.stderr
    assert AROUND_PROXY not in servers[2].said()


def test_the_proxy_s_password_is_shown_nowhere(engine: Clients) -> None:
    machine = engine.machine
    shown = (
        machine.wherry("config", "show").stdout + machine.wherry("config", "show", "--json").stdout
    )
    assert b"***@localhost" in shown
    said = [
        shown.decode(),
        machine.wherry("status", "--json").stdout.decode(),
        machine.wherry("logs").stdout.decode(),
        machine.wherry("logs", "--source", "console").stdout.decode(),
        machine.wherry("logs", "--source", "engine").stdout.decode(),
        engine.said("info"),
    ]
    assert not [text for text in said if "s3cret" in text]
    assert "s3cret" in machine.wherry("config", "get", "proxy.http").stdout.decode()


def test_containers_and_builds_get_the_proxy(
    engine: Clients, servers: tuple[Server, Server, Server], tmp_path: Path
) -> None:
    """Where the docker CLI's configuration is the one that wherry wrote to."""
    machine, port = engine.machine, servers[2].port
    machine.docker("network", "create", "narrow")
    seen = machine.docker(
        "run", "--rm", "--network", "narrow", "busybox",
        "sh", "-c", "env; cat /sys/class/net/eth0/mtu",
    ).stdout.decode()  # fmt: skip
    machine.docker("network", "rm", "narrow")
    # The default bridge stays as it is while a container lives through the engine's start.
    started = engine.guest("sh", "-c", "xargs -0 </proc/$(pgrep -x dockerd)/cmdline")
    assert "dockerd" in started
    assert "mtu" not in started, "who sets anything of it sets all"
    assert f"https_proxy=http://10.0.2.2:{port}" in seen
    assert "host.docker.internal" in seen[seen.index("no_proxy=") :]
    assert seen.endswith("\n1380\n"), "the settings give networks their MTU"
    write_tree(tmp_path, {"Dockerfile": 'FROM busybox\nRUN echo "through $https_proxy"\n'})
    built = machine.docker("build", "--no-cache", str(tmp_path))
    assert f"through http://10.0.2.2:{port}".encode() in built.stdout + built.stderr


def test_host_gateway_is_what_the_settings_say(engine: Clients) -> None:
    said = engine.said(
        "run", "--rm", "--add-host", "me:host-gateway", "busybox", "cat", "/etc/hosts"
    )
    assert re.search(r"^192\.0\.2\.7\s+me$", said, re.MULTILINE)
    assert "10.0.2.2" not in said


def test_what_cannot_be_searched_says_so(
    engine: Clients, servers: tuple[Server, Server, Server]
) -> None:
    """A registry of today has no search; the engine's own words come through."""
    done = engine.docker("search", f"{servers[1].name}/app", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(b"Error response from daemon: ")
    assert b"404" in done.stderr


def test_a_mirror_is_asked_first(
    engine: Clients, servers: tuple[Server, Server, Server], image: str
) -> None:
    name = f"{servers[1].name}/library/mirrored:1"
    engine.docker("tag", image, name)
    engine.docker("push", name)
    engine.docker("rmi", name)
    engine.docker("pull", "mirrored:1")
    engine.docker("rmi", "mirrored:1")


def test_a_pull_that_breaks_off_goes_on_where_it_was(
    engine: Clients, servers: tuple[Server, Server, Server], cutter: Cutter, image: str
) -> None:
    open_ = servers[1]
    engine.docker("tag", image, f"{open_.name}/cut:1")
    engine.docker("push", f"{open_.name}/cut:1")
    layers = engine.said("inspect", image, "--format", "{{json .RootFS.Layers}}")
    # By its id, with all its names: nothing of it is there any more.
    engine.docker("rmi", "-f", engine.said("inspect", image, "--format", "{{.Id}}"))
    engine.docker("pull", f"{cutter.name}/cut:1")
    pulled = engine.said("inspect", f"{cutter.name}/cut:1", "--format", "{{json .RootFS.Layers}}")
    assert pulled == layers
    assert cutter.left <= 0, "nothing was cut"
    # RFC 9110, 15.3.7: a part of the contents was asked for and sent.
    assert re.search(r'"GET /v2/cut/blobs/\S+ HTTP/1.1" 206 ', open_.said())


def test_a_dead_proxy_is_named_and_stops_nobody_else(
    engine: Clients, servers: tuple[Server, Server, Server]
) -> None:
    private, open_, proxy = servers
    engine.docker("tag", "busybox", f"{open_.name}/beside:1")
    proxy.process.terminate()
    proxy.process.wait(10)
    # Asked at all, it is asked now: what is known of the other registry needs no proxy.
    done = engine.docker("pull", f"{BEHIND_PROXY}:{private.port}/other:1", check=False, timeout=60)
    assert f"10.0.2.2:{proxy.port}: connect: connection refused".encode() in done.stderr
    engine.docker("push", f"{open_.name}/beside:1")
    engine.docker("rmi", f"{open_.name}/beside:1")


def test_what_the_engine_refuses_changes_nothing(engine: Clients) -> None:
    machine = engine.machine
    config = machine.home / "machines" / "default" / "config.toml"
    before = config.read_text()
    started = engine.guest("pgrep", "-x", "dockerd")
    for key, value, said in (
        ("engine.no-such-key", "1", b"don't match any configuration option: no-such-key"),
        ("engine.log-level", "loud", b"invalid logging level: loud"),
        ("engine.mtu", "much", b"cannot unmarshal string into Go struct field Config.mtu"),
    ):
        done = machine.wherry("config", "set", key, value, check=False)
        assert done.returncode == 1
        assert said in done.stderr
        assert done.stderr.count(b"\n") == 1
    assert config.read_text() == before
    assert engine.guest("pgrep", "-x", "dockerd") == started


def test_what_it_refuses_when_it_starts_is_taken_back(
    engine: Clients, servers: tuple[Server, Server, Server]
) -> None:
    """dockerd finds some mistakes only then; its containers live through both starts."""
    machine = engine.machine
    config = machine.home / "machines" / "default" / "config.toml"
    before = config.read_text()
    engine.docker("run", "-d", "--name", "lives", "busybox", "sleep", "3600")
    started = engine.said("inspect", "lives", "--format", "{{.State.StartedAt}}")
    done = machine.wherry("config", "set", "engine.seccomp-profile", "/no/such", check=False)
    assert done.returncode == 1
    assert b"opening seccomp profile (/no/such) failed" in done.stderr
    assert config.read_text() == before
    # On the old ones, all of them, and with nothing of the new.
    info = json.loads(engine.said("info", "--format", "{{json .}}"))
    assert info["HttpProxy"].endswith(f":{servers[2].port}")
    assert info["RegistryConfig"]["Mirrors"] == [f"http://{servers[1].name}/"]
    assert f"{servers[1].name}" in info["RegistryConfig"]["IndexConfigs"]
    assert not [each for each in info["SecurityOptions"] if "/no/such" in each]
    assert engine.said("inspect", "lives", "--format", "{{.State.StartedAt}}") == started
    assert engine.said("exec", "lives", "echo", "alive") == "alive"
    engine.docker("rm", "-f", "lives")
