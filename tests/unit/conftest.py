"""A host that is the same everywhere, directories of a test's own, fake programs on PATH."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fake_image import FILES, write_image
from hypothesis import settings
from sync_pair import Pair, scratch

from wherry.config.layout import Layout, MachinePaths
from wherry.platform.linux import Linux

GIB = 1 << 30

ROOT = Path(__file__).resolve().parents[2]
TOOLS = (
    "ruff check",
    "ruff format --check",
    "mypy",
    "mypy --platform win32 --cache-dir .mypy_cache/win32"
    " -p wherry.platform.windows -m wherry.platform",
    "lint-imports",
)

# For long runs: pytest --hypothesis-profile=thorough
# A busy computer is no failure.
settings.register_profile("default", deadline=None)
settings.load_profile("default")
settings.register_profile("thorough", max_examples=1500, stateful_step_count=60, deadline=None)


def pytest_collection_finish() -> None:
    """Have the collector of cycles not look at all that is there from now on, again and again."""
    gc.collect()
    gc.freeze()


class Host(Linux):
    """A computer of known size; its accelerators fail as a test says."""

    def __init__(self, sockets: Path) -> None:
        self.problems: dict[str, str] = {}
        self.cpus = 8
        self.memory = 16 * GIB
        self.machine = "x86_64"
        self._sockets = sockets

    def accelerator_problem(self, accelerator: str) -> str | None:
        return self.problems.get(accelerator)

    def architecture(self) -> str:
        return self.machine

    def cpu_model(self) -> str:
        return "A Processor"

    def cpu_count(self) -> int:
        return self.cpus

    def memory_bytes(self) -> int:
        return self.memory

    def short_directory(self) -> Path:
        self.make_private_directory(self._sockets)
        return self._sockets


@pytest.fixture(scope="session", autouse=True)
def tools(request: pytest.FixtureRequest) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """What looks at the whole project, if a test of this run asks for it; see test_tools.py."""
    sources = os.pathsep.join(str(ROOT / each) for each in ("host", "guest", "images"))
    wanted = {each.name for each in request.session.items}
    running = {
        command: subprocess.Popen(
            [Path(sys.executable).parent / command.split()[0], *command.split()[1:]],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": sources},
        )
        for command in TOOLS
        if f"test_tools[{command}]" in wanted
    }
    yield running
    for process in running.values():
        process.kill()
        with process:
            pass


# Below what is no directory nothing can be made.
_NOWHERE = Path(os.devnull)


@pytest.fixture(autouse=True)
def own_directories(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the user's is read or written."""
    # Most tests need no directory, and one for each would take a second of the run.
    asked = "tmp_path" in request.fixturenames
    own: Path = request.getfixturevalue("tmp_path") if asked else _NOWHERE
    monkeypatch.setenv("WHERRY_HOME", str(own / "home"))
    monkeypatch.setenv("DOCKER_CONFIG", str(own / "docker"))
    monkeypatch.setenv("WHERRY_DEFAULT_SOCKET", str(own / "default.sock"))


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two directories that are kept equal."""
    place = scratch()
    made = Pair(place)
    yield made
    made.close()
    shutil.rmtree(place)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "run")


@pytest.fixture
def layout(tmp_path: Path, host: Host) -> Layout:
    found = Layout(tmp_path / "home", host)
    found.prepare()
    return found


@pytest.fixture
def paths(layout: Layout) -> MachinePaths:
    """The paths of a machine whose directory exists, and nothing in it."""
    found = layout.machine("default")
    found.directory.mkdir()
    return found


@dataclass
class Programs:
    """Shell scripts that are the only programs on PATH, and the calls they logged."""

    directory: Path
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.directory.mkdir()
        self.log = self.directory / "calls"

    def install(self, name: str, script: str) -> Path:
        """Make a program; each call is logged as a line."""
        path = self.directory / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >>"{self.log}"\n{script}\n')
        path.chmod(0o755)
        return path

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    found = Programs(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(found.directory))
    return found


MakeImage = Callable[..., Path]


@pytest.fixture
def make_image(layout: Layout) -> MakeImage:
    """Write an image whose manifest is right, into ``images/`` unless told otherwise."""

    def make(
        version: str = "1",
        architecture: str = "x86_64",
        *,
        directory: Path | None = None,
        files: Mapping[str, bytes] = FILES,
    ) -> Path:
        target = directory or layout.images / f"{version}-{architecture}"
        return write_image(target, version, architecture, files)

    return make
