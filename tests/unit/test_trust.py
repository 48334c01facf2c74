"""When the guest gets what the host trusts, and when its engine has to start anew for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trustme
from fake_image import write_image

from wherry.config.layout import Layout
from wherry.core.errors import WherryError
from wherry.platform import current
from wherry.service import trust
from wherry.service.trust import Trust
from wherry.tunnel.connection import Completed
from wherry.vm.image import Image, read

TAKE = trust._TAKE
RUNNING = {"version": "1", "sha256": "of an image that is gone"}


class Guest:
    """A tunnel that notes what is asked through it."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answers = {TAKE: Completed(0, b"changed\n", b"")}

    def run(self, command: str, input: bytes = b"", *, timeout_s: float) -> Completed:
        self.asked.append(command)
        return self.answers[command]


@pytest.fixture
def guest() -> Any:
    return Guest()


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return read(write_image(tmp_path / "image"))


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    monkeypatch.setenv("SSL_CERT_FILE", "/dev/null")
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "none"))
    made = Layout(tmp_path / "home", current())
    (made.home / "certs.d").mkdir(parents=True)
    made.machine("default").directory.mkdir(parents=True)
    return made


@pytest.fixture
def trusting(layout: Layout) -> Trust:
    return Trust(layout, layout.machine("default"))


def add(layout: Layout, number: int = 1) -> None:
    for each in range(number):
        trustme.CA().cert_pem.write_to_path(layout.home / f"certs.d/{each}.crt")


def test_a_guest_that_boots_gets_little_by_its_firmware(
    layout: Layout, trusting: Trust, guest: Any, image: Image
) -> None:
    assert trusting.firmware(image) == {}
    add(layout)
    (path,) = trusting.firmware(image).values()
    assert path.parent == layout.machine("default").directory
    assert path.stat().st_mode & 0o777 == 0o600
    trusting.catch_up(guest, RUNNING)
    assert guest.asked == []


def test_a_guest_that_boots_gets_much_through_the_tunnel(
    layout: Layout, trusting: Trust, guest: Any, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its engine has not read any yet, so it is left alone."""
    monkeypatch.setattr(trust, "FIRMWARE_BYTES", 100)
    add(layout)
    assert trusting.firmware(image) == {}
    trusting.catch_up(guest, RUNNING)
    trusting.catch_up(guest, RUNNING)
    assert guest.asked == [TAKE]


@pytest.mark.parametrize("changed", [False, True])
def test_a_guest_that_ran_already(
    changed: bool, trusting: Trust, guest: Any, image: Image, caplog: pytest.LogCaptureFixture
) -> None:
    guest.answers[TAKE] = Completed(0, b"changed\n" if changed else b"", b"")
    trusting.catch_up(guest, RUNNING)
    assert guest.asked == [TAKE]
    assert ("from its next start on" in caplog.text) == changed


def test_a_guest_that_takes_nothing_is_used_all_the_same(
    trusting: Trust, guest: Any, image: Image, caplog: pytest.LogCaptureFixture
) -> None:
    guest.answers[TAKE] = Completed(127, b"", b"not found\n")
    trusting.catch_up(guest, RUNNING)
    assert caplog.messages == ["the guest does not take the certificates: not found"]
    with pytest.raises(WherryError, match="not found"):
        trusting.apply(guest, RUNNING)


@pytest.mark.parametrize("changed", [False, True])
def test_a_change_tells_whether_the_engine_knows_of_it(
    changed: bool, layout: Layout, trusting: Trust, guest: Any, image: Image,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    guest.answers[TAKE] = Completed(0, b"changed\n" if changed else b"", b"")
    (layout.home / "certs.d/bad.crt").write_text("nonsense")
    applied = trusting.apply(guest, RUNNING)
    assert applied.changed == changed
    assert applied.problems == trusting.problems == tuple(caplog.messages)
    assert "bad.crt is left out" in applied.problems[0]


def test_the_directory_of_the_settings(
    layout: Layout, trusting: Trust, guest: Any, image: Image, tmp_path: Path
) -> None:
    """A directory that is named has to exist."""
    config = layout.machine("default").config
    config.write_text(f'certificates.directory = "{tmp_path}/other"\n')
    trusting.firmware(image)
    assert trusting.problems == (f"{tmp_path}/other is left out: No such file or directory",)
    (tmp_path / "other").mkdir()
    trustme.CA().cert_pem.write_to_path(tmp_path / "other/a.pem")
    assert list(trusting.firmware(image)) == ["certificates"]
    assert trusting.problems == ()
