"""Trees in bind mounts: what is in them, on this computer and in a container; random edits."""

from __future__ import annotations

import hashlib
import random
import shutil
from pathlib import Path

LIST = (
    'cd /src; find . -type f -exec md5sum {} +; find . -mindepth 1 -type d -exec echo dir {} ";";'
    ' find . -type l -exec ls -l {} + | sed "s/.* \\.\\//link .\\//"'
)
"""Prints a container's view of a tree, as :func:`listed` gives the host's."""


def listed(root: Path) -> list[str]:
    """Return what is in a tree: contents' digests, directories, links."""
    found = []
    for path in root.rglob("*"):
        name = f"./{path.relative_to(root)}"
        if path.is_symlink():
            found.append(f"link {name} -> {path.readlink()}")
        elif path.is_dir():
            found.append(f"dir {name}")
        else:
            digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
            found.append(f"{digest}  {name}")
    return sorted(found)


class Editor:
    """Changes a tree at random, as people and programs do."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.random = random.Random(seed)
        self.number = 0

    def edit(self) -> None:
        for _ in range(self.random.randint(1, 8)):
            self.one()

    def one(self) -> None:
        choose = self.random
        paths = [path for path in self.root.rglob("*") if not path.is_symlink()]
        files = [path for path in paths if path.is_file()]
        directories = [self.root, *(path for path in paths if path.is_dir())]
        self.number += 1
        new = choose.choice(directories) / f"h{self.number}"
        action = choose.choice(
            ["new", "new", "rewrite", "append", "remove", "move", "mkdir", "link"]
        )
        if action == "mkdir":
            new.mkdir()
        elif action == "link":
            new.symlink_to(choose.choice(["h1", "../x", "nowhere"]))
        elif action == "new" or not files:
            new.write_bytes(choose.randbytes(choose.choice([0, 1, 100, 5000, 300_000])))
        elif action == "rewrite":
            choose.choice(files).write_bytes(choose.randbytes(choose.randint(0, 9000)))
        elif action == "append":
            with choose.choice(files).open("ab") as file:
                file.write(b"more\n")
        elif action == "remove":
            path = choose.choice(paths)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            path = choose.choice(files)
            if not new.exists():
                path.rename(new)
