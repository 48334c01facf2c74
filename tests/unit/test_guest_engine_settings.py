"""What the agent, and the guest's own scripts, do with other settings for the engine.

The scripts are the image's, with other paths in them; s6 and dockerd are stand-ins.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

if sys.platform != "linux":
    pytest.skip("the agent is for Linux", allow_module_level=True)

from wherry_guest import engine_settings
from wherry_guest.engine_settings import Refused, change

RECIPE = Path(__file__).parents[2] / "images/wherry_images/recipe/files/usr/lib/wherry"


@dataclass
class Guest:
    """A guest of files: dockerd refuses ``bad`` when it looks, ``late`` when it starts."""

    root: Path
    containers: int = 0
    swarm: str = "inactive"
    live_restore: bool = False
    stops: bool = True
    calls: list[str] = field(default_factory=list)

    @property
    def etc(self) -> Path:
        return self.root / "etc"

    def has(self, name: str = "daemon.json") -> Any:
        return json.loads((self.etc / name).read_text())

    def script(self, name: str) -> Path:
        """The image's script, at home in our directory."""
        text = (RECIPE / name).read_text()
        for there, here in (
            ("/etc/docker", self.etc),
            ("/dev/console", self.root / "console"),
            ("/run/", self.root),
            ("/var/log/dockerd/", self.root),
            ("exec /usr/lib/wherry/ended dockerd", "exit 0"),
        ):
            text = text.replace(there, f"{here}/" if there.endswith("/") else str(here))
        path = self.root / Path(name).name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def run(self, argv: list[str]) -> tuple[int, str]:
        """Stand in for the programs of the guest."""
        program, *arguments = argv
        if program == "dockerd":
            text = Path(arguments[-1]).read_text()
            assert Path(arguments[-1]).stat().st_mode & 0o077 == 0
            return (1, f"with file {arguments[-1]}: bad\n") if "bad" in text else (0, "")
        if program == "s6-svc":
            action = arguments[-2]
            self.calls.append(action)
            if action == "-h":
                self.live_restore = self.has().get("live-restore", False)
            elif action == "-u":
                self.start()
            return (0, "") if self.stops or action != "-d" else (99, "timed out")
        done = subprocess.run(argv, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    def start(self) -> None:
        """Start dockerd as s6 does: what ends before it has answered starts once more."""
        if "late" in self.has():
            (self.root / "current").write_text("first\nfailed: http://me:s3cret@host late\n")
            subprocess.run([self.script("services/dockerd/finish")], check=True)
        assert "late" not in self.has()
        self.live_restore = self.has().get("live-restore", False)
        if self.containers:
            assert self.live_restore, "the containers are gone"

    def info(self, socket: str, target: str, timeout_s: float) -> bytes:
        """Answer ``GET /info``."""
        assert (socket, target) == ("the socket", "/info")
        return json.dumps(
            {
                "ContainersRunning": self.containers,
                "LiveRestoreEnabled": self.live_restore,
                "Swarm": {"LocalNodeState": self.swarm},
            }
        ).encode()


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Guest:
    made = Guest(tmp_path)
    made.etc.mkdir()
    settings = made.script("settings")
    for name, value in {
        "_FILE": f"{made.etc}/daemon.json",
        "_TRIAL": f"{made.etc}/daemon.json.before",
        "_PROPOSED": f"{tmp_path}/proposed",
        "_REFUSED": f"{tmp_path}/dockerd.refused",
        "_SETTINGS": str(settings),
        "_RANDOMIZE": f"{tmp_path}/randomize",
        "_run": made.run,
        "_RELOAD_S": 0.2,
        "_POLL_S": 0.01,
    }.items():
        monkeypatch.setattr(engine_settings, name, value)
    (tmp_path / "randomize").write_text("2\n")
    monkeypatch.setattr("wherry_guest.engine.get", made.info)
    monkeypatch.setattr("wherry_guest.engine.ping", lambda *_: "28.5.2")
    # As after the first start.
    first = tmp_path / "first"
    first.write_text("{}\n")
    subprocess.run([settings, first], check=True)
    (made.etc / "daemon.json.before").unlink()
    return made


def asked(guest: Guest, settings: dict[str, Any], live: bool = True) -> tuple[bool, str]:
    return change(json.dumps(settings), live, "the socket")


def test_an_engine_without_containers_starts_with_them(guest: Guest) -> None:
    assert asked(guest, {"debug": True}, live=False) == (True, "")
    assert guest.calls == ["-d", "-u"]
    assert guest.has() == guest.has("daemon.json.given") == {"debug": True}
    assert not (guest.etc / "daemon.json.before").exists()
    assert (guest.etc / "daemon.json").stat().st_mode & 0o077 == 0
    assert (guest.root / "randomize").read_text() == "2\n"


def test_containers_live_through_it(guest: Guest) -> None:
    guest.containers = 1
    assert asked(guest, {"debug": True}) == (True, "")
    assert guest.calls == ["-h", "-d", "-u"]
    assert guest.has() == {"debug": True, "live-restore": True}
    # The next time it is on already.
    assert asked(guest, {"debug": False}) == (True, "")
    assert guest.calls[3:] == ["-d", "-u"]


@pytest.mark.parametrize("swarm", ["inactive", "active"])
def test_containers_are_never_stopped_for_it(guest: Guest, swarm: str) -> None:
    guest.containers, guest.swarm = 1, swarm
    assert asked(guest, {"mtu": 1300}, live=swarm == "active") == (False, "")
    assert guest.calls == []
    assert guest.has() == {}


def test_an_engine_that_would_stop_them_is_not_stopped(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest.containers = 1
    monkeypatch.setattr(guest, "has", dict)
    with pytest.raises(OSError, match="does not take live-restore"):
        asked(guest, {"debug": True})
    assert guest.calls == ["-h"]


def test_an_engine_that_does_not_stop_keeps_what_it_had(guest: Guest) -> None:
    guest.stops = False
    with pytest.raises(OSError, match="did not stop"):
        asked(guest, {"debug": True})
    assert guest.calls == ["-d", "-u"]
    assert guest.has() == {}


@pytest.mark.parametrize("containers", [0, 1])
def test_what_dockerd_refuses_at_a_look_is_not_tried(guest: Guest, containers: int) -> None:
    guest.containers = containers
    with pytest.raises(Refused, match=r"^with file daemon\.json: bad$"):
        asked(guest, {"bad": True})
    assert guest.calls == []
    assert guest.has() == {}


@pytest.mark.parametrize("containers", [0, 1])
def test_what_dockerd_does_not_start_with_is_taken_back(guest: Guest, containers: int) -> None:
    guest.containers = containers
    asked(guest, {"debug": True})
    before = guest.has()
    with pytest.raises(Refused, match=r"^failed: http://\*\*\*@host late$"):
        asked(guest, {"late": True})
    assert guest.has() == guest.has("daemon.json.given") == before
    assert "wherry: warning: the engine refuses" in (guest.root / "console").read_text()
    # And the next ones are no surprise.
    assert asked(guest, {"debug": False}) == (True, "")


def test_what_was_written_by_hand_is_kept_and_told(guest: Guest) -> None:
    (guest.etc / "daemon.json").write_text('{"mtu": 1234}')
    applied, note = asked(guest, {"debug": True})
    assert applied
    assert "was written by hand; that is kept there as daemon.json.by-hand" in note
    assert guest.has("daemon.json.by-hand") == {"mtu": 1234}
    assert guest.has() == {"debug": True}
    assert asked(guest, {"debug": False}) == (True, "")


def test_a_start_in_emulation_has_fixed_addresses(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    read = engine_settings._read
    monkeypatch.setattr(
        engine_settings,
        "_read",
        lambda path: "quiet norandmaps" if path == "/proc/cmdline" else read(path),
    )
    monkeypatch.setattr(guest, "start", lambda: seen.append((guest.root / "randomize").read_text()))
    asked(guest, {"debug": True})
    assert seen == ["0"]
    assert (guest.root / "randomize").read_text() == "2\n"
