"""The image's recipe, locks and small formats; nothing is built here."""

from __future__ import annotations

import gzip
import hashlib
import json
import ssl
import stat
import struct
import subprocess
import tomllib
from pathlib import Path

import pytest
import trustme

from wherry.core.errors import WherryError
from wherry_images import archive, configure, cpio, emulation, initramfs, manifest, modules
from wherry_images.build import (
    LOCKS,
    RECIPE,
    architecture_named,
    engine_version,
    image_version,
    packed_kernel,
)
from wherry_images.libraries import check_libraries, needed_libraries
from wherry_images.lock import Lock, LockedPackage, format_lock, read_lock
from wherry_images.tree import format_index


def package(name: str, version: str = "1.0", sha256: str = "ab" * 32) -> LockedPackage:
    return LockedPackage(name, version, "debian", f"pool/{name}.deb", 3, sha256)


def test_lock_reads_back_what_it_wrote(tmp_path: Path) -> None:
    packages = (package("b"), package("a", "1:2.0~rc1+deb13u1"))
    path = tmp_path / "lock.toml"
    path.write_text(format_lock(7, packages))
    assert read_lock(path) == Lock(7, tuple(sorted(packages)))


@pytest.mark.parametrize(
    "text", ["epoch = ", "epoch = 1", "epoch = 1\npackages = [{ name = 'a' }]"], ids=str
)
def test_damaged_lock_says_what_to_do(tmp_path: Path, text: str) -> None:
    path = tmp_path / "lock.toml"
    path.write_text(text)
    with pytest.raises(WherryError, match=r"lock\.toml cannot be read.*--update-lock"):
        read_lock(path)


def test_missing_lock_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(WherryError, match=r"no lock file.*--update-lock"):
        read_lock(tmp_path / "lock.toml")


@pytest.mark.parametrize("name", ["x86_64", "aarch64"])
def test_kept_locks_agree_with_the_recipe(name: str) -> None:
    recipe = tomllib.loads((RECIPE / "packages.toml").read_text())
    for role in ("guest", "tools"):
        locked = {entry.name for entry in read_lock(LOCKS / f"{role}-{name}.toml").packages}
        assert set(recipe[role]["install"]) <= locked
        assert not set(recipe[role]["without"]) & locked


def test_engine_version_is_upstreams() -> None:
    assert engine_version(Lock(0, (package("docker.io", "28.5.2+dfsg4-5"),))) == "28.5.2"


