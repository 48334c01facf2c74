"""``/var/run/docker.sock``: a symbolic link to a machine's endpoint, where that is wanted.

Programs that know neither contexts nor ``DOCKER_HOST`` look there. The link is made only where
nothing is, and removed only while it leads to this machine: another engine's socket, and a link
to one, stay as they are, also when nobody listens on them.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from wherry.config.layout import Layout, MachinePaths
from wherry.config.model import Config
from wherry.core.errors import WherryError


@dataclass(frozen=True)
class DefaultSocket:
    """The place where Docker clients look by default, and what should be there.

    :param path: the place; None on a system that has none for a link.
    :param target: the machine's endpoint.
    """

    path: Path | None
    target: Path

    @classmethod
    def of(cls, layout: Layout, paths: MachinePaths) -> DefaultSocket:
        """Return the place for a machine."""
        return cls(layout.platform.default_docker_socket(), paths.docker_socket)

    def is_ours(self) -> bool:
        """Whether the place leads to this machine, no matter who made it so."""
        if self.path is None:
            return False
        try:
            found = self.path.readlink()
        except OSError:
            return False  # nothing, or no link
        return found == self.target or self.path.resolve() == self.target.resolve()

    def problem(self) -> WherryError | None:
        """Return why the place cannot be claimed, or None: it is free, or ours."""
        if self.path is None:
            return WherryError("this system has no default socket that could lead elsewhere")
        if self.is_ours():
            return None
        if os.path.lexists(self.path):
            return self._taken(self.path)
        if not os.access(self.path.parent, os.W_OK | os.X_OK, effective_ids=True):
            return self._forbidden(self.path)
        return None

    def claim(self) -> None:
        """Make the place lead to this machine; it may do so already.

        :raises WherryError: it cannot; nothing changed. The hint says what can be done.
        """
        if self.path is None or self.is_ours():
            problem = self.problem()
            if problem is not None:
                raise problem
            return
        try:
            # Fails where anything is, so nobody else's is ever replaced.
            self.path.symlink_to(self.target)
        except FileExistsError as error:
            raise self._taken(self.path) from error
        except PermissionError as error:
            raise self._forbidden(self.path) from error
        except OSError as error:
            raise WherryError(f"{self.path} cannot be made: {error.strerror}") from error

    def release(self) -> None:
        """Remove the link if it leads to this machine; another's is left alone.

        :raises WherryError: the link is ours and cannot be removed.
        """
        if self.path is None or not self.is_ours():
            return
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise WherryError(
                f"{self.path} still leads to this machine: {error.strerror}",
                hint=f"remove it: sudo rm {shlex.quote(str(self.path))}",
            ) from error

    def _taken(self, path: Path) -> WherryError:
        try:
            what = f"leads to {path.readlink()}"
        except OSError:
            what = "is another program's"
        return WherryError(
            f"{path} {what}, and is left as it is",
            hint=f"stop what made it, or remove it with: sudo rm {shlex.quote(str(path))}",
        )

    def _forbidden(self, path: Path) -> WherryError:
        target, link = shlex.quote(str(self.target)), shlex.quote(str(path))
        return WherryError(
            f"{path} cannot be made, as you may not write to {path.parent}",
            hint=f"make it yourself: sudo ln -s {target} {link}",
        )


def describe(layout: Layout, paths: MachinePaths, config: Config) -> dict[str, object] | None:
    """Return what ``wherry status`` tells of it; None where the machine shall not have it."""
    if not config.default_socket:
        return None
    place = DefaultSocket.of(layout, paths)
    problem = place.problem()
    return {
        "path": str(place.path) if place.path is not None else None,
        "claimed": place.is_ours(),
        "problem": problem.message if problem is not None else "",
        "hint": problem.hint if problem is not None else "",
    }
