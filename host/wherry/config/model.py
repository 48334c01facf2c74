"""The settings of one machine: names, types, defaults, limits.

``SETTINGS`` is the only list of them. Loading, ``wherry config`` and the README's
table are made from it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wherry.config import engine_keys, proxy
from wherry.config.units import format_size, parse_size

if TYPE_CHECKING:
    from wherry.platform import Platform

GIB = 1 << 30
MIB = 1 << 20

ACCELERATORS = ("auto", "kvm", "hvf", "whpx", "tcg")

SMALLEST_MEMORY = 512 * MIB
"""Below this the engine itself does not start reliably."""

SMALLEST_DISK = 1 * GIB

_LARGEST_SIZE = 1 << 60


def _as_is(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Setting:
    """One key of ``config.toml``.

    ``parse`` takes what TOML or the command line gave and returns the value, or
    raises ValueError with the reason.
    """

    key: str
    parse: Callable[[Any], Any]
    default: Callable[[Platform], Any]
    help: str
    show: Callable[[Any], Any] = _as_is
    """What is written to the file and shown for a value."""


@dataclass(frozen=True)
class ProxySettings:
    """The settings ``proxy.*``, as they are written: addresses, ``auto``, or empty for none."""

    http: str = proxy.AUTO
    https: str = proxy.AUTO
    no_proxy: str = proxy.AUTO
    containers: bool = False
    """Whether the docker CLI gives them to containers and builds."""


@dataclass(frozen=True)
class Config:
    """The effective settings of a machine: what the file says, over the defaults."""

    cpus: int
    memory_bytes: int
    disk_bytes: int
    accelerator: str
    image: str
    default_socket: bool
    shared: tuple[str, ...]
    host_access: bool = True
    certificates: str = ""
    """A directory, empty for ``certs.d`` in ``WHERRY_HOME``."""
    ssh_agent: str = ""
    """A socket, empty for ``$SSH_AUTH_SOCK``."""
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Keys for the engine's ``daemon.json``, as its documentation names them."""
    proxy: ProxySettings = ProxySettings()


def _count(value: Any) -> int:
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{value!r} is not a whole number above 0")
    return value


def _size(smallest: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if isinstance(value, int) and not isinstance(value, bool):
            size = value
        elif isinstance(value, str):
            size = parse_size(value)
        else:
            raise ValueError(f"{value!r} is not a size such as 4GiB")
        if size > _LARGEST_SIZE:
            raise ValueError("the size is more than any disk or memory has")
        if size < smallest:
            raise ValueError(f"{format_size(size)} is below the least, {format_size(smallest)}")
        return size

    return parse


def _one_of(choices: tuple[str, ...]) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"{value!r} is none of {', '.join(choices)}")
        return str(value)

    return parse


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    return value


def _flag(value: Any) -> bool:
    words = {"true": True, "false": False}
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false")
    return value


