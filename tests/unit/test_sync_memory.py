"""Memory for a hundred thousand files: what is known of them, and nothing that is as much again.

What is made beside it for a moment counts too: of what is freed, the allocator can give back only
what lies together.
"""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sync_trees import text, tree, write

from wherry.sync import remote
from wherry.sync.core.plan import ordered
from wherry.sync.remote import Place, RemoteEndpoint
from wherry_sync import cache, wire
from wherry_sync.diff import changes, diff
from wherry_sync.entry import Directory, Entry, Leaf, file
from wherry_sync.known import Records
from wherry_sync.operation import Operation
from wherry_sync.records import STATUS
from wherry_sync.scan import Node, Scanner
from wherry_wire.messages import SyncOpened, SyncScanned, pack

DIRECTORIES, FILES = 100, 200
ENTRIES = DIRECTORIES * FILES


def large() -> Directory:
    """Return a tree of :data:`ENTRIES` files, none of which is in another one."""
    return Directory(
        {
            f"directory-{number}": Directory(
                {
                    f"file-{number}-{index}": file(False, index, b"%32d" % (number * FILES + index))
                    for index in range(FILES)
                }
            )
            for number in range(DIRECTORIES)
        }
    )


def peak(work: Callable[[], object]) -> int:
    """Return the most memory that there was at once during some work, in bytes."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


class Canned:
    """A stream on which all answers are there already."""

    def __init__(self, answers: Iterable[bytes]) -> None:
        self._answers = iter([pack(SyncOpened(boot_id="b", packed=False), 0), *answers])

    def recv(self, size: int, /) -> bytes:
        return next(self._answers, b"")

    def sendall(self, data: bytes, /) -> None:
        pass

    def close(self) -> None:
        pass


def endpoint(answers: Iterable[bytes]) -> RemoteEndpoint:
    return RemoteEndpoint(Canned(answers), Place("r1", "/r"))


def scanned(old: Entry | None, new: Entry | None) -> Iterator[bytes]:
    """Yield what the guest answers to a scan."""
    count = len(diff(old, new))
    yield from wire.rows((path.encode(), wire.pack_entry(at)) for path, at in changes(old, new))
    yield from wire.rows([(b"again", b"")])
    yield pack(
        SyncScanned(
            present=new is not None,
            device=1,
            files_read=0,
            bytes_read=0,
            changes=count,
            rescued=False,
        ),
        0,
    )


TREES = st.recursive(
    st.sampled_from(["1", "2", "3*", "->x"]),
    lambda inner: st.dictionaries(st.sampled_from("abcd"), inner, max_size=4),
    max_leaves=12,
)


@given(TREES, TREES, st.integers(0, 3))
def test_a_tree_that_comes_in_parts_is_that_tree(old: object, new: object, size: int) -> None:
    first, second = tree(old), tree(new)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "_CHANGED_AT_ONCE", size)
        end = endpoint([*scanned(None, first), *scanned(first, second)])
        assert end.scan().root == first
        found = end.scan((), like=second)
    assert found.root == second
    assert found.root is second or first == second
    assert found.requeue == {"again"}


def test_a_copy_that_is_like_the_host_takes_no_memory_while_it_is_told() -> None:
    own, like = large(), large()
    end = endpoint([*scanned(None, own), *scanned(own, own)])
    assert peak(lambda: end.scan(like=like)) < 200 * ENTRIES
    assert end.scan(()).root is like


def test_what_differs_is_told_one_by_one() -> None:
    new = large()
    assert peak(lambda: sum(1 for _ in changes(None, new))) < 5 * ENTRIES


def test_what_is_known_is_written_without_a_copy_of_it(tmp_path: Path) -> None:
    def node(directory: Directory) -> Node:
        nodes = {
            name: node(child)
            for name, child in directory.children.items()
            if isinstance(child, Directory)
        }
        records = {name: bytes(8 if name in nodes else STATUS.size) for name in directory.children}
        return Node(directory, Records(records), nodes)

    known = (node(large()), (b"", Leaf(b"")))
    path = os.fspath(tmp_path / "cache")
    assert peak(lambda: cache.save(path, known, "t")) < 75 * ENTRIES
    assert cache.load(path, "t") is not None


def scan(scanner: Scanner, path: Path, dirty: tuple[str, ...] | None = None) -> Directory:
    fd = os.open(path, os.O_RDONLY)
    try:
        root = scanner.scan(fd, dirty).root
    finally:
        os.close(fd)
    assert isinstance(root, Directory)
    return root


def names(root: Directory) -> list[set[int]]:
    """Return which objects are the names in each directory below the root."""
    return [
        {id(name) for name in child.children}
        for child in root.children.values()
        if isinstance(child, Directory)
    ]


def test_a_name_that_is_in_many_directories_is_there_once(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write(root, {name: {"index.js": "1", "package.json": "2"} for name in "abc"})
    scanner = Scanner(granularity_ns=0)
    one, two, three = names(scan(scanner, root))
    assert one == two == three
    (root / "b" / "index.js").write_text("new")
    (root / "c" / "another").write_text("new")
    one, two, three = sorted(names(scan(scanner, root, ("b", "c"))), key=len)
    # But for the one that was written to.
    assert len(one & two) == 1
    assert sorted([len(one & three), len(two & three)]) == [1, 2]
    path = os.fspath(tmp_path / "cache")
    later = Scanner(granularity_ns=0)
    for each in root.glob("*/*"):
        # Else it is too new to be written down.
        os.utime(each, (0, 0))
    scan(scanner, root)
    cache.save(path, scanner.known(), "t")
    known = cache.load(path, "t")
    assert known is not None
    later.know(*known)
    one, two, three = sorted(names(scan(later, root)), key=len)
    assert one == two < three


def test_a_scan_that_finds_nothing_makes_nothing_that_stays(tmp_path: Path) -> None:
    write(tmp_path / "root", {"a": {"b": {"f": "1"}}, "c": {}})
    scanner = Scanner(granularity_ns=0)
    before, after = [], []
    for found in (before, after):
        scan(scanner, tmp_path / "root")
        pending = [scanner.known()[0]]
        while pending:
            node = pending.pop()
            found += [id(node), id(node.nodes), id(node.records), id(node.entry)]
            pending += node.nodes.values()
    assert before == after


NAMES = st.text(st.sampled_from("ab -./"), min_size=1, max_size=6)


@given(st.sets(NAMES))
def test_operations_are_in_the_order_of_their_paths_names(paths: set[str]) -> None:
    operations = [Operation(path, None, text("1")) for path in sorted(paths)]
    found = [operation.path for operation in ordered(operations)]
    assert found == sorted(paths, key=lambda path: path.split("/"))
