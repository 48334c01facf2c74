"""The host's SSH agent in containers, at the path that Docker Desktop has for it.

A container gets it by ``-v /run/host-services/ssh-auth.sock:/run/host-services/ssh-auth.sock``.
There a supervised program of the guest listens. It passes each client on to a socket that sshd
listens at for us, and so to a stream of the tunnel. Since the first of them outlives the tunnel's
connections, so does what containers have mounted.
"""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path

from wherry.config.layout import Layout, MachinePaths
from wherry.config.load import load
from wherry.core.errors import TunnelError, WherryError
from wherry.relay.relay import Relays
from wherry.relay.workers import Workers
from wherry.tunnel.connection import Connection
from wherry.tunnel.stream import Stream

log = logging.getLogger(__name__)

GUEST_SOCKET = "/run/host-services/ssh-auth.sock"
"""What containers mount."""

_TUNNEL_SOCKET = "/run/ssh-agent.sock"
_CLIENTS = 64
_CONNECT_S = 5.0


class SshAgent:
    """Relays clients in the guest to the host's agent, which is looked up for each of them."""

    def __init__(self, layout: Layout, paths: MachinePaths) -> None:
        self._platform = layout.platform
        self._config = paths.config
        self._session_socket = os.environ.get("SSH_AUTH_SOCK", "")
        self._workers = Workers("ssh-agent")
        self._relays = Relays(self._workers, limit=_CLIENTS)

    def offer(self, connection: Connection) -> None:
        """Serve the guest over a new connection; one that does not allow it is used all the same.

        To be called before anything else is asked over it.
        """
        try:
            connection.listen_unix(_TUNNEL_SOCKET, self._accept)
        except TunnelError as error:
            log.warning("containers get no SSH agent: %s", error)

    def follow(self, socket: str) -> None:
        """Take the agent of the user's last session: it is the likeliest to live.

        :param socket: its ``SSH_AUTH_SOCK``; when empty, the session before counts on.
        """
        self._session_socket = socket or self._session_socket

    def close(self) -> None:
        """End all clients; safe to call twice."""
        self._relays.close()

    def _accept(self, stream: Stream) -> None:
        try:
            self._workers.spawn(partial(self._serve, stream))
        except RuntimeError:
            stream.close()

    def _serve(self, stream: Stream) -> None:
        try:
            path = load(self._config, self._platform).ssh_agent or self._session_socket
            if not path:
                raise WherryError("SSH_AUTH_SOCK names none")
            try:
                local = self._platform.connect_local(Path(path), _CONNECT_S)
            except OSError as error:
                raise WherryError(f"{path} does not answer: {error.strerror or error}") from error
            self._relays.serve(local, lambda: stream)
        except WherryError as error:
            log.warning("a container asked for the SSH agent: %s", error)
        finally:
            stream.close()
