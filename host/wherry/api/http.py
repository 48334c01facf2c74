"""Heads of HTTP/1.1 messages (RFC 9112), as they came and as they are understood.

A request's head is read by h11, after what h11 forgives is refused: whoever forgives
something else than the engine does can be made to see other requests than the engine
sees (request smuggling, RFC 9112 §11.2). The head of an answer is the engine's own, and
has been passed on when it is read here, so only its framing is looked at.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from urllib.parse import parse_qs, unquote_to_bytes

import h11

from wherry.api.framing import Body, Chunked, Length, UntilEnd

HEAD_LIMIT_BYTES = (1 << 20) + 4096
"""The longest head of a request, the empty line included: as long as the engine takes it, by
``DefaultMaxHeaderBytes`` of Go's ``net/http`` and the 4 KiB that its server adds. The
credentials for all of a user's registries (``X-Registry-Config``) are in one."""

HEADER_LIMIT = 4096
"""The most headers of a request. The engine counts none, but each takes a hundred bytes beside
its own, and no client sends a hundred."""

PATH_LIMIT_BYTES = 64 * 1024
"""The longest path of a target, before its query."""

MARK_LIMIT = 4 * HEADER_LIMIT
"""The most blanks, commas and ``&`` of a head each: what stands between them takes some hundred
bytes while it is split."""

ESCAPE_LIMIT = 64 * 1024
"""The most ``%`` of a head; each takes two hundred bytes while it is decoded."""

_SHOWN_CHARACTERS = 200
"""Of what h11 says, since it may cite all of the head."""

Headers = tuple[tuple[bytes, bytes], ...]
"""Names in lower case, and values, in the order in which they came."""

_FORBIDDEN = re.compile(rb"[^\t\r\n\x20-\x7e\x80-\xff]|\r(?!\n)|(?<!\r)\n|\n[ \t]")
"""Control characters, CR and LF alone (RFC 9112 §2.2), folded lines (RFC 9112 §5.2)."""

_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:([^\r]*)", re.I)
_LENGTH = re.compile(rb"[0-9]{1,18}")
_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_ABSOLUTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?]*")
_VERSION_PREFIX = re.compile(r"/v([0-9.]+)(/.*)", re.DOTALL)
"""As in moby's ``api/server``: ``/v{version:[0-9.]+}`` before each route."""

_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-9][0-9]{2})(?: [^\r\n]*)?")
_RAW_STREAMS = (
    b"application/vnd.docker.raw-stream",
    b"application/vnd.docker.multiplexed-stream",
)
_HIJACKING = re.compile(r"/containers/.*/attach|/exec/.*/start", re.DOTALL)
_FRAMING = frozenset((b"content-length", b"transfer-encoding", b"trailer", b"expect"))
_CACHED_HEAD_BYTES = 1024


class MalformedRequest(Exception):
    """Bytes that are no request, or one that could be understood in two ways."""


class MalformedAnswer(Exception):
    """Bytes from the engine that are no answer."""


class _Head:
    headers: Headers

    def header(self, name: str) -> str | None:
        """Return the first value of a header; None when there is none."""
        wanted = name.lower().encode()
        for found, value in self.headers:
            if found == wanted:
                return value.decode("latin-1")
        return None

    def _lists(self, name: bytes, token: bytes) -> bool:
        """Whether a comma-separated header has a token (RFC 9110 §5.6.1)."""
        return any(
            token == part.strip().lower()
            for found, value in self.headers
            if found == name
            for part in value.split(b",")
        )


@dataclass(frozen=True)
class Asked:
    """What an answer is understood by: all that is kept of a request which has gone on.

    :param path: decoded, without the API's version; what moby routes by.
    """

    method: str
    path: str

    @property
    def may_hijack(self) -> bool:
        """Whether an answer 200 can turn the connection into a raw stream.

        Attaching and executing answer so when the client asked for no upgrade (Engine
        API, ContainerAttach, "Hijacking").
        """
        return self.method == "POST" and _HIJACKING.fullmatch(self.path) is not None


