"""Which HTTP proxies the guest gets, and how it has to address them."""

from __future__ import annotations

import ipaddress
import urllib.parse
import urllib.request
from collections.abc import Mapping

from wherry.config.model import ProxySettings
from wherry.config.proxy import AUTO, parse
from wherry.names.system import GATEWAY
from wherry.names.zone import HOST_NAMES

Proxies = Mapping[str, str]
"""``http``, ``https`` and ``no_proxy``, without those that are not there; empty for none."""


_LOCALHOST = ("localhost", "127.0.0.1", "::1")


def system() -> dict[str, str]:
    """Return the proxies of the environment or, on macOS and Windows, of the system."""
    return urllib.request.getproxies()


def for_guest(settings: ProxySettings, present: Mapping[str, str]) -> Proxies:
    """Return the proxies as the guest and its containers have to use them.

    What is on this computer's loopback is at another address there. The names of this
    computer itself need no proxy, nor does localhost, which only some programs know by
    themselves.

    :param present: what ``auto`` means, as :func:`system` has it.
    """
    found = {}
    for key, setting in (("http", settings.http), ("https", settings.https)):
        address = _usable(present.get(key, "")) if setting == AUTO else setting
        if address:
            found[key] = _seen_from_guest(address)
    if found:
        listed = present.get("no", "") if settings.no_proxy == AUTO else settings.no_proxy
        names = [name for name in map(str.strip, listed.split(",")) if name]
        more = [name for name in (*_LOCALHOST, *HOST_NAMES, GATEWAY) if name not in names]
        found["no_proxy"] = ",".join(names + more)
    return found


def _usable(address: str) -> str:
    """What is in the environment was not written for us: what we cannot use is left out."""
    try:
        return parse(address)
    except ValueError:
        return ""


def _seen_from_guest(address: str) -> str:
    parts = urllib.parse.urlsplit(address)
    host = parts.hostname or ""
    if not _is_loopback(host):
        return address
    # The part before the host may hold characters that unquoting would change.
    credentials, at, _ = parts.netloc.rpartition("@")
    port = f":{parts.port}" if parts.port else ""
    return parts._replace(netloc=f"{credentials}{at}{GATEWAY}{port}").geturl()


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def for_engine(proxies: Proxies) -> dict[str, str]:
    """Return the object ``proxies`` of ``daemon.json`` (dockerd(8), "proxy configuration")."""
    names = {"http": "http-proxy", "https": "https-proxy", "no_proxy": "no-proxy"}
    return {names[key]: value for key, value in proxies.items()}


def for_clients(proxies: Proxies) -> dict[str, str]:
    """Return an object of ``proxies`` in the docker CLI's ``config.json``."""
    names = {"http": "httpProxy", "https": "httpsProxy", "no_proxy": "noProxy"}
    return {names[key]: value for key, value in proxies.items()}
