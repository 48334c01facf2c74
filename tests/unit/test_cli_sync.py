"""What ``wherry sync`` asks of a service, and prints of its answers."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from wherry.cli import cli
from wherry.config.layout import Layout
from wherry.control.server import ControlServer, Emit
from wherry.core.bridge import in_thread
from wherry.platform import current

DESCRIBED = {"path": "/r", "state": "watching", "conflicts": 0, "problems": []}


class Machine:
    """A machine of which only the service is there, which answers as it is told."""

    def __init__(self, home: Path) -> None:
        layout = Layout(home, current())
        layout.prepare()
        self.paths = layout.machine("default")
        self.paths.directory.mkdir(parents=True)
        self.answer: Any = None
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def run(self, *arguments: str) -> str:
        """Return what ``wherry sync`` prints."""

        async def work() -> str:
            server = ControlServer(
                current().listen_local(self.paths.control_socket),
                {
                    f"sync_{name}": self._handler(f"sync_{name}")
                    for name in ("add", "remove", "resolve")
                },
                asyncio.get_running_loop(),
            )
            try:
                done = await in_thread(
                    lambda: CliRunner().invoke(cli, ["sync", *arguments], catch_exceptions=False),
                    name="command",
                )
            finally:
                await in_thread(server.close, name="close")
            assert done.exit_code == 0, done.output
            return str(done.stdout)

        return asyncio.run(work())

    def _handler(self, method: str) -> Any:
        async def handle(params: Mapping[str, Any], emit: Emit) -> Any:
            self.asked.append((method, dict(params)))
            return self.answer

        return handle


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    # Not below pytest's directory, whose length would move the sockets elsewhere.
    directory = Path(tempfile.mkdtemp(prefix="wherry-test-"))
    monkeypatch.setenv("WHERRY_HOME", str(directory / "home"))
    yield Machine(directory / "home")
    shutil.rmtree(directory)


def test_what_is_added_is_told_as_json(machine: Machine) -> None:
    machine.answer = DESCRIBED
    assert json.loads(machine.run("add", "/r", "--ignore", "*.o", "--json")) == DESCRIBED
    assert machine.asked == [("sync_add", {"path": "/r", "ignore": ["*.o"]})]
    assert machine.run("add", "/r") == ""


def test_what_is_removed_is_told_as_json(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert json.loads(machine.run("remove", "r", "--json")) == {"path": f"{tmp_path}/r"}
    assert machine.asked == [("sync_remove", {"path": f"{tmp_path}/r"})]
    assert machine.run("remove", "r") == ""


@pytest.mark.parametrize(
    ("arguments", "action", "written"),
    [
        (["--restore"], "restore", "/r/f"),
        (["--save", "/elsewhere"], "save", "/elsewhere"),
        (["--discard"], "discard", ""),
    ],
)
def test_what_was_resolved_is_told_as_json(
    machine: Machine, arguments: list[str], action: str, written: str
) -> None:
    machine.answer = written
    assert json.loads(machine.run("resolve", "1.2", *arguments, "--json")) == {
        "id": "1.2",
        "action": action,
        "path": written or None,
    }
    target = "/elsewhere" if action == "save" else ""
    assert machine.asked == [("sync_resolve", {"id": "1.2", "action": action, "target": target})]
    assert machine.run("resolve", "1.2", *arguments) == (f"{written}\n" if written else "")
