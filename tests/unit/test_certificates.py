"""Which certificates the guest is given, from the system's and the user's."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import ssl
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from wherry.core.errors import WherryError
from wherry.platform import roots
from wherry.service.certificates import Certificates, collect


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def other() -> trustme.CA:
    return trustme.CA()


def pem(authority: trustme.CA) -> bytes:
    return authority.cert_pem.bytes()


def der(authority: trustme.CA) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pem(authority).decode())


def digest(authority: trustme.CA) -> str:
    return hashlib.sha256(der(authority)).hexdigest()


def gather(
    directory: Path,
    system: Callable[[], list[bytes]] = list,
    known: frozenset[str] = frozenset(),
    *,
    optional: bool = False,
) -> Certificates:
    platform: Any = SimpleNamespace(trusted_roots=system)
    return collect(platform, directory, known, optional=optional)


# The system's


def test_a_bundle_is_read_whole(authority: trustme.CA, other: trustme.CA) -> None:
    text = b"# A comment\n" + pem(authority) + b"between\n" + pem(other).replace(b"\n", b"\r\n")
    assert list(roots.of_pem(text)) == [der(authority), der(other)]
    broken = b"-----BEGIN CERTIFICATE-----\nA\n-----END CERTIFICATE-----\n"
    assert list(roots.of_pem(broken + pem(other))) == [der(other)]


def test_linux_has_a_file_and_a_directory(
    authority: trustme.CA, other: trustme.CA, tmp_path: Path
) -> None:
    file, directory = tmp_path / "file", tmp_path / "directory"
    file.write_bytes(pem(authority))
    directory.mkdir()
    (directory / "a.pem").write_bytes(pem(other) + pem(authority))
    (directory / "sub").mkdir()
    (directory / "gone").symlink_to("nowhere")
    names = {"SSL_CERT_FILE": str(file), "SSL_CERT_DIR": f"{directory}:{tmp_path}/none"}
    assert roots.linux(names) == [der(authority), der(other)]
    assert roots.linux({**names, "SSL_CERT_FILE": f"{tmp_path}/none"}) == [
        der(other),
        der(authority),
    ]


def test_macos_is_asked_about_each_certificate(
    authority: trustme.CA, other: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in a keychain need not be trusted."""
    security = tmp_path / "security"
    (tmp_path / "keychain").write_bytes(pem(authority) + pem(other))
    (tmp_path / "trusted").write_bytes(roots.ssl.DER_cert_to_PEM_cert(der(other)).encode())
    security.write_text(
        f'#!/bin/sh\necho "$*" >>{tmp_path}/calls\n'
        f"case $1 in find-certificate) cat {tmp_path}/keychain ;;\n"
        f'verify-cert) cmp -s "$3" {tmp_path}/trusted ;; esac\n'
    )
    security.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert roots.macos() == [der(other)]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "find-certificate -a -p"
    assert calls[-1].endswith("-l -L -R offline")


def test_windows_has_reasons_to_trust() -> None:
    server, mail = "1.3.6.1.5.5.7.3.1", "1.3.6.1.5.5.7.3.4"
    entries: list[tuple[bytes, str, frozenset[str] | bool]] = [
        (b"all", "x509_asn", True),
        (b"none", "x509_asn", False),
        (b"server", "x509_asn", frozenset({server, mail})),
        (b"mail", "x509_asn", frozenset({mail})),
        (b"list", "pkcs_7_asn", True),
    ]
    assert roots.windows(entries) == [b"all", b"server"]


def test_only_what_the_guest_lacks_travels(
    authority: trustme.CA, other: trustme.CA, tmp_path: Path
) -> None:
    system = [der(authority), der(other), b"what we cannot read", der(other)]
    found = gather(tmp_path, lambda: system, frozenset({digest(authority)}))
    assert found == Certificates((der(other),), {}, ())
    assert gather(tmp_path, lambda: [der(other)], frozenset({digest(other)})).empty


def test_a_system_that_does_not_tell_is_a_warning(tmp_path: Path) -> None:
    def fail() -> list[bytes]:
        raise WherryError("security is not installed")

    found = gather(tmp_path, fail)
    assert found.empty
    assert len(found.problems) == 1
    assert "security is not installed" in found.problems[0]


# The user's


def test_files_of_the_directory(authority: trustme.CA, other: trustme.CA, tmp_path: Path) -> None:
    (tmp_path / "a.crt").write_bytes(der(authority))
    (tmp_path / "b.pem").write_bytes(pem(authority) + pem(other))
    (tmp_path / "README").write_text("not a certificate")
    (tmp_path / ".hidden.crt").write_text("nonsense")
    assert gather(tmp_path) == Certificates((der(authority), der(other)), {}, ())


