"""The packages of the tests under Wine: those run when they are named alone, and fail late."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"


def imported(path: Path, seen: set[Path]) -> Iterator[str]:
    """Yield what is imported with a module of the tests, and by those of ours that it imports."""
    seen.add(path)
    for statement in ast.parse(path.read_text()).body:
        if isinstance(statement, ast.Import):
            names = [each.name for each in statement.names]
        elif isinstance(statement, ast.ImportFrom) and not statement.level:
            names = [statement.module or ""]
        else:
            continue
        for name in names:
            ours = TESTS / "support" / f"{name}.py"
            if not ours.exists():
                yield name.partition(".")[0]
            elif ours not in seen:
                yield from imported(ours, seen)


def normal(name: str) -> str:
    """Return how a package is called among several ways to write its name (PEP 503)."""
    found = re.match(r"[\w.-]+", name)
    assert found is not None
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def test_all_that_is_imported_under_wine_is_installed_there() -> None:
    lines = (TESTS / "windows" / "requirements.txt").read_text().splitlines()
    installed = {normal(line) for line in lines if not line.startswith("#")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {normal(each) for each in project["dependencies"]}
    seen: set[Path] = set()
    packages = importlib.metadata.packages_distributions()
    for path in (TESTS / "conftest.py", *(TESTS / "windows").glob("*.py")):
        for name in imported(path, seen):
            if name.startswith("win32"):
                wanted.add("pywin32")
            elif name not in sys.stdlib_module_names and not name.startswith("wherry"):
                wanted.add(normal(packages[name][0]))
    assert {"docker", "pytest", "pywin32"} <= wanted
    assert wanted <= installed
