"""When the guest gets what the host trusts.

A guest that boots gets it by its firmware, before its engine starts. One that runs already, and
one that has to get much, gets it through the tunnel, before the first request does.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from wherry.config.layout import Layout, MachinePaths
from wherry.config.load import load
from wherry.core.errors import WherryError
from wherry.core.files import write_atomic
from wherry.service.certificates import Certificates, collect
from wherry.tunnel.tunnel import Tunnel
from wherry.vm.image import Image, installed

log = logging.getLogger(__name__)

DIRECTORY = "certs.d"
"""In ``WHERRY_HOME``, when the settings name no other."""

FIRMWARE_BYTES = 16 << 10
"""How much goes by the firmware. The guest's kernel reads a file of fw_cfg by pages, each from the
file's beginning (``fw_cfg_read_blob``) and byte by byte, so the time grows with the square."""

_TAKE = "/usr/lib/wherry/certificates"
_TAKE_S = 30.0


@dataclass(frozen=True)
class Applied:
    """What became of a change.

    :ivar problems: what could not be used, one line each.
    :ivar changed: whether the authorities are others now. An engine that runs has read those
        before, once and for all (Go, ``x509.SystemCertPool``).
    """

    problems: tuple[str, ...]
    changed: bool


class Trust:
    """Keeps one machine's guest trusting what the host does; the methods block."""

    def __init__(self, layout: Layout, paths: MachinePaths) -> None:
        self._layout = layout
        self._paths = paths
        self._booted = False
        self._due = True
        self.problems: tuple[str, ...] = ()
        """What could not be used the last time, one line each."""

    def firmware(self, image: Image) -> dict[str, Path]:
        """Return the files for the firmware of a guest that is about to boot."""
        found = self._collect(image.certificates)
        self._booted, self._due = True, False
        if found.empty:
            return {}
        archive = found.archive()
        if len(archive) > FIRMWARE_BYTES:
            self._due = True
            return {}
        path = self._paths.directory / "certificates.tar.gz"
        write_atomic(path, archive)
        return {"certificates": path}

    def catch_up(self, tunnel: Tunnel, image: Mapping[str, str]) -> None:
        """Give a guest that is connected now what it did not get by its firmware.

        :param image: ``sha256`` of the one that it runs.
        """
        if not self._due:
            return
        try:
            changed = _give(tunnel, self._collect(self._known(image)))
            # The engine of a guest that has just booted has had nobody to trust yet.
            if changed and not self._booted:
                log.warning("the engine trusts other authorities from its next start on")
            self._due = False
        except WherryError as error:
            log.warning("%s", error)

    def apply(self, tunnel: Tunnel, image: Mapping[str, str]) -> Applied:
        """Give what is there now to a guest that runs.

        :param image: ``sha256`` of the one that it runs.
        :raises WherryError: it does not take it.
        """
        found = self._collect(self._known(image))
        return Applied(found.problems, _give(tunnel, found))

    def _known(self, image: Mapping[str, str]) -> frozenset[str]:
        """Return what a guest trusts by itself; nothing if its image is not there any more."""
        for each in installed(self._layout):
            if each.sha256 == image.get("sha256"):
                return each.certificates
        return frozenset()

    def _collect(self, known: frozenset[str]) -> Certificates:
        chosen = load(self._paths.config, self._layout.platform).certificates
        found = collect(
            self._layout.platform,
            Path(chosen) if chosen else self._layout.home / DIRECTORY,
            known,
            optional=not chosen,
        )
        for problem in found.problems:
            log.warning("%s", problem)
        self.problems = found.problems
        return found


def _give(tunnel: Tunnel, certificates: Certificates) -> bool:
    """Have a guest trust these instead of what it was given before.

    :returns: whether its bundle changed.
    :raises WherryError: the guest does not take them.
    """
    done = tunnel.run(_TAKE, certificates.archive(), timeout_s=_TAKE_S)
    if done.status != 0:
        said = done.stderr.decode(errors="replace").strip()
        raise WherryError(f"the guest does not take the certificates: {said}")
    return done.stdout.strip() == b"changed"
