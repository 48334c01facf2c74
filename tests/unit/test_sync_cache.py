"""What is known of a tree, kept in a file."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sync_trees import tree, write

from wherry.sync.core.rules import parse
from wherry_sync import cache, hashing, records
from wherry_sync.entry import Directory, Entry, Leaf, file, problem
from wherry_sync.ignore import NOTHING, Ignore
from wherry_sync.known import Records
from wherry_sync.local import LocalEndpoint
from wherry_sync.scan import Node

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="directory descriptors")

NOW_NS = 1_800_000_000_000_000_000
VALUE = {
    "f": "1",
    "x": "2*",
    "d": {"e": {}, "g": "3", "h": {"new\nline": "4"}},
    "l": "->/etc/passwd",
    "é": {"ü": "5"},
}


class Place:
    """A tree, and one endpoint after another for it."""

    def __init__(self, path: Path) -> None:
        self.root = path / "root"
        self.stage = path / "stage"
        self.cache = path / "cache"

    def open(self, trust: str = "boot 1", ignore: Ignore = NOTHING) -> LocalEndpoint:
        end = LocalEndpoint(
            os.fspath(self.root),
            os.fspath(self.stage),
            "boot",
            ignore=ignore,
            cache=os.fspath(self.cache),
            trust=trust,
        )
        end._scanner._granularity_ns = 0
        return end

    def fill(self, ignore: Ignore = NOTHING, age_s: int = 3600) -> None:
        """Have an endpoint scan the tree and save what it knows."""
        then_ns = time.time_ns() - age_s * 1_000_000_000
        for path in (self.root, *self.root.rglob("*")):
            os.utime(path, ns=(then_ns, then_ns), follow_symlinks=False)
        end = self.open(ignore=ignore)
        end.scan()
        end.save_cache()
        end.close()

    def read(self, trust: str = "boot 1", ignore: Ignore = NOTHING) -> tuple[Entry | None, int]:
        """Return a new endpoint's tree, and how many files it had to read."""
        end = self.open(trust, ignore)
        found = end.scan([])
        end.close()
        return found.root, found.files_read


@pytest.fixture
def place(tmp_path: Path) -> Place:
    made = Place(tmp_path)
    write(made.root, VALUE)
    return made


def test_nothing_is_read_again_after_a_restart(place: Place) -> None:
    assert place.read() == (tree(VALUE), 5)
    place.fill()
    assert place.read() == (tree(VALUE), 0)
    assert [path.name for path in place.cache.parent.iterdir() if "cache" in path.name] == ["cache"]
    assert place.cache.stat().st_mode & 0o777 == 0o600


def test_55_what_was_modified_just_now_is_read_again(place: Place) -> None:
    """Its pages may be dirty, so that a store through a mapping would not show."""
    place.fill(age_s=60)
    assert place.read() == (tree(VALUE), 5)
    place.fill(age_s=150)
    assert place.read() == (tree(VALUE), 0)
    place.fill(age_s=-150)
    assert place.read() == (tree(VALUE), 5)


def test_what_has_changed_is_read_though(place: Place) -> None:
    place.fill()
    (place.root / "d" / "g").write_text("9")
    (place.root / "f").unlink()
    (place.root / "d" / "h").rename(place.root / "d" / "i")
    (place.root / "l").unlink()
    (place.root / "l").symlink_to("elsewhere")
    write(place.root / "n", {"m": "7"})
    wanted = {
        "x": "2*",
        "d": {"e": {}, "g": "9", "i": {"new\nline": "4"}},
        "l": "->elsewhere",
        "é": {"ü": "5"},
        "n": {"m": "7"},
    }
    assert place.read() == (tree(wanted), 3)


def test_39_same_size_and_time_restored_is_noticed(place: Place) -> None:
    place.fill()
    path = place.root / "f"
    status = path.stat()
    path.write_text("X")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert place.read() == (tree({**VALUE, "f": "X"}), 1)


def test_a_file_with_another_token_is_not_used(place: Place) -> None:
    place.fill()
    assert place.read(trust="boot 2") == (tree(VALUE), 5)
    assert place.read(trust="") == (tree(VALUE), 5)
    end = place.open()
    end.scan()
    end.save_cache("boot 2")
    end.close()
    assert place.read()[1] == 5
    assert place.read(trust="boot 2")[1] == 0


def test_what_could_not_be_trusted_in_memory_is_not_kept(place: Place) -> None:
    place.fill()
    found = cache.load(os.fspath(place.cache), "boot 1")
    assert found is not None
    # As a scanner has it that read the file within the clock's granularity.
    known = found[0].records.unpacked()
    found[0].records = Records({**known, "f": known["f"][: records.INODE.stop]})
    cache.save(os.fspath(place.cache), found, "boot 1")
    assert place.read() == (tree(VALUE), 1)


def test_other_rules_hold_at_once(place: Place) -> None:
    ignore = parse(["g", "é"])
    place.fill()
    shown, read = place.read(ignore=ignore)
    assert read == 0
    place.cache.unlink()
    assert (shown, 3) == place.read(ignore=ignore)
    place.fill(ignore)
    assert place.read() == (tree(VALUE), 2)


