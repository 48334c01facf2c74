"""The guest's watch, on a real filesystem with a real kernel."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sync_trees import change_at_random, tree, write

from wherry_sync.entry import TEMPORARY_PREFIX
from wherry_sync.fanotify import Changes, Watch
from wherry_sync.scan import Scanner

LIMIT = Path("/proc/sys/fs/fanotify/max_queued_events")
# Changes the tree as a process of its own, as a container does.
WRITER = """
import mmap, os, sys
kind, path = sys.argv[1:3]
if kind == "write":
    with open(path, "r+b", buffering=0) as file:
        file.write(sys.argv[3].encode())
elif kind == "map":
    file = os.open(path, os.O_RDWR)
    mapped = mmap.mmap(file, 0)
    os.close(file)
    mapped[:4] = b"old."
    print(end="x", flush=True)
    sys.stdin.read(1)
    mapped[:4] = b"new."
    os._exit(0)
"""


def missing() -> str:
    """Return what these tests need and this computer has not."""
    if sys.platform != "linux":
        return "Linux"
    if os.geteuid() != 0:
        return "root, to mark a filesystem"
    return "" if shutil.which("mkfs.ext4") else "mkfs.ext4"


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A filesystem like the guest's data disk, which nobody else writes to."""
    if needed := missing():
        pytest.skip(f"needs {needed}")
    directory = tmp_path_factory.mktemp("fanotify")
    image, at = directory / "image", directory / "mounted"
    at.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-I", "256", image], check=True, timeout=30)
    done = subprocess.run(["mount", "-o", "loop", image, at], capture_output=True, timeout=30)
    if done.returncode != 0:
        pytest.skip(f"needs a loop device: {done.stderr.decode().strip()}")
    try:
        Watch(os.fspath(at)).close()
    except OSError as error:
        pytest.skip(f"needs a kernel that can watch filesystems: {error.strerror}")
    else:
        yield at
    finally:
        subprocess.run(["umount", at], check=True, timeout=30)


class Place:
    """A tree, its watch, and the drain's answers about it."""

    def __init__(self, mounted: Path, unlimited: bool = True) -> None:
        self.mounted = mounted
        self.root = mounted / "data" / "root"
        self.root.mkdir(parents=True)
        self.watch = Watch(os.fspath(mounted), unlimited=unlimited)
        self.watch.add(os.fspath(self.root))

    def drain(self) -> Changes:
        return self.watch.drain().get(os.fspath(self.root), Changes())

    def run(self, *arguments: str | Path) -> Changes:
        """Run a command in the root, and return what the watch tells after its end."""
        subprocess.run(arguments, cwd=self.root, check=True, timeout=30)
        return self.drain()

    def close(self) -> None:
        self.watch.close()
        for path in self.mounted.iterdir():
            if path.name != "lost+found":
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture
def place(mounted: Path) -> Iterator[Place]:
    made = Place(mounted)
    yield made
    made.close()


def test_nothing_is_told_of_nothing(place: Place) -> None:
    assert place.watch.drain() == {}


def test_each_change_names_its_directory(place: Place) -> None:
    (place.root / "d").mkdir()
    place.drain()
    found = place.run("sh", "-c", "echo 1 > d/f")
    assert (found.directories, found.files) == ({"d"}, {"d/f"})
    assert found.foreign
    assert not found.lost
    found = place.run("sh", "-c", "echo 2 >> d/f")
    assert (found.directories, found.files) == ({"d"}, {"d/f"})
    found = place.run("mv", "d/f", "g")
    assert (found.directories, found.files) == ({"", "d"}, set())
    found = place.run("sh", "-c", "mkdir e; mv e d/m; rmdir d/m")
    assert (found.directories, found.arrived) == ({"", "d", "e"}, {"d/m"})
    assert place.run("chmod", "+x", "g").directories == {""}
    assert place.run("ln", "-s", "nowhere", "d/l").directories == {"d"}
    assert place.run("ln", "g", "d/h").directories == {"d"}
    assert place.run("mkfifo", "d/p").directories == {"d"}
    assert place.run("rm", "d/h").directories == {"d"}
    assert place.run("rm", "-r", "d").directories >= {""}
    assert place.watch.drain() == {}