def test_image_version_follows_packages_and_recipe(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("one")
    lock = Lock(1_700_000_000, (package("a"),))
    before = image_version(lock, tmp_path)
    assert before.startswith("2023.11.14-")
    assert image_version(lock, tmp_path) == before
    assert image_version(Lock(lock.epoch, (package("a", sha256="cd" * 32),)), tmp_path) != before
    (tmp_path / "file").write_text("two")
    assert image_version(lock, tmp_path) != before


def test_unknown_architecture_is_refused() -> None:
    with pytest.raises(WherryError, match=r"x86_64 and aarch64, not riscv64"):
        architecture_named("riscv64")


def test_only_an_arm_kernel_is_compressed() -> None:
    arm = b"\0" * 56 + b"ARM\x64" + b"\0" * 100
    assert gzip.decompress(packed_kernel(arm)) == arm
    assert packed_kernel(arm) == packed_kernel(arm)
    assert packed_kernel(b"MZ" + b"\0" * 100) == b"MZ" + b"\0" * 100


# The archive.


@pytest.mark.parametrize(
    ("text", "mirror"),
    [
        ("deb http://m.example/debian trixie main", "http://m.example/debian"),
        ("deb [signed-by=/k] https://m.example/debian/ trixie main", "https://m.example/debian"),
        ("Types: deb\nURIs: http://m.example/debian\nSuites: x", "http://m.example/debian"),
        ("URIs: http://m.example/debian-security", archive.DEFAULT_MIRROR),
        ("# deb http://m.example/debian trixie main", archive.DEFAULT_MIRROR),
        ("", archive.DEFAULT_MIRROR),
    ],
)
def test_the_hosts_mirror_is_used(text: str, mirror: str) -> None:
    assert archive.mirror_in([text]) == mirror


def test_the_security_archive_is_beside_the_mirror() -> None:
    url = archive.archive_url("debian-security", "http://m.example/debian")
    assert url == "http://m.example/debian-security"


def test_records_of_apt_are_parsed() -> None:
    stanza = "Package: {}\nVersion: 2\nDescription: x\n y: z\nFilename: {}\nSize: 9\nSHA256: ff\n"
    text = "\n".join(
        [stanza.format("b", "pool/main/b.deb"), stanza.format("a", "pool/updates/main/a.deb")]
    )
    assert archive.parse_records(text) == [
        LockedPackage("a", "2", "debian-security", "pool/updates/main/a.deb", 9, "ff"),
        LockedPackage("b", "2", "debian", "pool/main/b.deb", 9, "ff"),
    ]


def fake_apt_helper(tmp_path: Path, body: str) -> str:
    program = tmp_path / "apt-helper"
    program.write_text(f'#!/bin/sh\necho "$2" >>{tmp_path}/calls\n{body}\n')
    program.chmod(0o755)
    return str(program)


def test_fetching_names_every_package_the_archive_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper = fake_apt_helper(
        tmp_path, 'echo "E: Failed to fetch $2  404  File not found [IP: ::1 80]" >&2; exit 100'
    )
    monkeypatch.setattr(archive, "APT_HELPER", helper)
    with pytest.raises(WherryError) as caught:
        archive.fetch(
            [package("b", "2"), package("a", "1")],
            tmp_path / "cache",
            mirror="http://m.example/debian",
            progress=lambda line: None,
        )
    assert str(caught.value) == (
        "http://m.example/debian no longer has these locked packages: a 1, b 2; "
        "choose newer packages: python -m wherry_images build --update-lock --output DIR"
    )


@pytest.mark.parametrize(
    "said",
    [
        "Could not resolve m.example",
        "E: Failed to fetch http://m.example/debian/pool/x404.deb  503  Service Unavailable",
    ],
)
def test_a_network_failure_is_not_taken_for_a_lost_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    helper = fake_apt_helper(tmp_path, f'echo "{said}" >&2; exit 100')
    monkeypatch.setattr(archive, "APT_HELPER", helper)
    with pytest.raises(WherryError, match=r"Could not resolve|503"):
        archive.fetch(
            [package("a")], tmp_path / "cache", mirror="http://m.example/debian", progress=print
        )


def test_a_download_that_breaks_off_is_tried_again_without_what_it_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As apt 3 does it, whose own second attempt fails with "File exists".
    breaks = f'set -C; echo half >"$3" || exit 100; [ "$(wc -l <{tmp_path}/calls)" = 3 ]'
    monkeypatch.setattr(archive, "APT_HELPER", fake_apt_helper(tmp_path, breaks))
    cache = tmp_path / "cache"
    archive.fetch([package("a")], cache, mirror="http://m.example/debian", progress=print)
    assert [file.suffix for file in cache.iterdir()] == [".deb"]
    assert len((tmp_path / "calls").read_text().splitlines()) == 3


def test_a_cached_package_is_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "APT_HELPER", fake_apt_helper(tmp_path, 'printf abc >"$3"'))
    # The sha256 of "abc", FIPS 180-2.
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    for _ in range(2):
        archive.fetch(
            [package("a", sha256=digest)],
            tmp_path / "cache",
            mirror="http://m.example/debian",
            progress=lambda line: None,
        )
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["http://m.example/debian/pool/a.deb"]


def test_the_local_index_has_no_dependencies() -> None:
    index = format_index([package("b"), package("a")], "arm64")
    assert index.startswith("Package: a\nVersion: 1.0\nArchitecture: arm64\nFilename: ./a_")
    assert "Depends" not in index


