"""Guest images: what is read, verified, chosen, fetched and installed."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from wherry.config.layout import Layout
from wherry.core.errors import WherryError
from wherry.vm import image
from wherry.vm.release import pull

WITH_CLIENTS = {
    "kernel": b"K" * 100,
    "initrd": b"I" * 200,
    "root": b"R" * 5000,
    "probe": b"P" * 50,
    "clients/docker": b"D" * 10,
}


def rewrite(directory: Path, **changes: Any) -> None:
    """Change fields of a manifest; None removes one."""
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            del manifest[key]
        else:
            manifest[key] = value
    path.write_text(json.dumps(manifest))


def test_an_image_is_read(make_image: Any) -> None:
    found = image.read(make_image("1.2"))
    assert (found.name, found.version, found.architecture) == ("1.2-x86_64", "1.2", "x86_64")
    assert found.engine_version == "28.5.2"
    assert found.boot_bytes == 100 + 200 + 5000 + 50
    assert found.sha256 == found.files["root"][1]
    image.verify(found)


def test_the_add_on_is_not_needed_to_boot(make_image: Any) -> None:
    files = {**WITH_CLIENTS, "emulation": b"E" * 10}
    found = image.read(make_image(files=files))
    assert found.emulation == found.directory / "emulation"
    assert found.boot_bytes == 100 + 200 + 5000 + 50
    (found.directory / "emulation").unlink()
    with pytest.raises(WherryError, match="emulation is missing from the image"):
        image.verify(found)
    assert image.read(make_image("2")).emulation is None


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda at: (at / "manifest.json").unlink(), "has no manifest.json"),
        (lambda at: (at / "manifest.json").write_bytes(b""), "is not an image's manifest"),
        (
            lambda at: (at / "manifest.json").write_bytes((at / "manifest.json").read_bytes()[:80]),
            "is not an image's manifest",
        ),
        (lambda at: (at / "manifest.json").write_bytes(b"[]"), "is not an image's manifest"),
        (lambda at: (at / "manifest.json").write_bytes(b"\xff"), "is not an image's manifest"),
        (lambda at: rewrite(at, schema=2), "schema 2 is not 1"),
        (lambda at: rewrite(at, version=None), "version"),
        (lambda at: rewrite(at, files=[]), "is not an image's manifest"),
        (lambda at: rewrite(at, files={"kernel": {"size": "x", "sha256": ""}}), "invalid literal"),
        (lambda at: rewrite(at, files={"kernel": {"size": 1, "sha256": ""}}), "lists no initrd"),
    ],
)
def test_a_damaged_manifest_is_explained(damage: Any, said: str, make_image: Any) -> None:
    directory = make_image()
    damage(directory)
    with pytest.raises(WherryError, match=said) as caught:
        image.read(directory)
    assert "wherry image" in caught.value.hint


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../x", "a/../../x", "", "a\\b", "C:x", "a\0b", "manifest.json"]
)
def test_a_manifest_cannot_name_files_elsewhere(name: str, make_image: Any) -> None:
    directory = make_image()
    files = json.loads((directory / "manifest.json").read_text())["files"]
    rewrite(directory, files=files | {name: {"size": 1, "sha256": ""}})
    with pytest.raises(WherryError, match="not a path inside the image"):
        image.read(directory)


@pytest.mark.parametrize("field", ["version", "architecture"])
@pytest.mark.parametrize("value", ["../../x", "/x", "", ".", "..", "a b", "a\0"])
def test_a_manifest_cannot_name_another_place_for_itself(
    field: str, value: str, make_image: Any
) -> None:
    directory = make_image()
    rewrite(directory, **{field: value})
    with pytest.raises(WherryError, match="cannot be in an image's name"):
        image.read(directory)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda at: (at / "root").write_bytes(b"r" * 5000), "root has SHA-256 .* manifest says"),
        (lambda at: (at / "root").write_bytes(b"R" * 4999), "root has 4999 bytes .* says 5000"),
        (lambda at: (at / "kernel").unlink(), "kernel is missing from the image"),
        (
            lambda at: ((at / "kernel").unlink(), (at / "kernel").mkdir()),
            "kernel (has|cannot be read)",
        ),
        (lambda at: (at / "clients/docker").unlink(), "clients/docker is missing"),
    ],
)
def test_a_damaged_image_is_found(damage: Any, said: str, make_image: Any) -> None:
    directory = make_image(files=WITH_CLIENTS)
    damage(directory)
    with pytest.raises(WherryError, match=said) as caught:
        image.verify(image.read(directory))
    assert "wherry image" in caught.value.hint


def test_the_clients_may_be_left_out_as_a_whole(make_image: Any) -> None:
    directory = make_image(files=WITH_CLIENTS)
    shutil.rmtree(directory / "clients")
    image.verify(image.read(directory))


def test_the_newest_image_for_the_architecture_is_chosen(layout: Layout, make_image: Any) -> None:
    for version in ("0.9", "0.10", "0.10-rc1", "0.2"):
        make_image(version)
    make_image("1.0", "aarch64")
    (layout.images / ".pull-x86_64").mkdir()
    rewrite(make_image("9.9"), schema=7)
    assert next(iter(image.installed(layout))).version == "1.0"
    assert image.choose(layout, "", "x86_64").version in ("0.10", "0.10-rc1")
    assert image.choose(layout, "0.9", "x86_64").version == "0.9"
    assert image.choose(layout, "", "aarch64").version == "1.0"
    assert image.choose(layout, "1.0-aarch64", "x86_64").architecture == "aarch64"
    with pytest.raises(WherryError, match=r"no image 5 for x86_64 .* wherry image build"):
        image.choose(layout, "5", "x86_64")
    with pytest.raises(WherryError, match="no guest image for riscv64 is installed"):
        image.choose(layout, "", "riscv64")


def test_images_sort_by_date_then_by_arrival(layout: Layout, make_image: Any) -> None:
    arrived = ["2026.1.9-ff", "2026.1.10-aa", "2026.1.10-ff", "2026.1.10-00"]
    for seconds, version in enumerate(arrived):
        os.utime(make_image(version) / image.MANIFEST, (seconds, seconds))
    assert [each.version for each in image.installed(layout)] == arrived[::-1]


def test_installing_replaces_one_of_the_same_name(layout: Layout, make_image: Any) -> None:
    make_image()
    (layout.images / "1-x86_64/old").touch()
    staged = make_image(directory=layout.images / ".build-1")
    made = image.install(layout, staged)
    assert made.directory == layout.images / "1-x86_64"
    assert [entry.name for entry in layout.images.iterdir()] == ["1-x86_64"]
    assert not (made.directory / "old").exists()


def test_a_damaged_image_is_not_installed(layout: Layout, make_image: Any) -> None:
    good = make_image()
    staged = make_image(directory=layout.images / ".build-1")
    (staged / "root").write_bytes(b"")
    with pytest.raises(WherryError, match="root has 0 bytes"):
        image.install(layout, staged)
    image.verify(image.read(good))


def test_removing(layout: Layout, make_image: Any) -> None:
    make_image("1")
    make_image("2")
    image.remove(layout, "1-x86_64")
    assert [each.version for each in image.installed(layout)] == ["2"]
    with pytest.raises(WherryError, match="no image is named 1"):
        image.remove(layout, "1")


class Release(http.server.ThreadingHTTPServer):
    """A server of one directory that fails as a test says."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.cut_after: dict[str, int] = {}
        """Bytes after which the connection is cut, once, by the file's name."""
        self.ignores_range = False
        self.requests: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/images"

    def asked(self, name: str) -> list[str | None]:
        """The ranges that were asked for of a file."""
        return [range_ for path, range_ in self.requests if path.endswith("/" + name)]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Release
    protocol_version: ClassVar[str] = "HTTP/1.1"

    def do_GET(self) -> None:
        wanted = self.headers["Range"]
        self.server.requests.append((self.path, wanted))
        path = self.server.root / self.path.removeprefix("/images/")
        if not path.is_file():
            self.send_error(404)
            return
        data, begin = path.read_bytes(), 0
        if wanted is not None and not self.server.ignores_range:
            begin = int(wanted.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        cut = self.server.cut_after.pop(path.name, None)
        self.wfile.write(data[begin:][:cut])
        self.close_connection = cut is not None

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def release(tmp_path: Path, make_image: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Release]:
    monkeypatch.setattr("wherry.vm.release._PAUSE_S", 0)
    make_image("3", directory=tmp_path / "released/x86_64", files=WITH_CLIENTS)
    with Release(tmp_path / "released") as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_release_is_fetched_and_installed(layout: Layout, release: Release) -> None:
    steps: list[tuple[str, int, int]] = []
    made = pull(
        layout, release.url + "/", "x86_64", clients=True, progress=lambda *step: steps.append(step)
    )
    assert made.directory == layout.images / "3-x86_64"
    image.verify(made)
    assert (made.clients / "docker").read_bytes() == b"D" * 10
    assert ("root", 5000, 5000) in steps
    assert [entry.name for entry in layout.images.iterdir()] == ["3-x86_64"]


def test_without_the_clients_they_are_not_fetched(layout: Layout, release: Release) -> None:
    made = pull(layout, release.url, "x86_64", clients=False)
    image.verify(made)
    assert not release.asked("docker")


def test_a_cut_connection_is_continued_where_it_was_cut(layout: Layout, release: Release) -> None:
    release.cut_after["root"] = 1234
    image.verify(pull(layout, release.url, "x86_64", clients=False))
    assert release.asked("root") == [None, "bytes=1234-"]


def test_a_later_pull_continues_an_earlier_one(layout: Layout, release: Release) -> None:
    partial = layout.images / ".pull-x86_64"
    partial.mkdir()
    (partial / "root").write_bytes(b"R" * 2000)
    (partial / "kernel").write_bytes(b"K" * 100)
    image.verify(pull(layout, release.url, "x86_64", clients=False))
    assert release.asked("root") == ["bytes=2000-"]
    assert release.asked("kernel") == []


def test_what_an_interrupted_pull_left_of_another_release_does_no_harm(
    layout: Layout, release: Release
) -> None:
    partial = layout.images / ".pull-x86_64"
    partial.mkdir()
    (partial / "root").write_bytes(b"other" * 100)
    (partial / "kernel").write_bytes(b"k" * 100)
    (partial / "initrd").write_bytes(b"I" * 999)
    image.verify(pull(layout, release.url, "x86_64", clients=False))


def test_a_server_that_ignores_ranges(layout: Layout, release: Release) -> None:
    release.ignores_range = True
    release.cut_after["root"] = 1234
    image.verify(pull(layout, release.url, "x86_64", clients=False))
    assert release.asked("root") == [None, "bytes=1234-"]


def test_a_file_that_is_not_what_the_manifest_says(layout: Layout, release: Release) -> None:
    (release.root / "x86_64/root").write_bytes(b"r" * 5000)
    with pytest.raises(WherryError, match="root has another SHA-256 than its manifest says"):
        pull(layout, release.url, "x86_64", clients=False)
    assert not image.installed(layout)


@pytest.mark.parametrize("size", [0, 4999])
def test_a_file_that_is_too_short(size: int, layout: Layout, release: Release) -> None:
    (release.root / "x86_64/root").write_bytes(b"R" * size)
    with pytest.raises(WherryError, match="root cannot be fetched"):
        pull(layout, release.url, "x86_64", clients=False)
    assert not image.installed(layout)


def test_a_file_that_is_not_there(layout: Layout, release: Release) -> None:
    (release.root / "x86_64/probe").unlink()
    with pytest.raises(WherryError, match=r"/probe cannot be fetched: .*404.*goes on where"):
        pull(layout, release.url, "x86_64", clients=False)
    assert release.asked("probe") == [None]


def test_an_architecture_that_is_not_released(layout: Layout, release: Release) -> None:
    with pytest.raises(WherryError, match=r"aarch64/manifest\.json cannot be fetched: .*404"):
        pull(layout, release.url, "aarch64", clients=False)
    assert not image.installed(layout)


def test_a_manifest_for_another_architecture(layout: Layout, release: Release) -> None:
    (release.root / "x86_64").rename(release.root / "aarch64")
    with pytest.raises(WherryError, match="describes an image for x86_64"):
        pull(layout, release.url, "aarch64", clients=False)
    assert not image.installed(layout)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/x", "nonsense", "ftp://", "http://[", "file:"])
def test_no_server(url: str, layout: Layout) -> None:
    with pytest.raises(WherryError, match=r"cannot be fetched: .*; check the address"):
        pull(layout, url, "x86_64", clients=False)


def test_a_server_that_speaks_something_else(layout: Layout, release: Release) -> None:
    (release.root / "x86_64/manifest.json").write_text("<html>login first</html>")
    with pytest.raises(WherryError, match="is not an image's manifest"):
        pull(layout, release.url, "x86_64", clients=False)


def test_a_full_disk_is_not_taken_for_a_bad_network(layout: Layout, release: Release) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full, full(4)")
    staged = layout.images / ".pull-x86_64"
    staged.mkdir()
    (staged / "root").symlink_to("/dev/full")
    with pytest.raises(WherryError) as caught:
        pull(layout, release.url, "x86_64", clients=False)
    assert caught.value.message == f"{staged}/root cannot be written: No space left on device"
    assert caught.value.hint.startswith("free some space")
    assert len(release.asked("root")) == 1


def test_what_a_killed_command_left_is_removed(layout: Layout, make_image: Any) -> None:
    (layout.images / ".build-abc/image").mkdir(parents=True)
    (layout.images / ".build-x86_64").mkdir()
    (layout.images / ".pull-x86_64").mkdir()
    make_image("1")
    # Killed before the old one was removed, and before the new one was in its place.
    make_image("1", directory=layout.images / ".old-1-x86_64")
    make_image("2", directory=layout.images / ".old-2-x86_64")
    with image.exclusively(layout):
        pass
    names = {path.name for path in layout.images.iterdir()}
    assert names == {".lock", ".pull-x86_64", "1-x86_64", "2-x86_64"}


def test_one_command_makes_images_at_a_time(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image, "_LOCK_TIMEOUT_S", 0.05)
    waited: list[str] = []
    with image.exclusively(layout, waiting=lambda: waited.append("first")):
        (layout.images / ".build-x86_64").mkdir()
        other = image.exclusively(layout, waiting=lambda: waited.append("second"))
        with pytest.raises(WherryError, match="another wherry image command does not end"):
            other.__enter__()
        assert (layout.images / ".build-x86_64").exists()
    assert waited == ["second"]


def test_a_place_that_cannot_be_written_is_explained(layout: Layout, release: Release) -> None:
    (layout.images / ".pull-x86_64").touch()
    with pytest.raises(WherryError, match=r"\.pull-x86_64.* cannot be written"):
        pull(layout, release.url, "x86_64", clients=False)
