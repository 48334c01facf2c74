"""Fetching a released image.

A release is a directory on an HTTP server: ``ARCHITECTURE/manifest.json`` and the files
it names beside it. A file that arrived in part is continued (RFC 9110 §14), and
nothing is installed before every SHA-256 agrees with the manifest.
"""

from __future__ import annotations

import errno
import http.client
import os
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

from wherry.config.layout import Layout
from wherry.core.errors import WherryError
from wherry.core.files import sha256, write_atomic
from wherry.vm.image import CLIENTS, MANIFEST, Image, install, read

RELEASE_VARIABLE = "WHERRY_RELEASE_URL"
"""Where releases are, when ``--from`` does not say."""

_TIMEOUT_S = 30.0
"""For connecting and for each read, so that a dead server is noticed; not for a whole file."""
_TRIES = 5
_PAUSE_S = 1.0
"""Before a try after one that brought nothing; each such pause is twice the one before."""

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""What writing fails with and the network never does (errno(3))."""

_CHUNK_BYTES = 1 << 18
_MANIFEST_LIMIT = 1 << 20


def pull(
    layout: Layout,
    base_url: str,
    architecture: str,
    *,
    clients: bool,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Image:
    """Fetch the released image for an architecture and install it.

    What arrived stays in ``images/.pull-ARCHITECTURE`` when this fails, and a repeat
    continues there.

    The caller is in :func:`wherry.vm.image.exclusively`.

    :param clients: whether to fetch the docker clients for Linux hosts as well.
    :param progress: called with a file's name, the bytes it has, and its size.
    :raises WherryError: the server cannot be reached, or serves something else.
    """
    base = f"{base_url.rstrip('/')}/{architecture}"
    staged = layout.images / f".pull-{architecture}"
    manifest = _get(f"{base}/{MANIFEST}")
    try:
        layout.platform.make_private_directory(staged)
        write_atomic(staged / MANIFEST, manifest)
    except OSError as error:
        raise _unwritable(staged, error) from error
    image = read(staged)
    if image.architecture != architecture:
        raise WherryError(f"{base}/{MANIFEST} describes an image for {image.architecture}")
    for name, (size, digest) in image.files.items():
        if name.startswith(f"{CLIENTS}/") and not clients:
            continue
        _fetch(f"{base}/{name}", staged / name, size, digest, progress)
    return install(layout, staged)


def _fetch(
    url: str, path: Path, size: int, digest: str, progress: Callable[[str, int, int], None]
) -> None:
    """Bring one file to its full size, continuing what is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    failure: Exception | None = None
    pause_s, before = _PAUSE_S, -1
    for _ in range(_TRIES):
        have = path.stat().st_size if path.exists() else 0
        if have == before:  # nothing came: a server that restarts needs a moment
            time.sleep(pause_s)
            pause_s *= 2
        before = have
        if have > size:
            path.unlink()
            have = 0
        if have == size:
            if sha256(path) == digest:
                return
            path.unlink()
            failure = WherryError(f"{url} has another SHA-256 than its manifest says")
            continue
        try:
            _append(url, path, have, lambda done: progress(path.name, done, size), size)
        except urllib.error.HTTPError as error:
            error.close()  # it holds the connection
            failure = error
            if error.code < http.HTTPStatus.INTERNAL_SERVER_ERROR:
                break  # the server would say it again
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
                raise _unwritable(path, error) from error
            failure = error
    if isinstance(failure, WherryError):
        raise failure
    raise WherryError(
        f"{url} cannot be fetched: {failure or 'it ended early'}",
        hint="repeat the command: it goes on where it stopped",
    ) from failure


def _append(url: str, path: Path, have: int, progress: Callable[[int], None], size: int) -> None:
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=_tls(url)) as response:
        # A server that ignores the range sends the file from its start.
        mode = "ab" if response.status == http.HTTPStatus.PARTIAL_CONTENT else "wb"
        with path.open(mode) as file:
            while file.tell() < size and (chunk := response.read(_CHUNK_BYTES)):
                file.write(chunk)
                progress(file.tell())
            file.flush()
            os.fsync(file.fileno())


def _unwritable(path: Path, error: OSError) -> WherryError:
    return WherryError(
        f"{path} cannot be written: {error.strerror}",
        hint="free some space, or set WHERRY_HOME to another disk",
    )


def _get(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S, context=_tls(url)) as response:
            data: bytes = response.read(_MANIFEST_LIMIT)
            return data
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        raise WherryError(
            f"{url} cannot be fetched: {error}", hint="check the address and the network"
        ) from error


def _tls(url: str) -> ssl.SSLContext | None:
    """Trust what the system trusts, so that a company's own authority counts."""
    if urllib.parse.urlsplit(url).scheme != "https":
        return None
    import truststore

    return truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
