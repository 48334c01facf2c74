"""Watching trees on macOS and Windows, with their libraries replaced by faithful fakes."""

from __future__ import annotations

import ctypes
import importlib
import queue
import struct
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from ctypes import wintypes
from pathlib import Path
from typing import Any

import pytest

from wherry.platform.base import ChangeSink, Platform
from wherry.sync.core.rules import parse
from wherry.sync.watch import HostWatch

WAIT_S = 10
CREATED, MODIFIED, REMOVED, RENAMED, IS_FILE, IS_DIR = 0x100, 0x1000, 0x200, 0x800, 0x10000, 0x20000


class Place:
    """A tree, its watch on a strange system, and waiting for what that tells."""

    def __init__(self, root: Path, make: Callable[..., Any], rules: list[str]) -> None:
        self._called = threading.Semaphore(0)
        platform = types.SimpleNamespace(watch_tree=make)
        self.watch = HostWatch(root, self._called.release, ignore=parse(rules), platform=platform)  # type: ignore[arg-type]

    def take(self) -> set[str] | None:
        assert self._called.acquire(timeout=WAIT_S)
        return self.watch.take()

    def quiet(self) -> bool:
        return not self._called.acquire(blocking=False)


def forget(names: tuple[str, ...]) -> None:
    """Have modules imported anew: their packages know them as well."""
    for name in names:
        sys.modules.pop(name, None)
        package, _, attribute = name.rpartition(".")
        if package in sys.modules:
            vars(sys.modules[package]).pop(attribute, None)


# macOS


class Stream:
    """``_watchdog_fsevents.Stream``: delivers in the thread that runs it, until it is stopped."""

    made: Stream
    error: Exception | None = None

    def __init__(self, paths: list[str], *, latency: float) -> None:
        self.paths = paths
        self.latency = latency
        self._todo: queue.Queue[list[tuple[str, int]] | None] = queue.Queue()
        self._done: queue.Queue[None] = queue.Queue()
        Stream.made = self

    def run(self, callback: Callable[..., None], started: Callable[[], None]) -> None:
        if Stream.error is not None:
            raise Stream.error
        started()
        while (events := self._todo.get(timeout=WAIT_S)) is not None:
            paths = [path.encode() for path, _ in events]
            numbers = list(range(len(events)))
            callback(paths, numbers, [flags for _, flags in events], numbers)
            self._done.put(None)

    def stop(self) -> None:
        self._todo.put(None)

    def deliver(self, *events: tuple[Path, int]) -> None:
        self._todo.put([(str(path), flags) for path, flags in events])
        self._done.get(timeout=WAIT_S)


