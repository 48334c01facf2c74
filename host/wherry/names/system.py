"""The names that the host knows by itself, as they are at this moment."""

from __future__ import annotations

from pathlib import Path

from wherry.names.zone import HOST_NAMES, Hosts, parse_hosts

GATEWAY = "10.0.2.2"
"""The host, as QEMU shows it to the guest."""

_OURS = {name: [GATEWAY] for name in HOST_NAMES}


class SystemNames:
    """What the host knows.

    :param hosts_file: hosts(5); may be missing. It is read again when it has changed.
    """

    def __init__(self, hosts_file: Path) -> None:
        self._path = hosts_file
        self._seen: tuple[int, int, int] | None = None
        self._found: Hosts = _OURS

    def hosts(self) -> Hosts:
        """Return the names of the hosts file, and those of the host itself.

        What leads to the host's loopback leads to the host.
        """
        try:
            found = self._path.stat()
            seen = (found.st_mtime_ns, found.st_size, found.st_ino)
            if seen != self._seen:
                text = self._path.read_text(encoding="utf-8", errors="replace")
                # Ours come first, for who asks whose address that is, and cannot be others.
                self._found = {**_OURS, **parse_hosts(text, GATEWAY), **_OURS}
                self._seen = seen
        except OSError:
            self._found, self._seen = _OURS, None
        return self._found
