"""The names that the host knows by itself, as they are at this moment."""

from __future__ import annotations

from pathlib import Path

from wherry.names.zone import HOST_NAMES, parse_hosts

GATEWAY = "10.0.2.2"
"""The host, as QEMU shows it to the guest."""


class CachedFile:
    """A file's text, read again when it has changed.

    :param path: a file that may be missing, which is an empty one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._text = ""

    def text(self) -> str:
        """Return what is in it now."""
        try:
            found = self._path.stat()
            seen = (found.st_mtime_ns, found.st_size, found.st_ino)
            if seen != self._seen:
                self._text = self._path.read_text(encoding="utf-8", errors="replace")
                self._seen = seen
        except OSError:
            self._text, self._seen = "", None
        return self._text


class SystemNames:
    """What the host knows.

    :param hosts_file: hosts(5).
    """

    def __init__(self, hosts_file: Path) -> None:
        self._hosts = CachedFile(hosts_file)

    def hosts(self) -> dict[str, list[str]]:
        """Return the names of the hosts file, and those of the host itself."""
        return {**parse_hosts(self._hosts.text()), **{name: [GATEWAY] for name in HOST_NAMES}}