@dataclass(frozen=True)
class RequestHead(Asked, _Head):
    """A request without its body.

    :param raw: as it came, with the empty line.
    :param api_version: such as ``1.51``; empty when the request names none.
    :param length: of the body in bytes; None for a chunked one.
    """

    raw: bytes
    target: str
    api_version: str
    http_version: str
    headers: Headers
    length: int | None

    @cached_property
    def query(self) -> dict[str, list[str]]:
        """The query's values by name."""
        return parse_qs(self.target.partition("?")[2], keep_blank_values=True)

    @cached_property
    def keep_alive(self) -> bool:
        """Whether the client wants to send more on this connection (RFC 9112 §9.3)."""
        return self.http_version == "1.1" and not self._lists(b"connection", b"close")

    @cached_property
    def expects_continue(self) -> bool:
        """Whether the client waits for a word before it sends the body (RFC 9110 §10.1.1)."""
        return self.http_version == "1.1" and self._lists(b"expect", b"100-continue")

    def body(self) -> Body:
        """Return what finds the end of the request's body."""
        return Chunked() if self.length is None else Length(self.length)

    def with_body(self, length: int) -> bytes:
        """Return the raw head for another body, of ``length`` bytes, that follows at once."""
        lines = self.raw[:-4].split(b"\r\n")
        kept = lines[:1] + [
            line for line in lines[1:] if line.partition(b":")[0].lower() not in _FRAMING
        ]
        return b"\r\n".join([*kept, b"Content-Length: %d" % length, b"", b""])


@dataclass(frozen=True)
class ResponseHead(_Head):
    """An answer without its body.

    :param raw: as it came, with the empty line.
    """

    raw: bytes
    status: int
    headers: Headers

    @property
    def interim(self) -> bool:
        """Whether the answer proper is still to come (RFC 9110 §15.2)."""
        return self.status < 200 and self.status != 101

    def switches(self, request: Asked) -> bool:
        """Whether the connection is a raw stream from here on."""
        if self.status == 101:
            return True
        if self.status != 200 or not request.may_hijack:
            return False
        kind = (self.header("content-type") or "").encode("latin-1")
        return kind.startswith(_RAW_STREAMS) and isinstance(self.body(request), UntilEnd)

    def body(self, request: Asked) -> Body:
        """Return what finds the end of the answer's body (RFC 9112 §6.3).

        :raises MalformedAnswer: the length is no number.
        """
        if request.method == "HEAD" or self.status in (204, 304):
            return Length(0)
        if self.header("transfer-encoding") is not None:
            if not self._lists(b"transfer-encoding", b"chunked"):
                return UntilEnd()
            return Chunked()
        length = self.header("content-length")
        if length is None:
            return UntilEnd()
        if not _LENGTH.fullmatch(length.encode("latin-1")):
            raise MalformedAnswer(f"the answer's length is {length!r}")
        return Length(int(length))


def parse_request(raw: bytes) -> RequestHead:
    """Read a request's head, which ends with the first empty line.

    :raises MalformedRequest: it is not one, or not only one.
    """
    # Clients repeat themselves, and the short questions are the ones that hurry. Credentials
    # are kept no longer than their request.
    cached = len(raw) <= _CACHED_HEAD_BYTES and b"x-registry-" not in raw.lower()
    return _parse_again(raw) if cached else _parse_request(raw)


