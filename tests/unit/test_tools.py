"""What ruff, mypy and import-linter say of the whole project.

They begin with the first unit test, and beside the others, since mypy takes as long as all of
those.
"""

from __future__ import annotations

import subprocess

import pytest

from .conftest import TOOLS


@pytest.mark.timeout(300)
@pytest.mark.parametrize("command", TOOLS)
def test_tools(command: str, tools: dict[str, subprocess.Popen[str]]) -> None:
    said, _ = tools[command].communicate()
    assert tools[command].returncode == 0, said
