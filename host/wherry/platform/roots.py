"""The certificates of the authorities that the operating system trusts, as DER."""

from __future__ import annotations

import base64
import binascii
import re
import ssl
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from wherry.core.errors import WherryError
from wherry.core.processes import run

_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----(.*?)-----END CERTIFICATE-----", re.DOTALL)

LINUX_FILES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/tls/cacert.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
)
"""Where distributions have all in one file; the first that exists counts (Go,
``crypto/x509/root_linux.go``). OpenSSL's own idea would be that of whoever built Python."""

LINUX_DIRECTORIES = ("/etc/ssl/certs", "/etc/pki/tls/certs")

_SECURITY_S = 20.0
_VERIFY_S = 5.0

_SERVER = "1.3.6.1.5.5.7.3.1"
"""Authentication of servers (id-kp-serverAuth, RFC 5280 §4.2.1.12)."""


def of_pem(data: bytes) -> Iterator[bytes]:
    """Yield the certificates in a text; what is between them is skipped (RFC 7468 §5.2)."""
    for block in _PEM.finditer(data):
        try:
            yield base64.b64decode(block[1])
        except binascii.Error:
            continue


def linux(environment: Mapping[str, str]) -> list[bytes]:
    """Return those of the system's file and directories.

    As with OpenSSL and Go, ``SSL_CERT_FILE`` and ``SSL_CERT_DIR`` name others.
    """
    file, directories = environment.get("SSL_CERT_FILE"), environment.get("SSL_CERT_DIR")
    found: dict[bytes, None] = {}
    for path in (file,) if file else LINUX_FILES:
        try:
            found.update(dict.fromkeys(of_pem(Path(path).read_bytes())))
            break
        except OSError:
            continue
    for directory in directories.split(":") if directories else LINUX_DIRECTORIES:
        try:
            entries = sorted(Path(directory).iterdir())
        except OSError:
            continue
        for entry in entries:
            try:
                found.update(dict.fromkeys(of_pem(entry.read_bytes())))
            except OSError:
                continue  # a directory, or a link to what was removed
    return list(found)


def macos() -> list[bytes]:
    """Return those that the administrator and the user added and trust (security(1)).

    They are in the keychains that are searched by default, the system's and the user's. Apple's
    own authorities are in another one, and as good as Mozilla's. A keychain has certificates of
    all kinds, so each is verified, without the network, as that of an authority.

    :raises WherryError: there is no security(1), or it does not answer.
    """
    done = run(["security", "find-certificate", "-a", "-p"], timeout_s=_SECURITY_S, check=False)
    return [each for each in dict.fromkeys(of_pem(done.stdout)) if _is_trusted(each)]


def _is_trusted(certificate: bytes) -> bool:
    with tempfile.NamedTemporaryFile(suffix=".pem") as file:
        file.write(ssl.DER_cert_to_PEM_cert(certificate).encode())
        file.flush()
        argv = ["security", "verify-cert", "-c", file.name, "-l", "-L", "-R", "offline"]
        try:
            return run(argv, timeout_s=_VERIFY_S, check=False).returncode == 0
        except WherryError:
            return False


def windows(entries: Iterable[tuple[bytes, str, Iterable[str] | bool]]) -> list[bytes]:
    """Return those of a store that are trusted for servers.

    :param entries: what ``ssl.enum_certificates("ROOT")`` returns.
    """
    return [
        certificate
        for certificate, encoding, trust in entries
        if encoding == "x509_asn"
        and (trust is True or (not isinstance(trust, bool) and _SERVER in trust))
    ]