# Modules and the initramfs.

DEPENDENCIES = modules.parse_dependencies(
    "kernel/lib/crc.ko:\n"
    "kernel/fs/erofs/erofs.ko: kernel/lib/crc.ko\n"
    "kernel/net/c.ko: kernel/net/b.ko kernel/net/a.ko\n"
    "kernel/net/b.ko: kernel/net/a.ko\n"
    "kernel/net/a.ko:\n"
    "kernel/drivers/virtio-blk.ko:\n"
)


def test_modules_come_after_what_they_need() -> None:
    chosen = modules.select_by_name(["c", "virtio_blk", "erofs", "built_in"], DEPENDENCIES)
    assert chosen == [
        "kernel/net/a.ko",
        "kernel/net/b.ko",
        "kernel/net/c.ko",
        "kernel/drivers/virtio-blk.ko",
        "kernel/lib/crc.ko",
        "kernel/fs/erofs/erofs.ko",
    ]


def test_a_pattern_brings_its_dependencies() -> None:
    chosen = modules.select_by_pattern(["fs/*"], DEPENDENCIES)
    assert chosen == ["kernel/lib/crc.ko", "kernel/fs/erofs/erofs.ko"]


def test_modules_outside_the_list_are_deleted(tmp_path: Path) -> None:
    for name in ("kernel/a.ko", "kernel/b.ko"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    modules.keep_only(tmp_path, ["kernel/b.ko"])
    assert [file.name for file in tmp_path.rglob("*.ko")] == ["b.ko"]


def test_cpio_has_the_form_the_kernel_reads() -> None:
    data = cpio.archive([cpio.directory("bin"), cpio.file("bin/sh", b"#!\n123", 0o755)])
    assert data.startswith(b"070701")
    # A directory's mode is 41ed in hexadecimal; every part ends on a multiple of four.
    assert b"000041ed" in data
    assert f"{stat.S_IFREG | 0o755:08x}".encode() in data
    assert len(data) % 4 == 0
    assert data.rstrip(b"\0").endswith(b"TRAILER!!!")


def test_initrd_holds_only_the_modules_the_boot_needs(tmp_path: Path) -> None:
    for path in DEPENDENCIES:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(path.encode())
    data = initramfs.initrd(b"#!init", b"BUSYBOX", tmp_path, DEPENDENCIES)
    assert b"virtio_blk.ko\ncrc.ko\nerofs.ko\n" in data
    assert b"kernel/net" not in data
    assert data == initramfs.initrd(b"#!init", b"BUSYBOX", tmp_path, DEPENDENCIES)


# The root.


def test_lists_may_have_comments(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("# head\n\na b # tail\nc\n")
    assert configure.read_list(tmp_path / "list") == [["a", "b"], ["c"]]


def test_files_of_the_recipe_get_their_modes(tmp_path: Path) -> None:
    configure.add_files(tmp_path, RECIPE)
    init = tmp_path / "usr/lib/wherry/init"
    assert init.stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "etc/fstab").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "var/lib/docker").is_dir()
    assert (tmp_path / "usr/sbin/iptables").readlink() == Path("xtables-legacy-multi")


@pytest.mark.parametrize(
    "script",
    [
        path
        for path in sorted(RECIPE.rglob("*"))
        if path.is_file() and path.read_bytes()[:2] == b"#!"
    ],
    ids=lambda path: str(path.relative_to(RECIPE)),
)
def test_scripts_have_no_syntax_error(script: Path) -> None:
    subprocess.run(["sh", "-n", script], check=True, timeout=10)


def test_no_password_lets_anyone_in() -> None:
    settings = (RECIPE / "files/etc/ssh/sshd_config").read_text().splitlines()
    assert "PasswordAuthentication no" in settings
    assert "KbdInteractiveAuthentication no" in settings
    assert configure.SHADOW.startswith("root:*:")


