"""The addresses of HTTP proxies as people give them."""

from __future__ import annotations

import re
import urllib.parse

AUTO = "auto"
"""What the environment, or the system, says."""

SCHEMES = ("http", "https", "socks5", "socks5h")
"""Those that the engine's HTTP client knows (Go, ``net/http``, ``Transport.Proxy``)."""

_CREDENTIALS = re.compile(r"(?<=//)[^/\s\"']*@")


def mask(text: str) -> str:
    """Return a text without the user names and passwords of the addresses in it."""
    return _CREDENTIALS.sub("***@", text)


def parse(value: object) -> str:
    """Return a proxy's address with its scheme; ``auto`` and an empty text are as they are.

    :raises ValueError: it is no address; the message has no credentials.
    """
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    if value in (AUTO, ""):
        return value
    url = value if "//" in value else f"http://{value}"
    try:
        parts = urllib.parse.urlsplit(url)
        usable = bool(parts.hostname) and parts.port != 0 and parts.scheme in SCHEMES
    except ValueError:
        usable = False
    if not usable or re.search(r"\s", url):
        raise ValueError(f"{mask(url)!r} is not the address of a proxy, such as http://host:3128")
    return url
