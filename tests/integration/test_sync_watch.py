"""The host's watch on this system, for real."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sync_trees import change_at_random, exchange, write

from wherry.sync.core.rules import parse
from wherry.sync.watch import HostWatch
from wherry_sync.entry import TEMPORARY_PREFIX
from wherry_sync.scan import Scanner

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="inotify")

QUEUE = Path("/proc/sys/fs/inotify/max_queued_events")


class Place:
    """A tree, its watch, and how often it called."""

    def __init__(self, root: Path, **options: object) -> None:
        self.root = root
        self.called = threading.Event()
        self.calls = 0
        self.watch = HostWatch(root, self.count, **options)  # type: ignore[arg-type]

    def count(self) -> None:
        self.calls += 1
        self.called.set()

    def take(self) -> set[str]:
        found = self.watch.take()
        assert found is not None
        return found


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    root = tmp_path / "root"
    write(root, {"a": {"b": {"f": "1"}}, "c": {}})
    made = Place(root)
    assert made.watch.take() is None
    yield made
    made.watch.close()
    made.watch.close()
    assert made.watch.problem is None


@contextlib.contextmanager
def short_queue() -> Iterator[None]:
    """Have new instances of inotify queue 16 events at most."""
    before = QUEUE.read_text()
    try:
        QUEUE.write_text("16")
    except OSError as error:
        pytest.skip(f"needs the right to set fs.inotify.max_queued_events: {error.strerror}")
    try:
        yield
    finally:
        QUEUE.write_text(before)


def test_what_a_call_has_changed_is_in_the_next_answer(place: Place) -> None:
    root = place.root
    assert place.watch.exact
    assert place.take() == set()
    (root / "a" / "b" / "f").write_text("2")
    assert place.take() == {"a/b"}
    (root / "a" / "b" / "f").chmod(0o755)
    assert place.take() == {"a/b"}
    (root / "a" / "b" / "f").rename(root / "c" / "f")
    assert place.take() == {"a/b", "c"}
    (root / "c" / "f").unlink()
    assert place.take() == {"c"}
    (root / "new\nline" / "é").mkdir(parents=True)
    assert place.take() == {"", "new\nline", "new\nline/é"}
    (root / "new\nline" / "é" / "f").write_text("1")
    assert place.take() == {"new\nline/é"}
    assert place.take() == set()


def test_directories_that_move_are_watched_where_they_are(place: Place, tmp_path: Path) -> None:
    root = place.root
    (root / "a").rename(root / "c" / "a")
    assert place.take() >= {"", "c"}
    (root / "c" / "a" / "b" / "f").write_text("2")
    assert place.take() == {"c/a/b"}
    (root / "c" / "a").rename(tmp_path / "away")
    assert place.take() == {"c"}
    (tmp_path / "away" / "b" / "f").write_text("3")
    assert place.take() == set()
    (tmp_path / "away").rename(root / "back")
    place.take()
    (root / "back" / "b" / "f").write_text("4")
    assert place.take() == {"back/b"}
    # Between two answers it goes to and fro.
    (root / "back").rename(root / "x")
    (root / "x").rename(root / "back")
    (root / "back").rename(root / "c" / "y")
    assert place.take() >= {"", "c"}
    (root / "c" / "y" / "b" / "g").write_text("5")
    assert place.take() == {"c/y/b"}
    shutil.rmtree(root / "c")
    place.take()
    write(root / "c", {"y": {"b": {}}})
    place.take()
    (root / "c" / "y" / "b" / "g").write_text("6")
    assert place.take() == {"c/y/b"}


def test_two_that_are_exchanged_are_watched_both(place: Place) -> None:
    root = place.root
    exchange(root / "a", root / "c")
    assert place.take() >= {"", "a", "c", "c/b"}
    for path in ("a/f", "c/f", "c/b/f"):
        (root / path).write_text("2")
        assert place.take() == {path.rpartition("/")[0]}
    exchange(root / "a", root / "c" / "b")
    place.take()
    for path in ("a/f", "c/f", "c/b/f"):
        (root / path).write_text("3")
        assert place.take() == {path.rpartition("/")[0]}


def test_63_scans_of_what_is_told_find_all_that_is_done(tmp_path: Path) -> None:
    """A thousand random steps, with another thread's at the same time."""
    root = tmp_path / "root"
    root.mkdir()
    place = Place(root)
    scanner = Scanner(granularity_ns=0)
    fd = os.open(root, os.O_RDONLY)
    seed = random.randrange(1 << 32)
    stop = threading.Event()

    def others() -> None:
        draw = random.Random(seed + 1)
        while not stop.is_set():
            change_at_random(draw, root)
            time.sleep(0.0005)

    try:
        for rounds in range(3):
            draw = random.Random(seed + 2 + rounds)
            stop.clear()
            thread = threading.Thread(target=others)
            thread.start()
            try:
                for _ in range(200):
                    change_at_random(draw, root)
                    scanner.scan(fd, place.watch.take())
            finally:
                stop.set()
                thread.join(30)
            for _ in range(100):
                change_at_random(draw, root)
                found = scanner.scan(fd, place.watch.take()).root
                assert found == Scanner(granularity_ns=0).scan(fd).root, seed
        assert place.watch.problem is None
    finally:
        os.close(fd)
        place.watch.close()