@pytest.mark.parametrize(("name", "other"), [("x86_64", "aarch64"), ("aarch64", "x86_64")])
def test_the_emulator_of_the_other_architecture_is_taken_alone(
    tmp_path: Path, name: str, other: str
) -> None:
    root, registrations = tmp_path / "root", tmp_path / "root/usr/share/qemu/binfmt.d"
    registrations.mkdir(parents=True)
    (root / "usr/bin").mkdir()
    for each in ("x86_64", "aarch64", "m68k"):
        (root / f"usr/bin/qemu-{each}").write_text(each)
        (registrations / f"qemu-{each}.conf").write_text(each)
    emulation.take(root, tmp_path / "taken", architecture_named(name))
    assert {file.name: file.read_text() for file in (tmp_path / "taken").iterdir()} == {
        f"{other}-binfmt-P": other,
        f"qemu-{other}.conf": other,
    }


def elf(needed: list[str]) -> bytes:
    """Return the least ELF file whose dynamic section asks for `needed`."""
    names, offsets = b"\0", []
    for name in needed:
        offsets.append(len(names))
        names += name.encode() + b"\0"
    # The string table is at offset 512 and is mapped at address 0x1200.
    tags = [(1, offset) for offset in offsets] + [(5, 0x1200), (0, 0)]
    dynamic = b"".join(struct.pack("<QQ", *tag) for tag in tags)
    header = b"\x7fELF\x02\x01" + b"\0" * 26 + struct.pack("<Q", 64) + b"\0" * 14
    header += struct.pack("<HH", 56, 2) + b"\0" * 6
    load = struct.pack("<IIQQQQQQ", 1, 4, 0, 0x1000, 0x1000, 1024, 1024, 4096)
    section = struct.pack("<IIQQQQQQ", 2, 4, 256, 0x1100, 0x1100, len(dynamic), len(dynamic), 8)
    return (header + load + section).ljust(256, b"\0") + dynamic.ljust(256, b"\0") + names


def test_needed_libraries_are_read() -> None:
    assert needed_libraries(elf(["libc.so.6", "libm.so.6"])) == ["libc.so.6", "libm.so.6"]
    assert needed_libraries(b"#!/bin/sh\n") == []


def test_a_missing_library_is_named(tmp_path: Path) -> None:
    (tmp_path / "program").write_bytes(elf(["libx.so.1"]))
    with pytest.raises(WherryError, match=r"program needs libx\.so\.1"):
        check_libraries(tmp_path)
    (tmp_path / "libx.so.1").touch()
    check_libraries(tmp_path)


def test_the_bundle_of_certificates(tmp_path: Path) -> None:
    """What is in it is told, so that a host need not give it again."""
    authorities = [trustme.CA(), trustme.CA()]
    for number, authority in enumerate(authorities):
        path = tmp_path / f"usr/share/ca-certificates/mozilla/{number}.crt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(authority.cert_pem.bytes())
    pems = [authority.cert_pem.bytes().decode() for authority in authorities]
    ders = map(ssl.PEM_cert_to_DER_cert, pems)
    digests = configure.add_certificates(tmp_path)
    assert digests == [hashlib.sha256(der).hexdigest() for der in ders]
    link = tmp_path / "etc/ssl/certs/ca-certificates.crt"
    assert (tmp_path / link.readlink().relative_to("/")).read_text() == "".join(pems)
    assert not (tmp_path / "usr/share/ca-certificates").exists()


def test_manifest_describes_the_files(tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(b"abc")
    files = manifest.describe(tmp_path, ["kernel"])
    made = manifest.Manifest("1", "x86_64", 5, "quiet", "28.5.2", files, {"a": "1"}, ["f00d"])
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert json.loads(made.to_json()) == {
        "schema": 1,
        "version": "1",
        "architecture": "x86_64",
        "epoch": 5,
        "cmdline": "quiet",
        "engine_version": "28.5.2",
        "files": {"kernel": {"size": 3, "sha256": digest}},
        "packages": {"a": "1"},
        "certificates": ["f00d"],
    }
