"""What the host trusts, for the guest: authorities, and the certificates of single registries.

They come from the system, and from a directory of the user's:

=================================  ===================================================
``*.crt``, ``*.pem``, ``*.cer``     authorities to trust everywhere
``HOST:PORT/*.crt``                 authorities for one registry
``HOST:PORT/*.cert``, ``*.key``     what the engine shows of itself there, in pairs
=================================  ===================================================

The second and third are Docker's own ``/etc/docker/certs.d``. What cannot be used is left out
and named, since with a broken file the engine would refuse the whole registry.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import ssl
import tarfile
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from wherry.core.errors import WherryError
from wherry.platform import Platform
from wherry.platform.roots import of_pem

_AUTHORITIES = (".crt", ".pem", ".cer")
_REGISTRY = re.compile(r"([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")
_LARGEST_BYTES = 8 << 20


class _Unusable(Exception):
    """Why a file is left out."""


@dataclass(frozen=True)
class Certificates:
    """What the guest shall trust beyond its own bundle.

    :ivar roots: as DER.
    :ivar registries: files below ``/etc/docker/certs.d``, by path.
    :ivar problems: what was left out and why, one line each.
    """

    roots: tuple[bytes, ...]
    registries: Mapping[str, bytes]
    problems: tuple[str, ...]

    @property
    def empty(self) -> bool:
        """Whether the guest's own bundle is all."""
        return not self.roots and not self.registries

    def archive(self) -> bytes:
        """Return what the guest's ``certificates`` reads; equal contents give equal bytes."""
        pem = "".join(map(ssl.DER_cert_to_PEM_cert, self.roots)).encode()
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            _add(tar, "roots.pem", pem)
            _add(tar, "certs.d", None)
            for name in sorted({path.partition("/")[0] for path in self.registries}):
                _add(tar, f"certs.d/{name}", None)
            for path, data in sorted(self.registries.items()):
                _add(tar, f"certs.d/{path}", data)
        return gzip.compress(buffer.getvalue(), mtime=0)


def _add(tar: tarfile.TarFile, name: str, data: bytes | None) -> None:
    """Add a file that root alone can read, or a directory."""
    info = tarfile.TarInfo(name)
    info.mode = 0o755 if data is None else 0o600
    info.type = tarfile.DIRTYPE if data is None else tarfile.REGTYPE
    info.size = len(data or b"")
    tar.addfile(info, io.BytesIO(data or b""))


def collect(
    platform: Platform, directory: Path, known: Collection[str], *, optional: bool
) -> Certificates:
    """Gather what the guest has to get; never fails.

    :param directory: of the user's.
    :param optional: whether it may be missing.
    :param known: digests of what the guest trusts by itself (:attr:`Image.certificates`).
    """
    problems: list[str] = []
    roots: dict[bytes, None] = {}
    try:
        found = platform.trusted_roots()
    except WherryError as error:
        problems.append(f"the certificates that this computer trusts are not known: {error}")
        found = []
    for der in found:
        # One that we cannot read is of no use to the engine either; the user did not choose it.
        if hashlib.sha256(der).hexdigest() not in known and _is_certificate(der):
            roots[der] = None
    registries: dict[str, bytes] = {}
    for path in _entries(directory, problems) if not optional or directory.exists() else ():
        try:
            if path.is_dir():
                registries.update(_registry(path, problems))
            elif path.suffix.lower() in _AUTHORITIES:
                for der in _certificates(path):
                    if hashlib.sha256(der).hexdigest() not in known:
                        roots[der] = None
        except (_Unusable, OSError) as error:
            problems.append(_left_out(path, error))
    return Certificates(tuple(roots), registries, tuple(problems))


def _entries(directory: Path, problems: list[str]) -> list[Path]:
    """Return what is in a directory, without hidden files."""
    try:
        return sorted(path for path in directory.iterdir() if not path.name.startswith("."))
    except OSError as error:
        problems.append(_left_out(directory, error))
        return []


def _registry(directory: Path, problems: list[str]) -> dict[str, bytes]:
    """Return the files for one registry, by path."""
    if not _REGISTRY.fullmatch(directory.name):
        raise _Unusable("it is not the name of a registry, HOST or HOST:PORT")
    found: dict[str, bytes] = {}
    for path in _entries(directory, problems):
        try:
            if path.suffix == ".crt":
                certificates = _certificates(path)
                pem = "".join(map(ssl.DER_cert_to_PEM_cert, certificates)).encode()
                found[f"{directory.name}/{path.name}"] = pem
            elif path.suffix == ".cert":
                key = path.with_suffix(".key")
                for each, data in ((path, _read(path)), (key, _client_key(path, key))):
                    found[f"{directory.name}/{each.name}"] = data
            elif path.suffix == ".key" and not path.with_suffix(".cert").exists():
                raise _Unusable(f"{path.stem}.cert is missing beside it")
        except (_Unusable, OSError) as error:
            problems.append(_left_out(path, error))
    return found


def _left_out(path: Path, error: _Unusable | OSError) -> str:
    return f"{path} is left out: {getattr(error, 'strerror', None) or error}"


def _client_key(certificate: Path, path: Path) -> bytes:
    """Return the key of a client's certificate."""
    if not path.exists():
        raise _Unusable(f"{path.name} is missing beside it")
    data, (leaf, *_) = _read(path), _certificates(certificate)
    try:
        public = load_pem_private_key(data, password=None).public_key()
        fits = x509.load_der_x509_certificate(leaf).public_key() == public
    except TypeError as error:
        raise _Unusable(f"{path.name} is encrypted, which the engine cannot read") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _Unusable(f"{path.name} is not a private key in PEM") from error
    if not fits:
        raise _Unusable(f"{path.name} is another certificate's")
    return data


def _certificates(path: Path) -> list[bytes]:
    """Return the certificates of a file, PEM or DER."""
    data = _read(path)
    found = list(of_pem(data)) or [data]
    if not all(map(_is_certificate, found)):
        raise _Unusable("it holds no certificate, or a broken one")
    return found


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise _Unusable("it is not a file")
    if path.stat().st_size > _LARGEST_BYTES:
        raise _Unusable("it is too large")
    return path.read_bytes()


def _is_certificate(der: bytes) -> bool:
    try:
        with warnings.catch_warnings():
            # Old authorities have what newer standards forbid; the engine decides on them.
            warnings.simplefilter("ignore")
            x509.load_der_x509_certificate(der)
    except ValueError:
        return False
    return True