def _parse_request(raw: bytes) -> RequestHead:
    if raw.startswith(b"PRI * HTTP/2"):
        raise MalformedRequest("HTTP/2 is only spoken after an upgrade")
    if _FORBIDDEN.search(raw):
        raise MalformedRequest("a control character, a bare CR or LF, or a folded line")
    if raw.count(b"\n") - 2 > HEADER_LIMIT:
        raise MalformedRequest(f"more than {HEADER_LIMIT} headers")
    if len(raw) > MARK_LIMIT:
        _bound_marks(raw)
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_LIMIT_BYTES)
    try:
        connection.receive_data(raw)
        request = connection.next_event()
    except h11.RemoteProtocolError as error:
        raise MalformedRequest(str(error)[:_SHOWN_CHARACTERS]) from error
    if not isinstance(request, h11.Request):
        raise MalformedRequest("no request")
    http_version = request.http_version.decode("ascii")
    if http_version not in ("1.0", "1.1"):
        raise MalformedRequest(f"HTTP/{http_version} is not spoken here")
    method = request.method.decode("ascii")
    if method == "CONNECT":
        raise MalformedRequest("this is no proxy to other places")
    # h11 joins several lengths into one when they agree, so the raw head is asked.
    lengths = [found.strip(b" \t") for found in _CONTENT_LENGTH.findall(raw)]
    chunked = any(name == b"transfer-encoding" for name, _ in request.headers)
    if len(lengths) > 1:
        raise MalformedRequest("more than one Content-Length")
    if lengths and (chunked or not _LENGTH.fullmatch(lengths[0])):
        raise MalformedRequest("a bad Content-Length, or one beside Transfer-Encoding")
    if chunked and http_version == "1.0":
        raise MalformedRequest("Transfer-Encoding in a request of HTTP/1.0")
    target = request.target.decode("ascii", "surrogateescape")
    path, api_version = _split_target(method, target)
    return RequestHead(
        raw=raw,
        method=method,
        target=target,
        path=path,
        api_version=api_version,
        http_version=http_version,
        headers=tuple(request.headers),
        length=None if chunked else int(lengths[0]) if lengths else 0,
    )


def _bound_marks(raw: bytes) -> None:
    """Refuse what takes many times its own length once it is taken apart."""
    if raw.count(b" ") + raw.count(b"\t") > MARK_LIMIT:
        raise MalformedRequest(f"more than {MARK_LIMIT} blanks")
    if raw.count(b",") > MARK_LIMIT or raw.count(b"&") > MARK_LIMIT:
        raise MalformedRequest(f"more than {MARK_LIMIT} commas or parts of a query")
    if raw.count(b"%") > ESCAPE_LIMIT:
        raise MalformedRequest(f"more than {ESCAPE_LIMIT} escapes")


_parse_again: Callable[[bytes], RequestHead] = lru_cache(maxsize=256)(_parse_request)


def _split_target(method: str, target: str) -> tuple[str, str]:
    """Return the decoded path and the API's version of a target (RFC 9112 §3.2)."""
    encoded = target.partition("?")[0]
    if len(encoded) > PATH_LIMIT_BYTES:
        raise MalformedRequest(f"the path is longer than {PATH_LIMIT_BYTES} bytes")
    if not encoded.startswith("/"):
        if method == "OPTIONS" and target == "*":
            return "*", ""
        absolute = _ABSOLUTE.match(target)
        if absolute is None:
            raise MalformedRequest("the target is not a path")
        encoded = encoded[absolute.end() :] or "/"
    raw = encoded.encode("ascii", "surrogateescape")
    if not encoded.isascii() or _BAD_ESCAPE.search(raw):
        raise MalformedRequest("the target is badly escaped")
    path = unquote_to_bytes(raw).decode("utf-8", "surrogateescape")
    if "\0" in path:
        raise MalformedRequest("a NUL in the target")
    match = _VERSION_PREFIX.fullmatch(path)
    return (match[2], match[1]) if match else (path, "")


def parse_answer(raw: bytes) -> ResponseHead:
    """Read an answer's head, which ends with the first empty line.

    :raises MalformedAnswer: it is none.
    """
    first, *lines = raw[:-4].split(b"\r\n")
    status = _STATUS_LINE.fullmatch(first)
    if status is None:
        raise MalformedAnswer(f"no status line of HTTP/1.1: {first[:80]!r}")
    headers = []
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not name.strip():
            raise MalformedAnswer(f"no header: {line[:80]!r}")
        headers.append((name.lower(), value.strip(b" \t")))
    return ResponseHead(raw=raw, status=int(status[1]), headers=tuple(headers))
