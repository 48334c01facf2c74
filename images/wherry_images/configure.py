"""Turning unpacked packages into a root: what maintainer scripts would do, and our own files.

Nothing here runs a program of the guest.
"""

from __future__ import annotations

import hashlib
import shutil
import ssl
from pathlib import Path

from wherry_images.modules import decompress, keep_only, parse_dependencies, select_by_pattern
from wherry_images.tools import Tools

# A "*" is no password, and unlike "!" it does not lock the account for sshd(8).
SHADOW = "root:*:::::::\n"
SSHD_USER = "sshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n"
DOCKER_GROUP = "docker:x:101:\n"


def read_list(path: Path) -> list[list[str]]:
    """Return the words of each line of a recipe file, without comments and empty lines."""
    lines = (line.partition("#")[0].split() for line in path.read_text().splitlines())
    return [words for words in lines if words]


def remove_unneeded(root: Path, patterns: list[str]) -> None:
    """Delete what matches the globs `patterns`, relative to `root`."""
    for pattern in patterns:
        for path in sorted(root.glob(pattern)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def add_accounts(root: Path) -> None:
    """Write the account files from base-passwd's masters and the two accounts we add."""
    masters = root / "usr/share/base-passwd"
    (root / "etc/passwd").write_text((masters / "passwd.master").read_text() + SSHD_USER)
    (root / "etc/group").write_text((masters / "group.master").read_text() + DOCKER_GROUP)
    shadow = root / "etc/shadow"
    shadow.write_text(SHADOW)
    shadow.chmod(0o600)


def add_certificates(root: Path) -> list[str]:
    """Write the bundle of CA certificates as update-ca-certificates(8) does.

    It is a link to begin with: what the host trusts beyond it makes another one of it.

    Returns the SHA-256 of each certificate, as of its DER.
    """
    source = root / "usr/share/ca-certificates"
    certificates = [file.read_text() for file in sorted(source.rglob("*.crt"))]
    shutil.rmtree(source)
    source.with_suffix(".crt").write_text("".join(certificates))
    bundle = root / "etc/ssl/certs/ca-certificates.crt"
    bundle.parent.mkdir(parents=True, exist_ok=True)
    bundle.symlink_to("/usr/share/ca-certificates.crt")
    return [
        hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate)).hexdigest()
        for certificate in certificates
    ]


def open_temporary_directories(root: Path) -> None:
    """Let every user write where all may (hier(7)); unpacking left no such modes."""
    for name in ("tmp", "var/tmp"):
        (root / name).chmod(0o1777)


def add_modules(root: Path, patterns: list[str], tools: Tools) -> tuple[Path, dict[str, list[str]]]:
    """Keep the kernel modules that match `patterns`, and index them.

    Returns their directory and what each depends on.
    """
    (directory,) = (root / "usr/lib/modules").iterdir()
    decompress(directory)
    tools.run("usr/bin/kmod", "-b", root, directory.name, name="depmod")
    dependencies = parse_dependencies((directory / "modules.dep").read_text())
    keep_only(directory, select_by_pattern(patterns, dependencies))
    tools.run("usr/bin/kmod", "-b", root, directory.name, name="depmod")
    return directory, parse_dependencies((directory / "modules.dep").read_text())


def add_bytecode(root: Path, tools: Tools) -> None:
    """Compile Python's library; the root is read-only, so the sources need no checking later."""
    library = root / "usr/lib/python3.13"
    arguments = ("-q", "--invalidation-mode", "unchecked-hash", "-s", root, "-p", "/")
    tools.python("-m", "compileall", *arguments, library)


def add_files(root: Path, recipe: Path) -> None:
    """Add the recipe's directories, links and files; a file that starts with #! is a program."""
    for (directory,) in read_list(recipe / "directories"):
        (root / directory).mkdir(parents=True, exist_ok=True)
    for name, points_to in read_list(recipe / "links"):
        link = root / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(points_to)
    files = recipe / "files"
    for source in sorted(files.rglob("*")):
        target = root / source.relative_to(files)
        if source.is_dir():
            target.mkdir(exist_ok=True)
        else:
            data = source.read_bytes()
            target.write_bytes(data)
            target.chmod(0o755 if data.startswith(b"#!") else 0o644)
