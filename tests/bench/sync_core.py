"""The sync's own work, without a wire: scanning, comparing, memory.

    python tests/bench/sync_core.py [--files 10000] [--entries 100000] [--json FILE]

Scans are compared with their floor in the same run: the same calls of the system (scandir and
lstat of each entry; for a cold scan open, read and hash as well) with nothing around them.
Medians of five, of processor time where nothing waits for a disk, as the machine may be busy;
memory by tracemalloc.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import shutil
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "host"), str(ROOT / "guest")]

from harness import give_json  # noqa: E402

from wherry.sync.core.reconcile import Agreement, reconcile  # noqa: E402
from wherry.sync.core.store import Store  # noqa: E402
from wherry_sync.diff import diff  # noqa: E402
from wherry_sync.entry import (  # noqa: E402
    IGNORED,
    Directory,
    Entry,
    count,
    file,
    share,
    tracked,
    updated,
)
from wherry_sync.local import LocalEndpoint  # noqa: E402
from wherry_sync.operation import Operation  # noqa: E402

RUNS = 5
FILES_IN_DIRECTORY = 20
CHANGES = 100


def median(
    work: Callable[[], object],
    prepare: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.process_time,
) -> float:
    """Return the median of some runs, in seconds."""
    times = []
    for _ in range(RUNS):
        prepare()
        begin = clock()
        work()
        times.append(clock() - begin)
    return statistics.median(times)


def make_tree(directory: Path, files: int) -> None:
    """Make small files, 20 to a directory, in two levels of directories."""
    for number in range(files // FILES_IN_DIRECTORY):
        below = directory / f"package-{number // 50}" / f"module-{number % 50}"
        below.mkdir(parents=True)
        for index in range(FILES_IN_DIRECTORY):
            (below / f"source_{index}.py").write_bytes(b"x" * (500 + 37 * index + number % 997))


def floor(directory: Path, *, read: bool) -> int:
    """Make the system calls of a scan, and nothing else."""
    seen = 0
    fd = os.open(directory, os.O_RDONLY)
    stack = [fd]
    while stack:
        fd = stack.pop()
        with os.scandir(fd) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                seen += 1
                if (status.st_mode & 0o170000) == 0o040000:
                    stack.append(os.open(entry.name, os.O_RDONLY, dir_fd=fd))
                elif read:
                    descriptor = os.open(entry.name, os.O_RDONLY, dir_fd=fd)
                    data = os.read(descriptor, 1 << 18)
                    hashlib.blake2b(data, digest_size=32).digest()
                    os.close(descriptor)
        os.close(fd)
    return seen


def scanning(place: Path, files: int) -> dict[str, float]:
    """Measure scans of real files."""
    root = place / "root"
    root.mkdir()
    make_tree(root, files)
    end = LocalEndpoint(str(root), str(place / "stage"), "boot")
    entries = count(end.scan().root)

    def cold() -> None:
        fresh = LocalEndpoint(str(root), str(place / "fresh"), "boot")
        fresh.scan()
        fresh.close()

    one = [str(path.relative_to(root)) for path in list(root.glob("*/*"))[:10]]
    found = {
        "entries": entries,
        "cold_s": median(cold),
        "cold_floor_s": median(lambda: floor(root, read=True)),
        "warm_s": median(end.scan),
        "warm_floor_s": median(lambda: floor(root, read=False)),
        "dirty_10_directories_s": median(lambda: end.scan(one)),
    }
    contents = [b"%d" % number for number in range(1000)]
    leaves = [
        file(False, len(data), hashlib.blake2b(data, digest_size=32).digest()) for data in contents
    ]
    operations = [Operation(f"new-{leaf.hex()}", None, leaf) for leaf in leaves]

    def apply() -> None:
        end.stage_all((leaf, 0, [data]) for leaf, data in zip(leaves, contents, strict=True))
        list(end.apply(operations))

    def clear() -> None:
        for path in root.glob("new-*"):
            path.unlink()

    found["stage_and_apply_1000_files_s"] = median(apply, clear)
    end.close()
    return found


def synthetic(entries: int, ignored: bool) -> Entry:
    """Return a tree of a size; every directory may hold something ignored."""
    directories = entries // (FILES_IN_DIRECTORY + 1)
    top: dict[str, dict[str, Entry]] = {}
    for number in range(directories):
        children: dict[str, Entry] = {
            f"source_{number % 7}_{index}.py": file(
                False, index, hashlib.blake2b(b"%d %d" % (number, index), digest_size=32).digest()
            )
            for index in range(FILES_IN_DIRECTORY)
        }
        if ignored:
            children["__pycache__"] = IGNORED
        top.setdefault(f"package-{number // 50}", {})[f"module-{number}"] = Directory(children)
    return Directory({name: Directory(inner) for name, inner in top.items()})


def edited(tree: Entry, changes: int, mark: bytes) -> Entry:
    """Return the tree with some files changed, spread evenly."""
    paths = [
        f"{package}/{module}/{name}"
        for package, inner in tree.children.items()  # type: ignore[union-attr]
        for module, directory in inner.children.items()  # type: ignore[union-attr]
        for name in directory.children  # type: ignore[union-attr]
        if name != "__pycache__"
    ]
    step = len(paths) // changes
    digest = hashlib.blake2b(mark, digest_size=32).digest()
    new = updated(tree, {path: file(False, 5, digest) for path in paths[::step][:changes]})
    assert new is not None
    return new


def comparing(place: Path, entries: int) -> dict[str, float]:
    """Measure reconciling and storing trees that are made up."""
    found: dict[str, float] = {}
    for name, ignored in (("plain", False), ("ignored in each directory", True)):
        host = guest = synthetic(entries, ignored)
        ancestor = share(tracked(host), host)
        agreement = Agreement()
        first = median(lambda a=ancestor, h=host, g=guest: reconcile(a, h, g))
        reconcile(ancestor, host, guest, agreement=agreement)
        changed = edited(host, CHANGES, b"1")
        found |= {
            f"reconcile, nothing new, {name}_s": median(
                lambda a=ancestor, h=host, g=guest, k=agreement: reconcile(a, h, g, agreement=k)
            ),
            f"reconcile, {CHANGES} changes, {name}_s": median(
                lambda a=ancestor, h=changed, g=guest, k=agreement: reconcile(a, h, g, agreement=k)
            ),
            f"reconcile, first time, {name}_s": first,
        }
    tree = synthetic(entries, False)
    new = edited(tree, CHANGES, b"2")
    store = Store(place / "sync.db", 1)
    begin = time.perf_counter()
    store.commit(diff(None, tree))
    found["store_all_s"] = time.perf_counter() - begin
    found["load_all_s"] = median(store.load)
    changes = diff(tree, new)
    found[f"begin_and_commit_{len(changes)}_s"] = median(
        lambda: (store.begin({path: (None, leaf) for path, leaf in changes.items()}),
                 store.commit(changes)),
        clock=time.perf_counter,
    )  # fmt: skip
    store.close()
    return found


def memory(place: Path, entries: int) -> dict[str, float]:
    """Measure what is held for a tree, in bytes an entry."""
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    tree = synthetic(entries, False)
    size = count(tree)
    one = tracemalloc.get_traced_memory()[0] - before
    three = [share(synthetic(entries, False), tree) for _ in range(2)]
    gc.collect()
    shared = tracemalloc.get_traced_memory()[0] - before
    del tree, three
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    end = LocalEndpoint(str(place / "root"), str(place / "stage"), "boot")
    scanned = count(end.scan().root)
    gc.collect()
    scanner = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    end.close()
    return {
        "tree_bytes_per_entry": one / size,
        "three_equal_trees_bytes_per_entry": shared / size,
        "tree_and_records_bytes_per_entry": scanner / scanned,
        "host_100k_MB": (shared / size + (scanner / scanned - one / size)) * 100_000 / 1e6,
        "agent_100k_MB": scanner / scanned * 100_000 / 1e6,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="wherry-bench-"))
    try:
        scan = scanning(place, options.files)
        results = {
            "scan": scan,
            "compare": comparing(place, options.entries),
            "memory": memory(place, options.entries),
        }
    finally:
        shutil.rmtree(place)
    results["ratios"] = {
        "warm scan / floor": scan["warm_s"] / scan["warm_floor_s"],
        "cold scan / floor": scan["cold_s"] / scan["cold_floor_s"],
        "warm entries/s": scan["entries"] / scan["warm_s"],
        "cold entries/s": scan["entries"] / scan["cold_s"],
        "warm ms per 10 000": scan["warm_s"] / scan["entries"] * 1e7,
    }
    for name, values in results.items():
        print(name)
        for key, value in values.items():
            shown = f"{value * 1000:10.2f} ms" if key.endswith("_s") else f"{value:10.2f}"
            print(f"  {key.removesuffix('_s'):52} {shown}")
    give_json(results, options.json)


if __name__ == "__main__":
    main()