def test_a_problem_is_not_kept(place: Place) -> None:
    os.mkfifo(place.root / "fifo")
    (place.root / os.fsdecode(b"b\xff")).write_text("1")
    first = place.read()[0]
    place.fill()
    found = cache.load(os.fspath(place.cache), "boot 1")
    assert found is not None
    assert set(found[0].entry.children) == set(VALUE)
    assert place.read() == (first, 0)


def test_a_single_file(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.root.write_text("1")
    place.fill()
    assert place.read() == (tree("1"), 0)
    place.root.write_text("2")
    assert place.read() == (tree("2"), 1)
    # Another kind of root than was saved.
    place.root.unlink()
    write(place.root, {"a": "1"})
    assert place.read() == (tree({"a": "1"}), 1)
    place.fill()
    (place.root / "a").unlink()
    place.root.rmdir()
    place.root.write_text("1")
    assert place.read() == (tree("1"), 1)


def test_a_file_that_is_something_else_is_ignored(place: Place) -> None:
    for data in (b"", b"wherry-scan\x01", b"wherry-scan\x02" + bytes(100), b"\0" * 1000):
        place.cache.write_bytes(data)
        assert place.read() == (tree(VALUE), 5)
    place.cache.unlink()
    place.cache.mkdir()
    assert place.read() == (tree(VALUE), 5)
    place.cache.rmdir()
    place.cache.symlink_to("/dev/zero")
    assert place.read() == (tree(VALUE), 5)


def test_one_that_cannot_be_written_leaves_the_old_one(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.fill()
    before = place.cache.read_bytes()
    end = place.open()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            end.save_cache()
    end.close()
    assert place.cache.read_bytes() == before
    assert not place.cache.with_name("cache.new").exists()


def sample() -> bytes:
    """Return a small file's contents."""
    record = records.STATUS.pack(0o100644, 5, 1, 6, 7)
    leaf = file(False, 1, bytes(32))
    inner = Node(Directory({"f": leaf}), Records({"f": record}), {})
    children: dict[str, Entry] = {"d": inner.entry, "f": leaf, "l": Leaf(b"Lx")}
    known = {"d": bytes(8), "f": record, "l": record}
    return cache.encode(
        (Node(Directory(children), Records(known), {"d": inner}), (b"", problem(""))), "t", NOW_NS
    )


SAMPLE = sample()
START = len(SAMPLE) - len(SAMPLE[len(cache._MAGIC) + 32 :])


def test_the_sample_is_good() -> None:
    found = cache.decode(SAMPLE, "t")
    assert found is not None
    assert cache.encode(found, "t", NOW_NS) == SAMPLE


@given(st.integers(0, len(SAMPLE) - 1), st.integers(1, 255))
def test_a_damaged_file_is_ignored(offset: int, difference: int) -> None:
    data = bytearray(SAMPLE)
    data[offset] ^= difference
    assert cache.decode(bytes(data), "t") is None


@given(st.integers(0, len(SAMPLE) - 1), st.binary(max_size=5))
def test_a_truncated_or_longer_file_is_ignored(size: int, more: bytes) -> None:
    assert cache.decode(SAMPLE[:size], "t") is None
    assert cache.decode(SAMPLE + b"\0" + more, "t") is None


@given(st.integers(START, len(SAMPLE)), st.integers(0, 8), st.binary(max_size=8))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_nonsense_with_a_good_checksum_is_ignored_or_well_formed(
    offset: int, removed: int, put: bytes
) -> None:
    body = SAMPLE[START:offset] + put + SAMPLE[offset + removed :]
    found = cache.decode(cache._MAGIC + hashing.digest(body) + body, "t")
    if found is not None:
        for node in (found[0], *found[0].nodes.values()):
            assert node.records.unpacked().keys() == node.entry.children.keys()
            assert all(
                (name in node.nodes) == isinstance(child, Directory)
                for name, child in node.entry.children.items()
            )


def test_100_000_entries_are_loaded_within_half_a_second() -> None:
    children: dict[str, Entry] = {}
    nodes: dict[str, Node] = {}
    known: dict[str, bytes] = {}
    for number in range(1000):
        numbers = range(number * 100, number * 100 + 100)
        marks = {f"file-{n}.py": records.STATUS.pack(0o100644, n, 9, n, n) for n in numbers}
        leaves = {f"file-{n}.py": file(False, 9, n.to_bytes(32, "big")) for n in numbers}
        name = f"directory-{number}"
        nodes[name] = Node(Directory(leaves), Records(marks), {})
        children[name] = nodes[name].entry
        known[name] = number.to_bytes(8, "big")
    before = Node(Directory(children), Records(known), nodes)
    data = cache.encode((before, (b"", problem(""))), "t", NOW_NS)
    assert len(data) < 100_000 * 100
    for _ in range(3):
        began = time.process_time()
        found = cache.decode(data, "t")
        taken = time.process_time() - began
        if taken < 0.5:
            break
    assert found is not None
    assert found[0].entry == before.entry
    assert taken < 0.5
