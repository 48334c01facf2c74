"""Programs of the build, run from a tree of locked packages instead of from the host."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from wherry.core.processes import run
from wherry_images.architecture import Architecture

TIMEOUT_S = 600


class Tools:
    """The programs in an unpacked tree for the architecture the build runs on."""

    def __init__(self, tree: Path, architecture: Architecture) -> None:
        """`tree` is what `tree.unpack` made for `architecture`."""
        self._tree = tree
        self._libraries = tree / "usr/lib" / architecture.triplet
        # The dynamic loader is called by its path, which needs neither root nor a chroot; the
        # loader has its own name on each architecture.
        (self._loader,) = self._libraries.glob("ld-linux-*.so.*")

    def run(
        self,
        program: str,
        *arguments: str | Path,
        name: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Run `program`, a path below the tree, under `name` if given. Raises WherryError."""
        command: Sequence[str | Path] = [
            self._loader,
            "--library-path",
            self._libraries,
            "--argv0",
            name or Path(program).name,
            self._tree / program,
            *arguments,
        ]
        run([os.fspath(part) for part in command], timeout_s=TIMEOUT_S, env=environment)

    def python(self, *arguments: str | Path) -> None:
        """Run the tree's Python, which is the version the guest has. Raises WherryError."""
        home = {"PYTHONHOME": os.fspath(self._tree / "usr"), "PYTHONHASHSEED": "0"}
        self.run("usr/bin/python3.13", "-S", *arguments, environment=home)