def _paths(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [part for part in value.split(os.pathsep) if part]
    if not isinstance(value, (list, tuple)) or not all(isinstance(path, str) for path in value):
        raise ValueError(f"{value!r} is not a list of directories")
    found = [os.path.normpath(Path(path).expanduser()) for path in value]
    for path in found:
        if not Path(path).is_absolute():
            raise ValueError(f"{path!r} is not an absolute path")
    return tuple(found)


def _path(value: Any) -> str:
    if value == "":
        return ""
    paths = _paths([value])
    return paths[0]


def _engine(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{value!r} is not a table")
    engine_keys.check(value)
    return dict(value)


SETTINGS: Mapping[str, Setting] = {
    setting.key: setting
    for setting in (
        Setting(
            "cpus",
            _count,
            lambda platform: min(4, platform.cpu_count()),
            "virtual processors",
        ),
        Setting(
            "memory",
            _size(SMALLEST_MEMORY),
            lambda platform: max(SMALLEST_MEMORY, min(4 * GIB, platform.memory_bytes() // 2)),
            "memory of the guest, such as 4GiB",
            format_size,
        ),
        Setting(
            "disk",
            _size(SMALLEST_DISK),
            lambda platform: 64 * GIB,
            "size that the data disk may grow to, such as 64GiB",
            format_size,
        ),
        Setting(
            "accelerator",
            _one_of(ACCELERATORS),
            lambda platform: "auto",
            f"one of {', '.join(ACCELERATORS)}; auto tries which one works",
        ),
        Setting(
            "image",
            _text,
            lambda platform: "",
            "version of the guest image; empty for the newest installed one",
        ),
        Setting(
            "endpoint.default_socket",
            _flag,
            lambda platform: False,
            "whether /var/run/docker.sock leads to this machine while it runs",
        ),
        Setting(
            "sync.shared",
            _paths,
            lambda platform: platform.shared_directories(),
            f"directories that containers can mount from, with {os.pathsep!r} between them",
            list,
        ),
        Setting(
            "network.host_access",
            _flag,
            lambda platform: True,
            "whether containers can use services on this computer's 127.0.0.1",
        ),
        Setting(
            "proxy.http",
            proxy.parse,
            lambda platform: proxy.AUTO,
            "proxy for the engine's HTTP; auto: the environment's or the system's; empty: none",
            proxy.mask,
        ),
        Setting(
            "proxy.https",
            proxy.parse,
            lambda platform: proxy.AUTO,
            "the same for HTTPS, which pulls of images use",
            proxy.mask,
        ),
        Setting(
            "proxy.no_proxy",
            _text,
            lambda platform: proxy.AUTO,
            "names that need no proxy, with commas between them; auto: the environment's",
        ),
        Setting(
            "proxy.containers",
            _flag,
            lambda platform: False,
            "whether the docker CLI gives the proxies to containers and builds too",
        ),
        Setting(
            "certificates.directory",
            _path,
            lambda platform: "",
            "directory of certificates to trust; empty for certs.d in WHERRY_HOME",
        ),
        Setting(
            "ssh.agent",
            _path,
            lambda platform: "",
            "socket of the SSH agent that containers can mount; empty for $SSH_AUTH_SOCK",
        ),
        Setting(
            "engine",
            _engine,
            lambda platform: {},
            "keys of the engine's daemon.json, such as engine.insecure-registries",
        ),
    )
}


def build(values: Mapping[str, Any], platform: Platform) -> Config:
    """Make the configuration of parsed values, by key, and defaults for the rest."""

    def value(key: str) -> Any:
        return values[key] if key in values else SETTINGS[key].default(platform)

    return Config(
        cpus=value("cpus"),
        memory_bytes=value("memory"),
        disk_bytes=value("disk"),
        accelerator=value("accelerator"),
        image=value("image"),
        default_socket=value("endpoint.default_socket"),
        shared=value("sync.shared"),
        host_access=value("network.host_access"),
        certificates=value("certificates.directory"),
        ssh_agent=value("ssh.agent"),
        engine=value("engine"),
        proxy=ProxySettings(
            http=value("proxy.http"),
            https=value("proxy.https"),
            no_proxy=value("proxy.no_proxy"),
            containers=value("proxy.containers"),
        ),
    )


@dataclass(frozen=True)
class Problem:
    """Why the value of a setting cannot be used here, and what to do."""

    key: str
    message: str
    hint: str


def host_problem(
    config: Config, platform: Platform, *, disk_total: int | None = None
) -> Problem | None:
    """Return what this host cannot give of a configuration, or None.

    :param disk_total: size in bytes of the file system of the data disk. The disk is
        sparse, so it may be larger than what is free, but not than all there is.
    """
    if config.cpus > platform.cpu_count():
        return Problem(
            "cpus",
            f"cpus = {config.cpus} is more than the {platform.cpu_count()} of this computer",
            "use a smaller number: --cpus N, or wherry config set cpus N",
        )
    if config.memory_bytes > platform.memory_bytes():
        return Problem(
            "memory",
            f"memory = {format_size(config.memory_bytes)} is more than the "
            f"{format_size(platform.memory_bytes())} of this computer",
            "use a smaller size: --memory SIZE, or wherry config set memory SIZE",
        )
    if config.accelerator not in ("auto", *platform.accelerators):
        return Problem(
            "accelerator",
            f"accelerator = {config.accelerator} does not exist on {platform.name}",
            f"use one of auto, {', '.join(platform.accelerators)}",
        )
    if disk_total is not None and config.disk_bytes > disk_total:
        return Problem(
            "disk",
            f"disk = {format_size(config.disk_bytes)} is more than the "
            f"{format_size(disk_total)} that this computer's disk has",
            "use a smaller size: --disk SIZE, or wherry config set disk SIZE",
        )
    return None