def test_it_calls_at_once_and_once(place: Place) -> None:
    waited = []
    for number in range(30):
        place.called.clear()
        began = time.perf_counter()
        (place.root / "a" / "b" / "f").write_text(str(number))
        assert place.called.wait(5)
        waited.append(time.perf_counter() - began)
        assert place.take() == {"a/b"}
        time.sleep(0.01)
    assert statistics.median(waited) < 0.02
    calls = place.calls
    place.called.clear()
    for number in range(100):
        (place.root / "a" / "b" / "f").write_text(str(number))
    assert place.called.wait(5)
    time.sleep(0.05)
    assert place.calls == calls + 1
    place.take()


def test_43_an_overflow_asks_for_everything_and_the_watch_goes_on(tmp_path: Path) -> None:
    with short_queue():
        place = Place(tmp_path)
    try:
        assert place.watch.take() is None
        assert place.take() == set()
        with place.watch._watcher._lock:  # type: ignore[union-attr]
            for number in range(50):
                (tmp_path / str(number)).mkdir()
        assert place.watch.take() is None
        # Of these no event was told.
        (tmp_path / "49" / "f").write_text("1")
        assert place.take() == {"49"}
        assert place.watch.problem is None
    finally:
        place.watch.close()


def test_43_an_overflow_calls_by_itself(tmp_path: Path) -> None:
    with short_queue():
        place = Place(tmp_path)
    try:
        place.watch.take()
        with place.watch._watcher._lock:  # type: ignore[union-attr]
            for number in range(50):
                (tmp_path / str(number)).write_text("1")
        assert place.called.wait(5)
        assert place.watch.take() is None
        assert place.watch.problem is None
    finally:
        place.watch.close()


