"""Proxies: which ones, as the guest has to call them, and who else gets to see them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from wherry.config import proxy
from wherry.config.layout import Layout, MachinePaths
from wherry.config.model import Config, ProxySettings, build
from wherry.core.errors import WherryError
from wherry.service import console, docker_proxies, proxies

OURS = "localhost,127.0.0.1,::1,host.docker.internal,gateway.docker.internal,10.0.2.2"


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://p:3128", "http://p:3128"),
        ("p:3128", "http://p:3128"),
        ("https://a:b%40c@p", "https://a:b%40c@p"),
        ("socks5://[::1]:1080", "socks5://[::1]:1080"),
        ("auto", "auto"),
        ("", ""),
    ],
)
def test_what_an_address_is(text: str, url: str) -> None:
    assert proxy.parse(text) == url


@pytest.mark.parametrize(
    "text",
    ["http://", "ftp://p", "http://p:x", "http://p:0", "http://p:99999", "http://a b", "//p",
     "http://me:s3cret@", "http://me:s3cret@p:x", "me:s3cret@p q"],
)  # fmt: skip
def test_what_is_none_is_refused_without_its_password(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        proxy.parse(text)
    assert "is not the address of a proxy" in str(caught.value)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("http://me:s3cret@p:1/", "http://***@p:1/"),
        ("a http://s3cret@p and https://b:c@q.", "a http://***@p and https://***@q."),
        ("http://me:p@ss@p", "http://***@p"),
        ("http://p/a@b", "http://p/a@b"),
        ("auto", "auto"),
    ],
)
def test_credentials_are_masked(text: str, masked: str) -> None:
    assert proxy.mask(text) == masked


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ("http://localhost:3128", "http://10.0.2.2:3128"),
        ("http://127.0.0.1:3128/", "http://10.0.2.2:3128/"),
        ("http://127.8.9.1", "http://10.0.2.2"),
        ("socks5://[::1]:1080", "socks5://10.0.2.2:1080"),
        ("http://me:p%40ss@localhost:1", "http://me:p%40ss@10.0.2.2:1"),
        ("http://LOCALHOST:1", "http://10.0.2.2:1"),
        ("http://localhost.example:1", "http://localhost.example:1"),
        ("http://10.1.2.3:1", "http://10.1.2.3:1"),
        ("http://[fe80::1]:1", "http://[fe80::1]:1"),
    ],
)
def test_this_computer_has_another_address_in_the_guest(given: str, seen: str) -> None:
    found = proxies.for_guest(ProxySettings(http=given, https=""), {})
    assert found == {"http": seen, "no_proxy": OURS}


def test_auto_is_what_the_system_has() -> None:
    present = {"http": "p:1", "https": "http://localhost:2", "no": "a, .b,", "ftp": "http://f"}
    assert proxies.for_guest(ProxySettings(), present) == {
        "http": "http://p:1",
        "https": "http://10.0.2.2:2",
        "no_proxy": f"a,.b,{OURS}",
    }
    assert proxies.for_guest(ProxySettings(), {}) == {}
    assert proxies.for_guest(ProxySettings(), {"no": "a"}) == {}
    assert proxies.for_guest(ProxySettings(), {"http": "no address"}) == {}
    assert proxies.for_guest(ProxySettings(http="", https=""), present) == {}


def test_settings_go_before_the_system() -> None:
    settings = ProxySettings(http="http://mine:1", no_proxy="10.0.2.2,x")
    assert proxies.for_guest(settings, {"http": "http://p:1", "no": "a"}) == {
        "http": "http://mine:1",
        "no_proxy": f"10.0.2.2,x,{OURS.removesuffix(',10.0.2.2')}",
    }


def test_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://env:1")
    monkeypatch.setenv("no_proxy", "x")
    found = proxies.for_guest(ProxySettings(), proxies.system())
    assert proxies.for_engine(found)["https-proxy"] == "http://env:1"
    assert proxies.for_clients(found)["noProxy"] == f"x,{OURS}"


HTTP = {"httpProxy": "http://p:1", "noProxy": OURS}


def config(layout: Layout, on: bool = True, address: str = "http://p:1") -> Config:
    values = {"proxy.http": address, "proxy.https": "", "proxy.containers": on}
    return build(values, layout.platform)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "docker").mkdir()
    return tmp_path / "docker" / "config.json"


def written(file: Path) -> Any:
    return json.loads(file.read_text())


def test_the_docker_cli_gets_them_and_loses_them_again(
    layout: Layout, paths: MachinePaths, file: Path
) -> None:
    others = {"auths": {"r": {"auth": "x"}}, "proxies": {"default": {"httpProxy": "http://d"}}}
    file.write_text(json.dumps(others))
    docker_proxies.update(paths, config(layout), {})
    endpoint = f"unix://{paths.docker_socket}"
    assert written(file) == {
        "auths": others["auths"],
        "proxies": {**others["proxies"], endpoint: HTTP},
    }
    docker_proxies.update(paths, config(layout, address="http://q:2"), {})
    assert written(file)["proxies"][endpoint]["httpProxy"] == "http://q:2"
    docker_proxies.update(paths, config(layout, on=False), {})
    assert written(file) == others


def test_nothing_is_left_of_them(layout: Layout, paths: MachinePaths, file: Path) -> None:
    docker_proxies.update(paths, config(layout), {})
    docker_proxies.remove(paths)
    assert written(file) == {}
    before = file.stat().st_mtime_ns
    docker_proxies.update(paths, config(layout, on=False), {})
    docker_proxies.remove(paths)
    assert file.stat().st_mtime_ns == before


def test_the_user_s_own_stay(layout: Layout, paths: MachinePaths, file: Path) -> None:
    theirs = {"proxies": {f"unix://{paths.docker_socket}": {"httpProxy": "http://mine"}}}
    file.write_text(json.dumps(theirs))
    docker_proxies.update(paths, config(layout, on=False), {})
    with pytest.raises(WherryError, match="are not those that wherry wrote"):
        docker_proxies.update(paths, config(layout), {})
    docker_proxies.remove(paths)
    assert written(file) == theirs


def test_what_the_guest_warns_of() -> None:
    text = "wherry: init\r\nwherry: warning: one \x1b[31m\r\nx\r\nwherry: warning: two\r\n"
    assert console.warnings(text) == "one [31m; two"
    assert console.warnings("wherry: warning: not yet who") == ""