def test_a_deep_tree_made_at_once_is_told_down_to_what_is_new(place: Place) -> None:
    found = place.run("sh", "-c", "mkdir -p a/b/c/d/e && echo 1 > a/b/c/d/e/f")
    assert "" in found.directories
    assert "a/b/c/d/e/f" in found.files
    assert not found.lost


def test_a_scan_of_what_is_told_finds_all(place: Place) -> None:
    """Moves in, out and within; one directory in another's place; the paths afterwards."""
    scanner = Scanner(granularity_ns=0)
    outside = place.mounted / "outside"
    write(outside, {"t": {"u": {"f": "1"}}})
    write(place.root, {"a": {"x": {"f": "1"}}, "b": {"x": {"f": "2"}}, "c": {}, "z": "0"})
    fd = os.open(place.root, os.O_RDONLY)
    try:
        # So these are known to be elsewhere.
        place.run("touch", outside / "t" / "x", outside / "t" / "u" / "f")
        (outside / "t" / "x").unlink()
        place.drain()
        scanner.scan(fd)
        for command, wanted in (
            ("mv ../../outside/t .", {"t": {"u": {"f": "1"}}}),
            ("echo 3 > t/u/g", {"t": {"u": {"f": "1", "g": "3\n"}}}),
            ("mv t c/v; echo 4 > c/v/u/f", {"c": {"v": {"u": {"f": "4\n", "g": "3\n"}}}}),
            ("mv c/v/u ../../outside/w", {"c": {"v": {}}}),
            ("echo 5 > ../../outside/w/f", {"c": {"v": {}}}),
            ("mv a q; mv b a; mv q b", {"a": {"x": {"f": "2"}}, "b": {"x": {"f": "1"}}}),
            ("rm -r a; mv b a; mv -T a/x a/y; echo 6 > a/y/f", {"a": {"y": {"f": "6\n"}}}),
            ("mkdir n; mv n m; echo 7 > m/f; mv m o; rmdir c/v c", {"o": {"f": "7\n"}}),
        ):
            found = place.run("sh", "-ec", command)
            assert not found.lost
            scanned = scanner.scan(fd, found.directories, found.files, found.arrived)
            fresh = Scanner(granularity_ns=0).scan(fd).root
            assert scanned.root == fresh, command
            for name, value in wanted.items():
                assert fresh.children[name] == tree(value)  # type: ignore[union-attr]
        assert fresh == tree({"a": {"y": {"f": "6\n"}}, "o": {"f": "7\n"}, "z": "0"})
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    "commands",
    [
        # Which number a directory gets is up to the filesystem; ext4 gives the one that is free.
        ["rm -r d; mkdir d"],
        ["rm -r d", "mkdir d"],
        ["rm -r d; mkdir d d/e"],
        ["rm -r d; mkdir t; echo 2 > t/f", "mv t d"],
        ["rm -r d; mkdir -p t/e; echo 2 > t/e/f", "mv t d"],
        # Here it is the same one in any case.
        ["mv d t; echo 2 > t/f; mkdir t/n", "mv t d"],
        ["mv d t; echo 2 > t/e/f", "rm t/e/g", "mv t u; mv u d"],
        ["mv d ../t; echo 2 > ../t/f; rm ../t/e/g", "mv ../t d"],
        ["mv d/e t; echo 2 > t/f", "mv t d/e"],
        ["mv d p/d; echo 2 > p/d/e/f", "mv p q; mv q/d d"],
    ],
)
def test_a_directory_in_anothers_place_with_its_inode(place: Place, commands: list[str]) -> None:
    """The watch is drained after each command, and there is no scan before the last one."""
    scanner = Scanner(granularity_ns=0)
    write(place.root, {"d": {"f": "1", "e": {"f": "1", "g": "1"}}, "p": {}})
    fd = os.open(place.root, os.O_RDONLY)
    try:
        place.drain()
        scanner.scan(fd)
        found = Changes()
        for command in commands:
            found.add(place.run("sh", "-ec", command))
        assert not found.lost
        scanned = scanner.scan(fd, found.directories, found.files, found.arrived)
        assert scanned.root == Scanner(granularity_ns=0).scan(fd).root
    finally:
        os.close(fd)


