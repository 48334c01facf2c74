"""What has to be known of the keys of the engine's ``daemon.json`` (dockerd(8)).

The engine itself checks them. Here is only what it cannot know: which ones are ours, how
they are written as one word, and which it can take anew under containers that run.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

_OURS = "wherry sets it itself"

OWNED: Mapping[str, str] = {
    "hosts": "clients reach the engine through wherry's endpoint alone",
    "proxies": "it is made of proxy.http, proxy.https and proxy.no_proxy",
    "containerd": _OURS,
    "containerd-namespace": _OURS,
    "containerd-plugin-namespace": _OURS,
    "data-root": _OURS,
    "exec-root": _OURS,
    "pidfile": _OURS,
}
"""Keys that a user cannot set, with the reason."""

_LISTS = frozenset(
    {
        "authorization-plugins",
        "cdi-spec-dirs",
        "dns",
        "dns-opts",
        "dns-search",
        "exec-opts",
        "host-gateway-ips",
        "insecure-registries",
        "labels",
        "node-generic-resources",
        "registry-mirrors",
        "storage-opts",
    }
)
"""Lists of texts: a word with commas is enough for them."""

_TEXT_TABLES = frozenset({"log-opts", "default-network-opts"})
"""Tables whose values are texts, also when they look like numbers."""

LIVE = frozenset(
    {
        "authorization-plugins",
        "builder",
        "cdi-spec-dirs",
        "cgroup-parent",
        "debug",
        "default-address-pools",
        "default-cgroupns-mode",
        "default-ipc-mode",
        "default-network-opts",
        "default-runtime",
        "default-shm-size",
        "default-ulimits",
        "dns",
        "dns-opts",
        "dns-search",
        "experimental",
        "host-gateway-ip",
        "host-gateway-ips",
        "init",
        "init-path",
        "insecure-registries",
        "labels",
        "live-restore",
        "log-driver",
        "log-format",
        "log-level",
        "log-opts",
        "max-concurrent-downloads",
        "max-concurrent-uploads",
        "max-download-attempts",
        "metrics-addr",
        "no-new-privileges",
        "node-generic-resources",
        "proxies",
        "raw-logs",
        "registry-mirrors",
        "runtimes",
        "seccomp-profile",
        "shutdown-timeout",
    }
)
"""Keys that are about the engine, or about containers and networks made from then on.

The others, such as those of the bridge and of the storage, are left alone by an engine that
takes over running containers, or make it lose them.
"""


def check(table: Mapping[str, Any]) -> None:
    """Refuse what no ``daemon.json`` of ours can have.

    :raises ValueError: the reason.
    """
    for key, reason in OWNED.items():
        if key in table:
            raise ValueError(f"{key} cannot be set: {reason}")
    _check_json(table)


def _check_json(value: Any) -> None:
    """TOML has dates, and numbers that are none."""
    if isinstance(value, Mapping):
        for each in value.values():
            _check_json(each)
    elif isinstance(value, list):
        for each in value:
            _check_json(each)
    elif not isinstance(value, (str, int, float)) or value in (math.inf, -math.inf):
        raise ValueError(f"{value} is nothing that daemon.json can hold")
    elif value != value:
        raise ValueError("nan is nothing that daemon.json can hold")


def from_word(path: Sequence[str], word: str) -> Any:
    """Return the value that a word of the command line means for a key.

    It is read as TOML, and is a text where it is not that.

    :param path: the key and, in tables, the keys below it.
    """
    try:
        value = tomllib.loads(f"value = {word}")["value"]
        _check_json(value)
    except ValueError:  # tomllib's error is one
        value = word
    if len(path) > 1 and path[0] in _TEXT_TABLES and not isinstance(value, str):
        return word
    if len(path) == 1 and path[0] in _LISTS and not isinstance(value, list):
        return [part for part in map(str.strip, word.strip("\"'").split(",")) if part]
    return value


def split_key(key: str) -> list[str]:
    """Return the parts of a dotted key as TOML has it: a part with dots in it has quotes.

    :raises ValueError: it is no key.
    """
    try:
        level: Any = tomllib.loads(f"{key} = 0")
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{key} is no key") from error
    path = []
    while isinstance(level, dict) and len(level) == 1:
        ((part, level),) = level.items()
        path.append(part)
    if level != 0:
        raise ValueError(f"{key} is no key")
    return path


def render(settings: Mapping[str, Any]) -> str:
    """Return the text of a ``daemon.json``; equal settings give equal texts."""
    return json.dumps(settings, indent=2, sort_keys=True) + "\n"
