"""The agent starts on an emulated processor: what it imports is what its start costs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from wherry.core.processes import run
from wherry.service import agent_bundle

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the agent is for Linux")

# Each takes longer to import than the agent's own code, or than json with all it needs.
TOO_SLOW = {"asyncio", "dataclasses", "email", "http", "inspect", "pathlib", "subprocess", "typing"}


def modules_of_the_agent(tmp_path: Path) -> set[str]:
    bundle = agent_bundle.build()
    path = tmp_path / bundle.name
    path.write_bytes(bundle.data)
    code = "import sys; sys.path.insert(0, sys.argv[1]); import wherry_guest.agent\n"
    code += "print(*sys.modules)"
    done = run([sys.executable, "-IS", "-c", code, os.fspath(path)], timeout_s=30)
    return set(done.stdout.decode().split())


def test_the_agent_imports_nothing_slow(tmp_path: Path) -> None:
    loaded = modules_of_the_agent(tmp_path)
    assert {"wherry_guest.session", "wherry_wire.messages"} <= loaded
    assert not loaded & TOO_SLOW


def test_the_agent_imports_the_standard_library_and_itself_alone(tmp_path: Path) -> None:
    roots = {name.partition(".")[0] for name in modules_of_the_agent(tmp_path)}
    assert roots - sys.stdlib_module_names <= {"__main__", "wherry_guest", "wherry_wire"}