@pytest.mark.parametrize("contents", [b"", b"nonsense", b"cut"])
def test_a_file_that_is_broken_is_named_and_left_out(
    contents: bytes, authority: trustme.CA, other: trustme.CA, tmp_path: Path
) -> None:
    if contents == b"cut":
        contents = der(authority)[:-5]
    (tmp_path / "bad.crt").write_bytes(contents)
    (tmp_path / "good.crt").write_bytes(pem(other))
    found = gather(tmp_path)
    assert found.roots == (der(other),)
    assert found.problems == (
        f"{tmp_path}/bad.crt is left out: it holds no certificate, or a broken one",
    )


def test_a_file_that_cannot_be_read_is_named(
    authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.crt").write_bytes(pem(authority))
    (tmp_path / "pipe.crt").symlink_to("/dev/null")

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    found = gather(tmp_path)
    assert found.empty
    assert found.problems == (
        f"{tmp_path}/a.crt is left out: Permission denied",
        f"{tmp_path}/pipe.crt is left out: it is not a file",
    )


def test_a_directory_that_is_missing(tmp_path: Path) -> None:
    assert gather(tmp_path / "none", optional=True) == Certificates((), {}, ())
    found = gather(tmp_path / "none")
    assert found.problems == (f"{tmp_path}/none is left out: No such file or directory",)


# Registries


def place(tmp_path: Path, authority: trustme.CA, name: str = "reg.example:5000") -> Path:
    directory = tmp_path / name
    directory.mkdir()
    client = authority.issue_cert("client")
    (directory / "client.cert").write_bytes(client.cert_chain_pems[0].bytes())
    (directory / "client.key").write_bytes(client.private_key_pem.bytes())
    (directory / "ca.crt").write_bytes(der(authority))
    return directory


@pytest.mark.parametrize("name", ["reg.example:5000", "localhost", "[::1]:443", "10.0.2.2:5000"])
def test_files_for_a_registry(authority: trustme.CA, tmp_path: Path, name: str) -> None:
    directory = place(tmp_path, authority, name)
    (directory / "notes.txt").write_text("mine")
    found = gather(tmp_path)
    assert found.problems == ()
    assert found.roots == ()
    assert sorted(found.registries) == [f"{name}/{each}" for each in
                                        ("ca.crt", "client.cert", "client.key")]  # fmt: skip
    assert list(roots.of_pem(found.registries[f"{name}/ca.crt"])) == [der(authority)]


def encrypted(key: bytes) -> bytes:
    return load_pem_private_key(key, None).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda place: (place / "client.key").unlink(), "client.key is missing beside it"),
        (lambda place: (place / "client.cert").unlink(), "client.cert is missing beside it"),
        (
            lambda place: (place / "client.key").write_bytes(
                trustme.CA().issue_cert("x").private_key_pem.bytes()
            ),
            "client.key is another certificate's",
        ),
        (
            lambda place: (place / "client.key").write_bytes(
                encrypted((place / "client.key").read_bytes())
            ),
            "client.key is encrypted, which the engine cannot read",
        ),
        (
            lambda place: (place / "client.key").write_text("x"),
            "client.key is not a private key in PEM",
        ),
        (
            lambda place: (place / "client.cert").write_text("x"),
            "it holds no certificate, or a broken one",
        ),
    ],
)
def test_a_pair_that_the_engine_would_stumble_over_is_left_out(
    authority: trustme.CA, tmp_path: Path, change: Callable[[Path], object], said: str
) -> None:
    change(place(tmp_path, authority))
    found = gather(tmp_path)
    assert list(found.registries) == ["reg.example:5000/ca.crt"]
    assert len(found.problems) == 1
    assert found.problems[0].endswith(f"is left out: {said}")


def test_a_directory_that_names_no_registry(authority: trustme.CA, tmp_path: Path) -> None:
    place(tmp_path, authority, "my certificates")
    found = gather(tmp_path)
    assert found.empty
    assert "is not the name of a registry" in found.problems[0]


def test_the_archive(authority: trustme.CA, tmp_path: Path) -> None:
    """It is the same each time, and only root can read it in the guest."""
    place(tmp_path, authority)
    (tmp_path / "root.crt").write_bytes(pem(authority))
    found = gather(tmp_path)
    assert found.archive() == gather(tmp_path).archive()
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(found.archive()))) as tar:
        assert tar.getnames() == [
            "roots.pem",
            "certs.d",
            "certs.d/reg.example:5000",
            "certs.d/reg.example:5000/ca.crt",
            "certs.d/reg.example:5000/client.cert",
            "certs.d/reg.example:5000/client.key",
        ]
        assert {each.mode for each in tar if each.isfile()} == {0o600}
        root = tar.extractfile("roots.pem")
        assert root is not None
        assert list(roots.of_pem(root.read())) == [der(authority)]
