"""The packed agent is a function of its sources."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

import pytest

from wherry.core.errors import WherryError
from wherry.service import agent_bundle


def test_the_same_sources_give_the_same_bytes() -> None:
    bundle = agent_bundle.build()
    assert bundle == agent_bundle.build()
    assert bundle.name == f"agent-{hashlib.sha256(bundle.data).hexdigest()[:16]}.pyz"


def test_nothing_of_the_system_is_in_the_bundle() -> None:
    with zipfile.ZipFile(io.BytesIO(agent_bundle.build().data)) as archive:
        entries = archive.infolist()
    names = [entry.filename for entry in entries]
    assert names == sorted(names)
    wanted = {"wherry_guest/agent.py", "wherry_sync/local.py", "wherry_wire/frames.py"}
    assert {"__main__.py", *wanted} <= set(names)
    for entry in entries:
        assert entry.filename.endswith(".py")
        assert entry.date_time == (1980, 1, 1, 0, 0, 0)
        assert entry.compress_type == zipfile.ZIP_STORED
        assert (entry.create_system, entry.external_attr) == (3, 0o644 << 16)


# A frozen program has no such package, no such directory, or one with nothing for us.
@pytest.mark.parametrize("place", ["no-such-package", "no-such-directory", "empty"])
def test_an_installation_without_the_sources_is_named(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()

    def files(package: str) -> Path:
        if place == "no-such-package":
            raise ModuleNotFoundError(package)
        return tmp_path / place

    monkeypatch.setattr(agent_bundle, "files", files)
    with pytest.raises(WherryError, match="the sources of wherry_guest are not installed"):
        agent_bundle.build()


def test_the_command_is_short_enough_for_a_process_list() -> None:
    assert len(agent_bundle.build().command()) < 1000
