"""What of the host containers may mount, and what happens to sources that they may not."""

from __future__ import annotations

import json
import shlex
import stat
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from wherry.api.hooks import Refusal, Request
from wherry.core.errors import WherryError
from wherry.service import ssh_agent
from wherry.sync.drives import PathRefused, host_path, to_guest
from wherry.sync.extent import contains
from wherry.sync.roots import Roots
from wherry.sync.session import Session
from wherry.sync.sources import Source
from wherry.tunnel.tunnel import Tunnel

_GUEST_SOCKETS = ("/var/run/docker.sock", "/run/docker.sock", ssh_agent.GUEST_SOCKET)
"""The guest's own, whatever is shared: the engine that the container runs in, and the way to the
host's SSH agent."""

_QUESTION_S = 10.0


class Shared:
    """The directories that containers may mount from; see :class:`wherry.service.mounts.Mounts`."""

    def __init__(
        self, roots: Roots, tunnel: Tunnel, directories: Iterable[str], *, drives: bool
    ) -> None:
        self._roots = roots
        self._tunnel = tunnel
        self._drives = drives
        self.host_path = host_path(drives)
        """Gives the host's path of one of the guest's."""
        self._directories = tuple(
            (to_guest(path) if drives else path).rstrip("/") or "/" for path in directories
        )

    def rewritten(
        self, request: Request, rewrite: Callable[[Mapping[str, Any]], dict[str, Any]]
    ) -> dict[str, Any]:
        """Return the body, which the engine gets with the guest's paths.

        :raises Refusal: a path in it is none that the guest has another form of.
        """
        body = parse_json(request.body)
        if not self._drives or not body:
            return body
        try:
            rewritten = rewrite(body)
        except PathRefused as error:
            raise Refusal(400, str(error)) from error
        if rewritten != body:
            request.replace_body(json.dumps(rewritten).encode())
        return rewritten

    def has(self, path: str) -> bool:
        """Whether a path of the guest's is one that containers may mount of the host."""
        return path not in _GUEST_SOCKETS and any(
            path == root or contains(root, path) for root in self._directories
        )

    def share(self, source: Source, *, first: bool = False) -> Session | None:
        """Begin to keep a source equal; None if it is the guest's own.

        :param first: see :meth:`Roots.require <wherry.sync.roots.Roots.require>`.

        :raises Refusal: it is neither, or cannot be kept equal.
        """
        if not self.has(source.path):
            self._check_guest(source.path)
            return None
        path = self.host_path(source.path)
        try:
            try:
                mode = path.stat().st_mode
            except FileNotFoundError:
                if not source.create:
                    raise Refusal(
                        400,
                        'invalid mount config for type "bind": '
                        f"bind source path does not exist: {path}",
                    ) from None
                path.mkdir(parents=True)
                mode = path.stat().st_mode
            if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
                raise Refusal(
                    400,
                    f"{path} is neither a file nor a directory; sockets and devices of"
                    " this computer cannot be mounted into containers",
                )
            return self._roots.require(source.path, read_only=source.read_only, first=first)
        except OSError as error:
            raise Refusal(500, f"{path} cannot be shared: {error.strerror}") from error
        except WherryError as error:
            raise Refusal(500, str(error)) from error

    def _check_guest(self, path: str) -> None:
        """Refuse a path that is nowhere: the engine would make an empty directory of it."""
        try:
            done = self._tunnel.run(f"test -e {shlex.quote(path)}", timeout_s=_QUESTION_S)
        except WherryError as error:
            raise Refusal(503, str(error)) from error
        if done.status != 0:
            message = f"{path} is not in a directory that is shared with containers"
            if not self._drives:  # else it is on none, and all are shared unless the user says so
                shared = ":".join((*self._directories, path))
                message += f"; to share it: wherry config set sync.shared {shared}"
            raise Refusal(400, message)


def parse_json(data: bytes | None) -> dict[str, Any]:
    """Return a JSON object; an empty one for anything else, which the engine will refuse."""
    try:
        return json_object(json.loads(data or b""))
    except ValueError:
        return {}


def json_object(found: object) -> dict[str, Any]:
    """Return what was found in JSON, or an empty object if it is none."""
    return found if isinstance(found, dict) else {}