@pytest.fixture
def fsevents(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    names = ("watchdog.observers.fsevents", "wherry.platform.fsevents")
    if sys.platform != "darwin":
        forget(names)
        library = types.ModuleType("_watchdog_fsevents")
        monkeypatch.setitem(sys.modules, "_watchdog_fsevents", library)
        monkeypatch.setattr(library, "Stream", Stream, raising=False)
        monkeypatch.setattr(library, "NativeEvent", object, raising=False)
    else:
        pytest.skip("has the real one")
    monkeypatch.setattr(Stream, "error", None)
    module = importlib.import_module("wherry.platform.fsevents")
    yield module.FSEventsWatcher
    forget(names)


@pytest.fixture
def mac(tmp_path: Path, fsevents: Callable[..., Any]) -> Iterator[Place]:
    made = Place(tmp_path, fsevents, ["node_modules", "*.log"])
    assert made.watch.problem is None
    assert not made.watch.exact
    assert made.watch.take() is None
    yield made
    made.watch.close()
    made.watch.close()


def test_macos_tells_the_directories_of_what_has_changed(mac: Place, tmp_path: Path) -> None:
    stream = Stream.made
    assert stream.paths == [str(tmp_path)]
    assert stream.latency <= 0.02
    stream.deliver((tmp_path / "f", CREATED | IS_FILE), (tmp_path / "a/b/g", MODIFIED | IS_FILE))
    assert mac.take() == {"", "a/b"}
    stream.deliver((tmp_path / "a", RENAMED | IS_DIR), (tmp_path, MODIFIED | IS_DIR))
    assert mac.take() == {"", "a"}
    stream.deliver((tmp_path / "é", REMOVED | IS_FILE))
    assert mac.take() == {""}


@pytest.mark.parametrize("flag", [0x1, 0x1 | 0x2, 0x1 | 0x4, 0x8, 0x40, 0x80])
def test_43_macos_that_lost_events_asks_for_everything(
    mac: Place, tmp_path: Path, flag: int
) -> None:
    Stream.made.deliver((tmp_path / "a", CREATED), (tmp_path, flag), (tmp_path / "b", CREATED))
    assert mac.take() is None
    assert mac.watch.problem is None
    Stream.made.deliver((tmp_path / "a" / "b", CREATED | IS_FILE))
    assert mac.take() == {"a"}


def test_macos_that_tells_of_another_place_is_not_understood(mac: Place) -> None:
    Stream.made.deliver((Path("/elsewhere/f"), CREATED))
    assert mac.take() is None


def test_macos_leaves_out_what_is_ignored(mac: Place, tmp_path: Path) -> None:
    Stream.made.deliver(
        (tmp_path / "node_modules/p/q/f", CREATED | IS_FILE),
        (tmp_path / "node_modules/p", MODIFIED | IS_DIR),
        (tmp_path / "a" / ".wherry-x" / "f", CREATED | IS_FILE),
        (tmp_path / "x.log", MODIFIED | IS_FILE),
    )
    assert mac.quiet()
    Stream.made.deliver((tmp_path / "a" / "x.log", CREATED | IS_FILE))
    assert mac.take() == {"a"}


def test_48_macos_says_when_the_root_is_gone(mac: Place, tmp_path: Path) -> None:
    Stream.made.deliver((tmp_path, 0x20))
    assert mac.take() is None
    assert mac.watch.problem is not None
    assert "moved, removed" in mac.watch.problem


def test_macos_says_when_the_stream_ends(mac: Place) -> None:
    Stream.made._todo.put(None)
    assert mac.take() is None
    assert mac.watch.problem is not None
    assert "ended" in mac.watch.problem


def test_macos_says_why_the_stream_did_not_start(
    tmp_path: Path, fsevents: Callable[..., Any]
) -> None:
    Stream.error = ValueError("Cannot start fsevents stream")
    place = Place(tmp_path, fsevents, [])
    assert place.watch.problem is not None
    assert "Cannot start fsevents stream" in place.watch.problem
    assert place.watch.take() is None
    place.watch.close()


def test_macos_watches_a_single_file_in_its_directory(
    tmp_path: Path, fsevents: Callable[..., Any]
) -> None:
    (tmp_path / "f").write_text("1")
    place = Place(tmp_path / "f", fsevents, [])
    assert place.watch.take() is None
    Stream.made.deliver((tmp_path / "g", CREATED | IS_FILE), (tmp_path, MODIFIED | IS_DIR))
    assert place.quiet()
    Stream.made.deliver((tmp_path / "f", RENAMED | IS_FILE))
    assert place.take() == {""}
    place.watch.close()


# Windows

ADDED, DELETED, WRITTEN, OLD_NAME, NEW_NAME = 1, 2, 3, 4, 5


class WindowsError_(OSError):  # noqa: N801 - the name of what it stands for
    """What ``ctypes.WinError`` makes."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(22, text)
        self.winerror = number


class Function:
    """A function of a library: takes the attributes that ctypes' have."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)


class Kernel32:
    """A directory of Windows with one handle: what is told is put in by the test.

    An answer of no bytes is what the system gives when its buffer ran over, or error 1022.

    :ivar plain: whether the filesystem has no extended information.
    :ivar aborted: the error of a read that was cancelled; Wine has another one.
    """

    made: Kernel32

    def __init__(self, name: str) -> None:
        assert name == "kernel32"
        self.answers: queue.Queue[bytes | WindowsError_] = queue.Queue()
        self.missing = False
        self.plain = False
        self.aborted = 995
        self.closed = 0
        self.recursive: list[bool] = []
        self.final_path: str | None = None
        Kernel32.made = self

    def __getattr__(self, name: str) -> Function:
        call = getattr(type(self), f"call_{name}", None)
        function = Function((lambda *arguments: call(self, *arguments)) if call else lambda *_: 1)
        setattr(self, name, function)
        return function

    def call_CreateFileW(self, path: str, *_: object) -> int:  # noqa: N802
        if self.missing:
            raise WindowsError_(2, "The system cannot find the file specified")
        self.final_path = path
        return 42

    def call_CloseHandle(self, handle: int) -> int:  # noqa: N802
        self.closed += 1
        return 1

    def call_CancelIoEx(self, handle: int, _: object) -> int:  # noqa: N802
        self.answers.put(WindowsError_(self.aborted, "The I/O operation has been aborted"))
        return 1

    def call_GetFinalPathNameByHandleW(  # noqa: N802
        self, handle: int, buffer: Any, size: int, flags: int
    ) -> int:
        buffer.value = self.final_path or ""
        return len(buffer.value)

    def call_ReadDirectoryChangesExW(  # noqa: N802
        self, *arguments: Any
    ) -> int:
        if self.plain:
            raise WindowsError_(50, "The request is not supported")
        return self._read(*arguments)

    def call_ReadDirectoryChangesW(self, *arguments: Any) -> int:  # noqa: N802
        return self._read(*arguments)

    def _read(
        self, handle: int, buffer: Any, size: int, recursive: bool, mask: int, count: Any, *_: Any
    ) -> int:
        self.recursive.append(recursive)
        answer = self.answers.get(timeout=WAIT_S)
        if isinstance(answer, WindowsError_):
            raise answer
        assert len(answer) <= size
        ctypes.memmove(buffer._obj, answer, len(answer))
        count._obj.value = len(answer)
        return 1


def told(*events: tuple[int, str]) -> bytes:
    """Return FILE_NOTIFY_EXTENDED_INFORMATION structures."""
    return records(
        events, 8, lambda *head: struct.pack("<II6qIIqqI", *head[:2], *[0] * 10, head[2])
    )


def told_plainly(*events: tuple[int, str]) -> bytes:
    """Return FILE_NOTIFY_INFORMATION structures."""
    return records(events, 4, lambda *head: struct.pack("<III", *head))


def records(
    events: Sequence[tuple[int, str]], align: int, pack: Callable[[int, int, int], bytes]
) -> bytes:
    """Return structures of which each tells where the next one is.

    :param pack: gives what comes before a name: of that offset, the action and the name's length.
    """
    found = b""
    for number, (action, name) in enumerate(events):
        raw = name.encode("utf-16-le")
        size = (len(pack(0, 0, 0)) + len(raw) + align - 1) // align * align
        following = size if number + 1 < len(events) else 0
        found += (pack(following, action, len(raw)) + raw).ljust(size, b"\0")
    return found


@pytest.fixture
def changes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    if sys.platform == "win32":
        pytest.skip("has the real one")
    names = ("watchdog.observers.winapi", "wherry.platform.directory_changes")
    forget(names)
    monkeypatch.setattr(ctypes, "WinDLL", Kernel32, raising=False)
    # A long has 32 bits on Windows.
    monkeypatch.setattr(wintypes, "DWORD", ctypes.c_uint32)
    module = importlib.import_module("wherry.platform.directory_changes")
    yield module.DirectoryChangesWatcher
    forget(names)


@pytest.fixture
def windows(tmp_path: Path, changes: Callable[..., Any]) -> Iterator[Place]:
    made = Place(tmp_path, changes, ["node_modules", "*.log"])
    assert made.watch.problem is None
    assert not made.watch.exact
    assert made.watch.take() is None
    yield made
    made.watch.close()
    made.watch.close()
    assert Kernel32.made.closed == 1


def test_windows_tells_the_directories_of_what_has_changed(windows: Place) -> None:
    kernel = Kernel32.made
    kernel.answers.put(told((ADDED, "f"), (WRITTEN, "a\\b\\é")))
    assert windows.take() == {"", "a/b"}
    kernel.answers.put(told((OLD_NAME, "a\\x"), (NEW_NAME, "c\\x")))
    assert windows.take() == {"a", "c"}
    assert all(kernel.recursive)


def test_43_windows_that_ran_over_asks_for_everything(windows: Place) -> None:
    kernel = Kernel32.made
    kernel.answers.put(b"")
    assert windows.take() is None
    assert windows.watch.problem is None
    kernel.answers.put(told((DELETED, "a\\f")))
    assert windows.take() == {"a"}


def test_43_windows_that_says_so_by_an_error_asks_for_everything(windows: Place) -> None:
    """What was read before is not told again, and it goes on."""
    kernel = Kernel32.made
    kernel.answers.put(told((ADDED, "b\\f")))
    assert windows.take() == {"b"}
    kernel.answers.put(WindowsError_(1022, "The caller now needs to enumerate the files"))
    assert windows.take() is None
    assert windows.watch.problem is None
    kernel.answers.put(told((DELETED, "a\\f")))
    assert windows.take() == {"a"}


def test_a_filesystem_of_windows_without_extended_information(
    tmp_path: Path, changes: Callable[..., Any]
) -> None:
    kernel = Kernel32.made
    kernel.plain = True
    place = Place(tmp_path, changes, [])
    assert place.watch.take() is None
    kernel.answers.put(told_plainly((WRITTEN, "a\\é"), (OLD_NAME, "x")))
    assert place.take() == {"a", ""}
    kernel.answers.put(b"")
    assert place.take() is None
    kernel.answers.put(told_plainly((ADDED, "y")))
    assert place.take() == {""}
    assert place.watch.problem is None
    place.watch.close()


def test_windows_that_uses_short_names_asks_for_everything(windows: Place) -> None:
    Kernel32.made.answers.put(told((WRITTEN, "PROGRA~1\\f")))
    assert windows.take() is None


def test_windows_leaves_out_what_is_ignored(windows: Place) -> None:
    kernel = Kernel32.made
    kernel.answers.put(told((ADDED, "node_modules\\p\\f"), (WRITTEN, "x.log")))
    kernel.answers.put(told((ADDED, "a\\x.log")))
    assert windows.take() == {"a"}


def test_48_windows_says_when_the_root_is_gone(windows: Place) -> None:
    kernel = Kernel32.made
    kernel.final_path = "\\Device\\HarddiskVolume1\\$Recycle.Bin\\x"
    kernel.answers.put(WindowsError_(5, "Access is denied"))
    assert windows.take() is None
    assert windows.watch.problem is not None
    assert "moved, removed" in windows.watch.problem


def test_windows_says_when_reading_fails(windows: Place) -> None:
    Kernel32.made.answers.put(WindowsError_(59, "An unexpected network error occurred"))
    assert windows.take() is None
    assert windows.watch.problem is not None
    assert "network error" in windows.watch.problem


@pytest.mark.parametrize("error", [995, 997])
def test_windows_tells_no_failure_when_it_is_closed(windows: Place, error: int) -> None:
    Kernel32.made.aborted = error
    windows.watch.close()
    assert windows.watch.problem is None


def test_windows_says_why_it_could_not_start(tmp_path: Path, changes: Callable[..., Any]) -> None:
    Kernel32.made.missing = True
    place = Place(tmp_path, changes, [])
    assert place.watch.problem is not None
    assert "cannot find the file" in place.watch.problem
    assert place.watch.take() is None
    place.watch.close()


def test_windows_watches_a_single_file_in_its_directory(
    tmp_path: Path, changes: Callable[..., Any]
) -> None:
    (tmp_path / "f").write_text("1")
    place = Place(tmp_path / "f", changes, [])
    assert place.watch.take() is None
    Kernel32.made.answers.put(told((ADDED, "g")))
    Kernel32.made.answers.put(told((OLD_NAME, "g"), (NEW_NAME, "f")))
    assert place.take() == {""}
    assert not any(Kernel32.made.recursive)
    place.watch.close()


if sys.platform == "darwin":

    def _conforms(system: Platform, root: Path, sink: ChangeSink) -> None:
        system.watch_tree(root, sink, lambda path, is_directory: False)
