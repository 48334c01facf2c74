"""Kernel modules: which ones the image keeps, and in what order the initrd loads its few."""

from __future__ import annotations

import lzma
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath


def module_name(path: str) -> str:
    """Return the name the kernel gives a module file: no suffix, underscores only."""
    return PurePosixPath(path).name.split(".")[0].replace("-", "_")


def parse_dependencies(text: str) -> dict[str, list[str]]:
    """Parse modules.dep(5): for each module file the files it needs, directly or not."""
    dependencies = {}
    for line in text.splitlines():
        path, _, needed = line.partition(":")
        dependencies[path] = needed.split()
    return dependencies


def with_dependencies(
    wanted: Iterable[str], dependencies: Mapping[str, Sequence[str]]
) -> list[str]:
    """Return the files `wanted` and all they need, each after everything it needs itself."""
    ordered: dict[str, None] = {}
    for path in wanted:
        # depmod lists the needed modules of a line so that the last one has to be loaded first.
        for needed in [*reversed(dependencies[path]), path]:
            ordered[needed] = None
    return list(ordered)


def select_by_name(names: Iterable[str], dependencies: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the files of the modules `names` in loading order.

    A name without a file is built into the kernel and is left out.
    """
    files = {module_name(path): path for path in dependencies}
    return with_dependencies((files[name] for name in names if name in files), dependencies)


def select_by_pattern(
    patterns: Iterable[str], dependencies: Mapping[str, Sequence[str]]
) -> list[str]:
    """Return the files that match a glob relative to kernel/, and all they need."""
    patterns = list(patterns)
    wanted = [
        path
        for path in dependencies
        if any(fnmatchcase(path.removeprefix("kernel/"), pattern) for pattern in patterns)
    ]
    return with_dependencies(wanted, dependencies)


def decompress(directory: Path) -> None:
    """Replace every .ko.xz below `directory` by the plain module.

    The root is compressed as a whole, and unpacking xz is slow where the processor is emulated.
    """
    for file in directory.rglob("*.ko.xz"):
        file.with_suffix("").write_bytes(lzma.decompress(file.read_bytes()))
        file.unlink()


def keep_only(directory: Path, kept: Iterable[str]) -> None:
    """Delete the modules below `directory` that are not in `kept`, paths relative to it."""
    kept_files = {directory / path for path in kept}
    for file in directory.rglob("*.ko"):
        if file not in kept_files:
            file.unlink()