def test_46_the_limit_of_watches_is_named_and_nothing_is_promised(tmp_path: Path) -> None:
    """In a user namespace, whose limits are its own."""
    code = """
import sys
from pathlib import Path
from wherry.sync.watch import HostWatch

root = Path(sys.argv[1])
Path("/proc/sys/user/max_inotify_watches").write_text("20")

def make(count):
    for number in range(count):
        (root / "d" / str(number)).mkdir(parents=True, exist_ok=True)

def failed(watch):
    assert [watch.take(), watch.take()] == [None, None]
    assert not watch.exact
    watch.close()
    print(watch.problem)

make(10)
watch = HostWatch(root, lambda: None)
assert [watch.take(), watch.take()] == [None, set()]
assert watch.exact
make(40)
failed(watch)
failed(HostWatch(root, lambda: None))
"""
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-c", code, tmp_path]
    tried = subprocess.run([*command[:3], "true"], capture_output=True, timeout=30)
    if tried.returncode != 0:
        pytest.skip(f"needs unshare: {tried.stderr.decode().strip()}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 2
    for line in said:
        assert "is reached; raise" in line
        assert "max_user_watches" in line


def test_48_a_root_that_goes_ends_the_watch(tmp_path: Path) -> None:
    for number, go in enumerate((Path.rmdir, lambda path: path.rename(tmp_path / "other"))):
        root = tmp_path / str(number)
        root.mkdir()
        place = Place(root)
        try:
            place.watch.take()
            go(root)
            assert place.called.wait(5)
            assert place.watch.take() is None
            assert place.watch.problem == f"{root}: it was moved, removed or unmounted"
        finally:
            place.watch.close()
    # Another tree is in its place, as a directory above it was moved.
    root = tmp_path / "above" / "root"
    root.mkdir(parents=True)
    place = Place(root)
    try:
        assert [place.watch.take(), place.watch.take()] == [None, set()]
        root.parent.rename(tmp_path / "aside")
        root.mkdir(parents=True)
        assert place.watch.take() is None
        assert place.watch.problem == f"{root}: it was moved, removed or unmounted"
    finally:
        place.watch.close()
    place = Place(tmp_path / "missing" / "one")
    assert place.watch.take() is None
    assert place.watch.problem is not None
    place.watch.close()


def test_a_root_that_appears_is_watched_with_all_that_is_in_it(tmp_path: Path) -> None:
    root = tmp_path / "root"
    place = Place(root)
    try:
        assert [place.watch.take(), place.watch.take()] == [None, set()]
        write(root, {"a": {"f": "1"}})
        assert place.called.wait(5)
        assert [place.watch.take(), place.watch.take()] == [None, set()]
        (root / "a" / "f").write_text("2")
        assert place.take() == {"a"}
    finally:
        place.watch.close()


@pytest.mark.parametrize("single", [False, True])
def test_a_root_that_is_a_link_which_leads_elsewhere(tmp_path: Path, single: bool) -> None:
    link, below = tmp_path / "now", "" if single else "a/b"
    for name in ("one", "two"):
        write(tmp_path / name, {"a": {"b": {"f": name}}})
    end = "a/b/f" if single else ""
    link.symlink_to(tmp_path / "one" / end)
    place = Place(link)
    try:
        assert place.watch.take() is None
        for name in ("two", "one"):
            assert place.take() == set()
            (tmp_path / "new").symlink_to(tmp_path / name / end)
            (tmp_path / "new").rename(link)
            assert place.watch.take() is None
            (tmp_path / name / "a" / "b" / "f").write_text("edited")
            assert place.take() == {below}
        assert place.watch.problem is None
    finally:
        place.watch.close()


def test_ignored_directories_have_no_watch_and_ignored_files_tell_nothing(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write(root, {"node_modules": {"p": {}}, "log": "", f"{TEMPORARY_PREFIX}s": {}, "d": {}})
    place = Place(root, ignore=parse(["node_modules", "log"]))
    try:
        place.watch.take()
        (root / "node_modules" / "p" / "f").write_text("1")
        (root / f"{TEMPORARY_PREFIX}s" / "f").write_text("1")
        (root / "log").write_text("1")
        assert place.take() == set()
        (root / "d" / "node_modules" / "q").mkdir(parents=True)
        assert place.take() == {"d"}
        (root / "d" / "node_modules" / "q" / "f").write_text("1")
        assert place.take() == set()
        # Whether there is something ignored at all still matters.
        (root / "log").unlink()
        assert place.take() == {""}
    finally:
        place.watch.close()


def test_a_single_file_is_watched_through_atomic_saves(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("1")
    place = Place(path)
    try:
        assert place.watch.take() is None
        (tmp_path / "g").write_text("2")
        assert place.take() == set()
        path.write_text("3")
        assert place.take() == {""}
        (tmp_path / "g").rename(path)
        assert place.take() == {""}
        path.write_text("4")
        assert place.take() == {""}
    finally:
        place.watch.close()


def test_a_directory_that_is_in_the_tree_twice_cannot_be_watched(tmp_path: Path) -> None:
    write(tmp_path, {"a": {"x": {}}, "b": {}})
    command = ["mount", "--bind", tmp_path / "a", tmp_path / "b"]
    done = subprocess.run(command, capture_output=True, timeout=30)
    if done.returncode != 0:
        pytest.skip(f"needs mount: {done.stderr.decode().strip()}")
    try:
        place = Place(tmp_path)
        place.watch.close()
        assert place.watch.problem is not None
        assert "it is the same directory as" in place.watch.problem
        assert place.watch.take() is None
    finally:
        subprocess.run(["umount", tmp_path / "b"], check=True, timeout=30)


@contextlib.contextmanager
def mounted(at: Path, *options: object) -> Iterator[None]:
    command = ["mount", *map(str, options), str(at)]
    done = subprocess.run(command, capture_output=True, timeout=30)
    if done.returncode != 0:
        pytest.skip(f"needs mount: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", at], check=True, timeout=30)


@pytest.mark.parametrize("what", ["tmpfs", "directory", "file", "tmpfs on it"])
def test_what_is_mounted_in_a_tree_is_looked_at(what: str, place: Place, tmp_path: Path) -> None:
    name = "odd \\040\n"
    at, other = place.root / name, tmp_path / "other"
    other.mkdir()
    at.touch() if what == "file" else at.mkdir()
    (other / "f").touch()
    options = ["-t", "tmpfs", "none"] if what.startswith("tmpfs") else ["--bind", other]
    if what == "file":
        options = ["--bind", other / "f"]
    with contextlib.ExitStack() as below:
        if what == "tmpfs on it":
            below.enter_context(mounted(at, *options))
        place.watch.take()
        place.called.clear()
        with mounted(at, *options):
            assert place.called.wait(10)
            assert place.watch.take() is None
            assert place.take() == set()
            if what == "directory":
                (at / "g").touch()
                assert place.take() == {name}
            place.called.clear()
        assert place.called.wait(10)
        assert place.watch.take() is None
        if not below:
            (at if what == "file" else at / "g").touch()
            assert place.take() == {"" if what == "file" else name}
    place.watch.take()


def test_what_is_mounted_elsewhere_costs_nothing(place: Place, tmp_path: Path) -> None:
    beside = tmp_path / "root-else"
    beside.mkdir()
    assert place.take() == set()
    with mounted(beside, "-t", "tmpfs", "none"):
        (beside / "d").mkdir()
        assert place.take() == set()
        (place.root / "c" / "f").touch()
        assert place.take() == {"c"}
    assert place.take() == set()


def test_a_filesystem_that_is_mounted_in_a_tree_is_not_walked(place: Place) -> None:
    with mounted(place.root / "c", "-t", "tmpfs", "none"):
        write(place.root / "c", {"d": {"f": "1"}})
        assert place.watch.take() is None
        (place.root / "c" / "d" / "f").write_text("2")
        assert place.take() == set()
        (place.root / "a" / "f").touch()
        assert place.take() == {"a"}
    assert place.watch.take() is None
    (place.root / "c" / "f").touch()
    assert place.take() == {"c"}


def test_closing_leaves_nothing(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir())), threading.active_count()
    for _ in range(20):
        place = Place(tmp_path)
        (tmp_path / "f").write_text("1")
        place.watch.close()
        place.watch.take()
    assert (len(list(Path("/proc/self/fd").iterdir())), threading.active_count()) == before
