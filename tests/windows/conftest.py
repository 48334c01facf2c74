"""Pipes of a test's own. These tests run on Windows; elsewhere by packaging/test.sh -m windows."""

from __future__ import annotations

import ctypes
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from wherry.platform import current
from wherry.platform.windows.kernel import Kernel
from wherry.platform.windows.pipes import PipeListener, PipeStream, connect, pipe_name

WAIT_S = 20

UNDER_WINE = hasattr(ctypes.WinDLL("ntdll"), "wine_get_version")


@pytest.fixture(scope="session")
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def name(tmp_path: Path) -> str:
    """The name of a pipe that no other program has."""
    return pipe_name(tmp_path, f"wherry-test-{secrets.token_hex(8)}")


@pytest.fixture
def listener(kernel: Kernel, name: str) -> Iterator[PipeListener]:
    made = PipeListener(kernel, name)
    yield made
    made.close()


Pair = tuple[PipeStream, PipeStream]


@pytest.fixture
def pair(kernel: Kernel, name: str, listener: PipeListener) -> Iterator[Pair]:
    """A server's end and a client's."""
    client = connect(kernel, name, WAIT_S)
    server = listener.accept()
    yield server, client
    server.close()
    client.close()


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the user's is read or written."""
    monkeypatch.setenv("WHERRY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    assert current().name == "windows"
