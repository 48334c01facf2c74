"""The engine's settings: how they are written, what a change of them means, who refuses it."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from wherry.config import engine_keys
from wherry.config.layout import Layout, MachinePaths
from wherry.config.load import edit, load, parse, read_values, split_key
from wherry.config.model import build
from wherry.core.errors import ConfigError, UsageError, WherryError
from wherry.service.engine_settings import EngineSettings, changed, spare_containers, wanted

HERE = Path("config.toml")


@pytest.mark.parametrize(
    ("key", "word", "value"),
    [
        ("debug", "true", True),
        ("mtu", "1400", 1400),
        ("log-driver", "local", "local"),
        ("log-level", "", ""),
        ("dns", "1.1.1.1", ["1.1.1.1"]),
        ("dns", "['1.1.1.1', '::1']", ["1.1.1.1", "::1"]),
        ("insecure-registries", "a:5000, b:5000,", ["a:5000", "b:5000"]),
        ("insecure-registries", "'a:5000'", ["a:5000"]),
        ("insecure-registries", "[]", []),
        ("labels", "7", ["7"]),
        ("log-opts", "{max-size = '10m'}", {"max-size": "10m"}),
        ("log-opts.max-size", "10m", "10m"),
        ("log-opts.max-file", "3", "3"),
        ("log-opts.max-file", "'3'", "3"),
        ("builder.gc.enabled", "true", True),
        (
            "default-address-pools",
            "[{base = '10.9.0.0/16', size = 24}]",
            [{"base": "10.9.0.0/16", "size": 24}],
        ),
        ('default-network-opts.bridge."com.docker.network.driver.mtu"', "1400", "1400"),
        # What TOML knows and JSON does not is a text.
        ("log-level", "1979-05-27", "1979-05-27"),
        ("log-level", "nan", "nan"),
    ],
)
def test_a_word_of_the_command_line_is_the_value_that_is_meant(
    key: str, word: str, value: Any, tmp_path: Path
) -> None:
    path = tmp_path / "config.toml"
    edit(path, {f"engine.{key}": word})
    found: Any = read_values(path)["engine"]
    for part in split_key(f"engine.{key}")[1:]:
        found = found[part]
    assert found == value
    assert type(found) is type(value)
    edit(path, {f"engine.{key}": None})
    assert read_values(path) == {}
    assert path.read_text().strip() == ""


def test_what_is_beside_a_key_stays_when_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    edit(path, {"engine.log-opts.max-size": "1m", "engine.log-opts.max-file": "2"})
    edit(path, {"engine.log-opts.max-size": None, "engine.log-opts.absent": None})
    assert read_values(path) == {"engine": {"log-opts": {"max-file": "2"}}}


@pytest.mark.parametrize(
    "key", ["engine.", "engine.a..b", "engine.a b", "engine.a = 1\nb", "engine.'"]
)
def test_what_is_no_key_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no key"):
        edit(tmp_path / "config.toml", {key: "1"})


def test_a_key_below_what_is_no_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    edit(path, {"engine.mtu": "1400"})
    with pytest.raises(UsageError, match="x cannot be set in what is no table"):
        edit(path, {"engine.mtu.x": "1"})


@pytest.mark.parametrize("key", sorted(engine_keys.OWNED))
def test_what_is_ours_cannot_be_set(key: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    with pytest.raises(UsageError, match=f"{key} cannot be set: .+"):
        edit(path, {f"engine.{key}": "x"})
    with pytest.raises(ConfigError, match=rf"config.toml:1: engine: {key} cannot be set"):
        parse(f"[engine]\n{key} = 'x'", HERE)
    edit(path, {f"engine.{key}": None})


def test_what_json_cannot_hold_is_refused() -> None:
    for value in ("1979-05-27", "[nan]", "{a = inf}"):
        with pytest.raises(ConfigError, match="that daemon"):
            parse(f"engine.x = {value}", HERE)


def test_the_proxies_are_a_part_of_it() -> None:
    assert wanted({"debug": True}, {}) == {"debug": True}
    assert wanted({"debug": True}, {"http-proxy": "http://p"}) == {
        "debug": True,
        "proxies": {"http-proxy": "http://p"},
    }


def test_containers_are_spared_what_they_cannot_live_through() -> None:
    old = {"bip": "10.1.0.1/24", "mtu": 1400, "debug": True, "dns": ["1.1.1.1"]}
    new = {"mtu": 1300, "debug": False, "dns": ["1.1.1.1"], "ipv6": True, "labels": ["a=b"]}
    assert changed(old, new) == {"bip", "mtu", "debug", "ipv6", "labels"}
    now, later = spare_containers(old, new)
    assert later == {"bip", "mtu", "ipv6"}
    assert now == {
        "bip": "10.1.0.1/24",
        "mtu": 1400,
        "debug": False,
        "dns": ["1.1.1.1"],
        "labels": ["a=b"],
    }
    assert spare_containers(new, new) == (new, set())


class FakeGuest:
    """An engine that may have containers, and refuses ``no-such-key``."""

    def __init__(self) -> None:
        self.containers = False
        self.has: list[dict[str, Any]] = []

    def set_engine(self, settings: str, *, live: bool) -> tuple[bool, str]:
        table = json.loads(settings)
        if "no-such-key" in table:
            raise WherryError("it says http://me:s3cret@host no")
        if self.containers and not live:
            return False, ""
        self.has.append(table)
        return True, "a note"


@pytest.fixture
def guest() -> FakeGuest:
    return FakeGuest()


@pytest.fixture
def settings(paths: MachinePaths, layout: Layout, guest: FakeGuest) -> EngineSettings:
    made = EngineSettings(paths)
    made.write(build({"engine": {"debug": True}}, layout.platform))
    made.attach(guest)  # type: ignore[arg-type]
    return made


def given(settings: EngineSettings) -> Any:
    return json.loads(settings.file.read_text())


def test_a_guest_that_boots_is_given_a_private_file(settings: EngineSettings) -> None:
    assert given(settings) == {"debug": True}
    assert settings.file.stat().st_mode & 0o777 == 0o600


def test_a_change_is_applied_and_remembered(settings: EngineSettings, guest: FakeGuest) -> None:
    settings.warning = "of the boot"
    proxies = {"http-proxy": "http://p:1"}
    done = settings._change({"mtu": 1300}, proxies)
    assert done == {"keys": ["debug", "mtu", "proxies"], "later": [], "note": "a note"}
    assert guest.has == [{"mtu": 1300, "proxies": proxies}]
    assert given(settings) == guest.has[-1]
    assert settings.warning == ""
    # A change of something else leaves the proxies as they are.
    settings._change({"mtu": 1400}, None)
    assert guest.has[-1] == {"mtu": 1400, "proxies": proxies}
    assert settings._change({"mtu": 1400}, None)["keys"] == []
    assert len(guest.has) == 2
    settings._change({"mtu": 1400}, {})
    assert guest.has[-1] == {"mtu": 1400}


def test_what_is_refused_changes_nothing(settings: EngineSettings, guest: FakeGuest) -> None:
    with pytest.raises(WherryError, match=r"it says http://\*\*\*@host no"):
        settings._change({"no-such-key": 1}, {})
    assert given(settings) == {"debug": True}
    settings.wait()  # who waits for the engine goes on


def test_what_would_stop_containers_waits_for_the_next_start(
    settings: EngineSettings, guest: FakeGuest
) -> None:
    guest.containers = True
    done = settings._change({"debug": True, "mtu": 1300}, {})
    assert (done["keys"], done["later"], guest.has) == (["mtu"], ["mtu"], [])
    assert given(settings) == {"debug": True}
    done = settings._change({"debug": False, "mtu": 1300}, {})
    assert (done["keys"], done["later"]) == (["debug", "mtu"], ["mtu"])
    assert guest.has == [{"debug": False}]
    assert given(settings) == {"debug": False}


@pytest.mark.parametrize("containers", [False, True])
def test_an_engine_starts_anew_with_what_it_has(
    settings: EngineSettings, guest: FakeGuest, containers: bool
) -> None:
    """What it reads only when it starts is not in its settings: certificates."""
    guest.containers = containers
    assert settings.renew()
    assert guest.has == [given(settings)] == [{"debug": True}]


def test_clients_of_the_engine_wait_while_it_starts(
    settings: EngineSettings, guest: FakeGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, through = threading.Event(), threading.Event(), threading.Event()

    def slow(settings: str, *, live: bool) -> tuple[bool, str]:
        begun.set()
        assert go_on.wait(10)
        return True, ""

    monkeypatch.setattr(guest, "set_engine", slow)
    change = threading.Thread(target=settings._change, args=({"mtu": 1300}, None))
    change.start()
    assert begun.wait(10)
    client = threading.Thread(target=lambda: (settings.wait(), through.set()))
    client.start()
    assert not through.wait(0.05)
    go_on.set()
    assert through.wait(10)
    change.join(10)
    client.join(10)


def test_a_machine_without_an_agent_says_so(paths: MachinePaths) -> None:
    with pytest.raises(WherryError, match="is not running yet"):
        EngineSettings(paths)._change({}, None)
    with pytest.raises(WherryError, match="is not running yet"):
        EngineSettings(paths).renew()


def test_settings_are_what_the_file_says(tmp_path: Path, layout: Layout) -> None:
    path = tmp_path / "config.toml"
    path.write_text("[engine.log-opts]\nmax-size = '1m'\n[engine]\ndebug = true\n")
    assert load(path, layout.platform).engine == {"log-opts": {"max-size": "1m"}, "debug": True}
