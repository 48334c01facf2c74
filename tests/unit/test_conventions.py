"""A command line that answers at once."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

import pytest

HELP_S = 0.25
SLOW_IMPORTS = ("asyncio", "cryptography", "msgspec", "paramiko", "psutil", "qemu", "rich")


PRINT_MODULES = (
    "import atexit, json, sys; atexit.register(lambda: print(json.dumps([*sys.modules])))"
)


@pytest.mark.parametrize("arguments", [["--help"], ["start", "--help"], ["config", "--help"]])
def test_the_command_line_imports_nothing_slow(arguments: list[str]) -> None:
    script = f"{PRINT_MODULES}\nimport wherry.cli\nwherry.cli.main({arguments})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    modules = {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}
    assert "click" in modules
    assert not modules & set(SLOW_IMPORTS)


def test_help_is_there_at_once() -> None:
    def once() -> float:
        begin = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "wherry", "--help"], capture_output=True)
        assert done.returncode == 0
        return time.perf_counter() - begin

    def floor() -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import click"], capture_output=True)
        return time.perf_counter() - begin

    taken, floors = zip(*((once(), floor()) for _ in range(5)), strict=True)
    # Where the interpreter itself is slow, as on a busy computer, that is no fault of ours.
    assert statistics.median(taken) <= max(HELP_S, 2 * statistics.median(floors))