def test_63_scans_of_what_is_told_find_all_that_is_done(place: Place) -> None:
    """Random steps; the watch is drained more often than there are scans, as the agent does."""
    seed = random.randrange(1 << 32)
    draw = random.Random(seed)
    scanner = Scanner(granularity_ns=0)
    seen = Changes()
    fd = os.open(place.root, os.O_RDONLY)
    try:
        scanner.scan(fd)
        for _ in range(1500):
            change_at_random(draw, place.root)
            if draw.random() < 0.5:
                seen.add(place.drain())
            if draw.random() < 0.2:
                seen.add(place.drain())
                assert not seen.lost, seed
                found = scanner.scan(fd, seen.directories, seen.files, seen.arrived).root
                seen = Changes()
                assert found == Scanner(granularity_ns=0).scan(fd).root, seed
    finally:
        os.close(fd)


def test_a_file_written_through_a_mapping_in_a_directory_that_moved_there_and_back(
    place: Place,
) -> None:
    """The page is dirty at the scan, and the file told of at a path that it has no more."""
    write(place.root, {"d": {"f": "....rest"}})
    scanner = Scanner(granularity_ns=0)
    fd = os.open(place.root, os.O_RDONLY)
    try:
        with (
            (place.root / "d" / "f").open("r+b") as file,
            mmap.mmap(file.fileno(), 0) as mapped,
        ):
            mapped[:4] = b"old."
            place.drain()
            assert scanner.scan(fd).root == tree({"d": {"f": "old.rest"}})
            (place.root / "d").rename(place.root / "t")
            mapped[:4] = b"new."
        found = place.drain()
        assert found.directories == {"", "t"}
        (place.root / "t").rename(place.root / "d")
        found.add(place.drain())
        scanned = scanner.scan(fd, found.directories, found.files, found.arrived)
        assert scanned.root == tree({"d": {"f": "new.rest"}})
    finally:
        os.close(fd)


def test_55_a_file_written_through_a_mapping_is_told_when_its_writer_is_dead(place: Place) -> None:
    """The page is dirty at the scan, so the second store changes nothing but the contents."""
    path = place.root / "f"
    path.write_text("....rest")
    scanner = Scanner(granularity_ns=0)
    fd = os.open(place.root, os.O_RDONLY)
    writer = subprocess.Popen(
        [sys.executable, "-IS", "-c", WRITER, "map", path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert writer.stdin is not None
        assert writer.stdout is not None
        assert writer.stdout.read(1) == b"x"
        place.drain()
        assert scanner.scan(fd).root == tree({"f": "old.rest"})
        writer.stdin.write(b"x")
        writer.stdin.close()
        writer.wait(30)
        found = place.drain()
        assert found.files == {"f"}
        # This is what the file's record alone would have led to.
        assert scanner.scan(fd, found.directories).root == tree({"f": "old.rest"})
        assert scanner.scan(fd, found.directories, found.files).root == tree({"f": "new.rest"})
    finally:
        os.close(fd)
        writer.kill()
        writer.wait()
        writer.stdout.close()


def test_a_process_that_has_ended_has_been_told_of_300_times(place: Place) -> None:
    """Half of them by a store to a mapping alone, which the death itself has to tell."""
    (place.root / "d").mkdir()
    for name in range(10):
        (place.root / "d" / str(name)).write_bytes(bytes(8))
    place.drain()
    missed = []
    for number in range(300):
        name = str(number % 10)
        child = os.fork()
        if child == 0:
            fd = os.open(place.root / "d" / name, os.O_RDWR)
            if number % 2:
                os.pwrite(fd, number.to_bytes(8, "big"), 0)
            else:
                mapped = mmap.mmap(fd, 0)
                mapped[:8] = number.to_bytes(8, "big")
            os._exit(0)
        os.waitpid(child, 0)
        found = place.drain()
        if found.files != {f"d/{name}"} or found.lost or not found.foreign:
            missed.append((number, found))
    assert not missed


def test_what_this_process_does_is_told_as_its_own(place: Place) -> None:
    (place.root / "f").write_text("1")
    found = place.drain()
    assert found.directories == {""}
    assert found.files == set()
    assert not found.foreign
    (place.root / "f").write_text("2")
    found = place.run("touch", "g")
    assert found.files == {"g"}
    assert found.foreign


def test_what_is_ours_and_what_is_elsewhere_is_not_told(place: Place) -> None:
    stage = place.root / f"{TEMPORARY_PREFIX}stage"
    stage.mkdir()
    (stage / "c-1").write_text("1")
    write(place.mounted / "data" / "root2", {"f": "1", "d": {"g": "1"}})
    write(place.mounted / "elsewhere", {"f": "1"})
    assert place.watch.drain() == {}
    (stage / "c-1").rename(place.root / "f")
    assert place.drain().directories == {""}


def test_names_of_any_kind(place: Place) -> None:
    for name in (b"new\nline", "Grüße".encode(), b"b\xffd", b"x (deleted)"):
        (place.root / os.fsdecode(name)).mkdir()
    place.drain()
    assert place.run("sh", "-c", "echo 1 > 'new\nline/f'").files == {"new\nline/f"}
    assert place.run("sh", "-c", "echo 1 > Grüße/f").files == {"Grüße/f"}
    assert place.run("sh", "-c", "echo 1 > 'x (deleted)/f'").files == {"x (deleted)/f"}
    # The scan has problems with these names; nothing below them is synchronised.
    found = place.run("sh", "-c", "echo 1 > b*d/f; echo 1 > \"$(printf 'q\\377')\"")
    assert (found.directories, found.files, found.lost) == ({""}, set(), False)


def test_a_path_longer_than_the_kernel_tells_concerns_its_tree_alone(place: Place) -> None:
    other = place.mounted / "other"
    other.mkdir()
    place.watch.add(os.fspath(other))
    deep = "import os\nfor _ in range(30): os.mkdir('d' * 200); os.chdir('d' * 200)\nopen('f', 'w')"
    place.run(sys.executable, "-ISc", deep)
    fd = os.open(place.root, os.O_RDONLY)
    for _ in range(30):
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open("g", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)
    found = place.watch.drain()
    assert set(found) == {os.fspath(place.root)}
    assert found[os.fspath(place.root)].lost


def test_trees_are_told_apart_and_may_be_in_each_other(place: Place) -> None:
    inner = place.root / "in"
    other = place.mounted / "data" / "root-2"
    for path in (inner, other):
        path.mkdir()
        place.watch.add(os.fspath(path))
    place.watch.drain()
    subprocess.run(["touch", inner / "f"], check=True, timeout=30)
    found = place.watch.drain()
    assert {path: told.files for path, told in found.items()} == {
        os.fspath(place.root): {"in/f"},
        os.fspath(inner): {"f"},
    }
    place.watch.remove(os.fspath(inner))
    place.watch.remove("/not/watched")
    subprocess.run(["touch", inner / "f", other / "f"], check=True, timeout=30)
    assert set(place.watch.drain()) == {os.fspath(place.root), os.fspath(other)}


def test_a_single_file_stays_watched_through_atomic_saves(place: Place) -> None:
    path = place.mounted / "file"
    root = os.fspath(path)
    path.write_text("1")
    place.watch.add(root)
    place.watch.drain()
    subprocess.run(["sh", "-c", f"echo 2 > {path}"], check=True, timeout=30)
    found = place.watch.drain()[root]
    assert (found.directories, found.files, found.lost) == ({""}, {""}, False)
    subprocess.run(["sh", "-c", f"echo 3 > {path}2; mv {path}2 {path}"], check=True, timeout=30)
    found = place.watch.drain()[root]
    assert (found.directories, found.files, found.lost) == ({""}, set(), False)
    (place.mounted / "beside").write_text("1")
    assert place.watch.drain() == {}
    path.unlink()
    assert place.watch.drain()[root].directories == {""}
    assert place.watch.drain() == {}
    path.write_text("4")
    assert place.watch.drain()[root].directories == {""}


def test_48_a_root_that_goes_and_comes_is_lost_each_time(place: Place) -> None:
    shutil.rmtree(place.root)
    assert place.drain().lost
    assert place.watch.drain() == {}
    place.root.mkdir()
    assert place.drain().lost
    assert place.run("touch", "f").files == {"f"}
    # Another directory in its place, and one above it moved away and back.
    place.root.rename(place.mounted / "aside")
    write(place.root, {"d": {"f": "1"}})
    assert place.drain().lost
    assert place.run("touch", "d/f").files == {"d/f"}
    place.root.parent.rename(place.mounted / "above")
    assert place.drain().lost
    (place.mounted / "above").rename(place.root.parent)
    assert place.drain().lost
    assert place.run("touch", "d/f").files == {"d/f"}


def test_43_a_queue_that_overflows_loses_everything_and_says_so(mounted: Path) -> None:
    before = LIMIT.read_text()
    LIMIT.write_text("64")
    try:
        place = Place(mounted, unlimited=False)
    finally:
        LIMIT.write_text(before)
    try:
        assert not place.run("sh", "-c", "for i in 1 2 3; do : > $i; done").lost
        assert place.run("sh", "-c", "for i in $(seq 200); do : > f$i; done").lost
        assert not place.run("touch", "g").lost
    finally:
        place.close()


def test_a_queue_without_limit_does_not(mounted: Path) -> None:
    before = LIMIT.read_text()
    LIMIT.write_text("64")
    try:
        place = Place(mounted)
    finally:
        LIMIT.write_text(before)
    try:
        found = place.run("sh", "-c", "for i in $(seq 200); do : > f$i; done")
        assert len(found.files) == 200
        assert not found.lost
    finally:
        place.close()


def test_a_drain_ends_though_others_never_stop_writing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.read
    numbers = iter(range(1 << 30))

    def read_and_write(fd: int, size: int) -> bytes:
        data = original(fd, size)
        (place.root / str(next(numbers) % 100)).touch()
        return data

    (place.root / "first").touch()
    with monkeypatch.context() as patched:
        patched.setattr(os, "read", read_and_write)
        assert place.drain().directories == {""}
    assert place.drain().directories == {""}
    assert place.watch.drain() == {}


def test_writes_elsewhere_cost_next_to_nothing(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """A directory is looked up once; after that, an event is read and forgotten."""
    noise = place.mounted / "noise"
    write(noise, {str(number): {} for number in range(50)})
    place.watch.drain()
    commands = [
        "for i in $(seq 40); do for d in noise/*; do : > $d/f$i; done; done",
        "for d in noise/*; do rm $d/*; done",
    ]
    opened = []
    original = place.watch._open

    def count(handle: bytes) -> int:
        opened.append(handle)
        return original(handle)

    place.watch._open = count  # type: ignore[method-assign]
    best = 1e9
    for _ in range(4):
        subprocess.run(["sh", "-c", ";".join(commands)], cwd=place.mounted, check=True, timeout=30)
        began = time.perf_counter()
        assert place.watch.drain() == {}
        best = min(best, time.perf_counter() - began)
    events = 50 * 40 * 2
    assert len(opened) == 50
    with capsys.disabled():
        print(f" {best / events * 1e6:.1f} µs an event", end="")
    assert best / events < 100e-6


def test_what_cannot_be_watched_is_refused_with_a_reason(place: Place, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="not on the filesystem"):
        place.watch.add("/proc/self")
    with pytest.raises(OSError, match="is missing"):
        place.watch.add(os.fspath(place.mounted / "no" / "where"))
    with pytest.raises(OSError, match="no file handles"):
        Watch("/proc")
    place.watch.close()
    place.watch.close()
    for call in (place.watch.drain, lambda: place.watch.add("/")):
        with pytest.raises(OSError, match="closed"):
            call()


def test_one_without_the_right_to_is_told(place: Place) -> None:
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from wherry_sync.fanotify import Watch\n"
        "os.setuid(65534)\n"
        "try: Watch('/')\n"
        "except OSError as error: print(error.strerror)"
    )
    guest = Path(sys.modules[Watch.__module__].__file__ or "").parents[1]
    done = subprocess.run(
        [sys.executable, "-ISc", code, guest], capture_output=True, text=True, timeout=30
    )
    assert "CAP_SYS_ADMIN" in done.stdout, done.stderr


def test_handles_are_those_of_the_kernel(place: Place) -> None:
    """The event's handle of a directory is the one that its path gives."""
    assert ctypes.sizeof(ctypes.c_int) == 4
    handle = place.watch._handle(os.fspath(place.root))
    (place.root / "f").write_text("1")
    seen, *_ = place.watch._read()
    assert list(seen) == [handle]
