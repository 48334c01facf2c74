"""One authenticated SSH connection to the guest."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from paramiko.ed25519key import Ed25519Key
from paramiko.ssh_exception import AuthenticationException, IncompatiblePeer, SSHException

from wherry.core.clock import Deadline
from wherry.core.errors import TunnelError
from wherry.core.sockets import SharedSocket
from wherry.tunnel.channels import LOST, StreamChannel
from wherry.tunnel.command import CommandChannel
from wherry.tunnel.keys import KeyPair
from wherry.tunnel.stream import Stream
from wherry.tunnel.transport import TunnelTransport

Address = tuple[str, int]

OPEN_TIMEOUT_S = 10.0
KEEPALIVE_S = 5.0
DEAD_AFTER_S = 15.0
_JOIN_S = 5.0
_OUTPUT_LIMIT_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Completed:
    """What became of a command.

    :param status: its exit status; 128 + N when signal N ended it.
    """

    status: int
    stdout: bytes
    stderr: bytes


class Process:
    """A command that runs in the guest.

    :attr:`stdio` is its standard input and output as one stream.
    """

    def __init__(self, channel: CommandChannel) -> None:
        self._channel = channel
        self.stdio: Stream = channel

    def recv_stderr(self, size: int) -> bytes:
        """Wait for bytes on its standard error; ``b""`` at the end."""
        return self._channel.recv_stderr(size)

    def wait(self, timeout_s: float) -> int:
        """Wait for its end and return its exit status, 128 + N for signal N.

        :raises TunnelError: it did not end in time, or the connection was lost.
        """
        return self._channel.wait(timeout_s)

    def close(self) -> None:
        """Close its pipes; the guest's sshd then hangs it up."""
        self._channel.close()


class Watcher(Protocol):
    """Follows a connection that is being made; no method may block."""

    def started(self, connection: Connection) -> None:
        """Learn of the connection before the handshake, to be able to close it."""

    def ended(self, error: TunnelError) -> None:
        """Learn, once and in a thread of the connection, that it ended; also by ``close()``.

        A handshake that failed is told by ``connect()`` alone.
        """


class Connection:
    """One SSH transport; made by :meth:`connect`. Every method may be called from any thread."""

    def __init__(self, transport: TunnelTransport) -> None:
        self._transport = transport

    @classmethod
    def connect(
        cls,
        address: Address,
        *,
        user_key: KeyPair,
        host_public: str,
        user: str = "root",
        timeout_s: float = 30.0,
        keepalive_s: float = KEEPALIVE_S,
        dead_after_s: float = DEAD_AFTER_S,
        watcher: Watcher | None = None,
    ) -> Connection:
        """Connect, check the guest's key, log in.

        :param host_public: the only host key that is accepted, as :class:`KeyPair` has it.
        :param timeout_s: for all of it together.
        :param keepalive_s: seconds of silence after which the guest is asked for a sign.
        :param dead_after_s: seconds of silence after which the connection is given up.
        :raises TunnelError: nothing listens, the key is another one, the login was
            refused, or time ran out; nothing is left open.
        """
        deadline = Deadline(timeout_s)
        try:
            sock = socket.create_connection(address, timeout=timeout_s)
        except OSError as error:
            raise TunnelError(
                f"no connection to the guest's SSH server at {address[0]}:{address[1]}: {error}"
            ) from error
        connected = threading.Event()

        def on_end(cause: BaseException | None) -> None:
            if watcher is not None and connected.is_set():
                watcher.ended(_lost(cause))

        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            transport = TunnelTransport(
                SharedSocket(sock), keepalive_s=keepalive_s, dead_after_s=dead_after_s, ended=on_end
            )
        except BaseException:
            sock.close()
            raise
        connection = cls(transport)
        try:
            if watcher is not None:
                watcher.started(connection)
            connection._handshake(host_public, user, user_key, deadline)
            connected.set()
            if connection.closed:
                raise TunnelError(LOST)
        except BaseException:
            connection.close()
            raise
        return connection

    def _handshake(
        self, host_public: str, user: str, user_key: KeyPair, deadline: Deadline
    ) -> None:
        transport = self._transport
        # The one deadline is ours; paramiko's own limits must not be shorter.
        transport.banner_timeout = transport.auth_timeout = deadline.seconds
        stage = "the key exchange"
        try:
            done = threading.Event()
            transport.start_client(event=done)
            self._await(done, deadline, stage)
            _check_host_key(transport.get_remote_server_key().get_base64(), host_public)
            stage = "the login"
            done = threading.Event()
            key = Ed25519Key(file_obj=io.StringIO(user_key.private.decode()))
            transport.auth_publickey(user, key, done)
            self._await(done, deadline, stage)
            if not transport.is_authenticated():
                raise AuthenticationException
        except IncompatiblePeer as error:
            raise TunnelError(
                f"the SSH server offers nothing that wherry accepts: {error}",
                hint="whatever listens there is not this machine's guest",
            ) from error
        except AuthenticationException as error:
            raise TunnelError(
                f"the guest does not accept the machine's key for {user}",
                hint="the guest was made with other keys",
            ) from error
        except (SSHException, EOFError, OSError) as error:
            raise TunnelError(f"{stage} with the guest failed: {_reason(error)}") from error

    def _await(self, done: threading.Event, deadline: Deadline, stage: str) -> None:
        """Wait for an event that paramiko also sets when the transport ends."""
        if not done.wait(deadline.remaining):
            raise TunnelError(f"{stage} with the guest took longer than {deadline.seconds:g} s")
        if not self._transport.is_active():
            raise self._transport.get_exception() or EOFError()

    @property
    def closed(self) -> bool:
        """Whether the connection has ended."""
        return not self._transport.is_active()

    @property
    def cipher(self) -> str:
        """The cipher that both sides agreed on."""
        return str(self._transport.local_cipher)

    def open_unix(self, path: str, *, timeout_s: float = OPEN_TIMEOUT_S) -> Stream:
        """Connect to a Unix socket of the guest.

        :raises TunnelError: nothing listens there, the guest forbids it, or time ran out.
        """
        stream = self._begin_unix(path, timeout_s)
        try:
            stream.wait_open()
        except BaseException:
            stream.close()
            raise
        return stream

    def begin_unix(self, path: str, *, timeout_s: float = OPEN_TIMEOUT_S) -> Stream:
        """Like :meth:`open_unix`, without waiting: the stream's methods tell a failure."""
        return self._begin_unix(path, timeout_s)

    def prepare_unix(self, path: str) -> None:
        """Open a stream ahead for whoever asks next; never waits, and may do nothing."""
        self._transport.prepare_unix(path)

    def begin_tcp(self, address: str, port: int, *, timeout_s: float = OPEN_TIMEOUT_S) -> Stream:
        """Connect to a port in the guest, without waiting: the stream's methods tell a failure.

        :param address: as the guest sees it, such as ``127.0.0.1``.
        :param timeout_s: for the guest's answer.
        """
        return self._transport.begin_tcp(address, port, time.monotonic() + timeout_s)

    def _begin_unix(self, path: str, timeout_s: float) -> StreamChannel:
        return self._transport.begin_unix(path, time.monotonic() + timeout_s)

    def listen_unix(self, path: str, accept: Callable[[Stream], None]) -> None:
        """Listen at a Unix socket of the guest, as long as the connection lasts.

        To be called before anything else is asked.

        :param accept: called with each client's stream, and closes it; must not block.
        :raises TunnelError: the guest does not allow it.
        """
        if not self._transport.listen_unix(path, accept):
            raise TunnelError(f"the guest does not listen at {path} for us")

    def exec(self, command: str, *, timeout_s: float = OPEN_TIMEOUT_S) -> Process:
        """Start a command by the guest's shell; the caller closes it.

        :param timeout_s: for starting it.
        :raises TunnelError: the guest refused or did not answer in time.
        """
        deadline = time.monotonic() + timeout_s
        channel = self._transport.begin_session(deadline)
        try:
            channel.start(command, deadline)
        except BaseException:
            channel.close()
            raise
        return Process(channel)

    def run(
        self,
        command: str,
        input: bytes = b"",
        *,
        timeout_s: float,
        limit_bytes: int = _OUTPUT_LIMIT_BYTES,
    ) -> Completed:
        """Run a command to its end.

        :param timeout_s: for all of it.
        :param limit_bytes: how much of each output is kept; the rest is dropped.
        :raises TunnelError: it could not be started, did not end in time, or the
            connection was lost. A status other than 0 is not an error here.
        """
        deadline = time.monotonic() + timeout_s
        channel = self._transport.begin_session(deadline)
        stdout, stderr = _Collector(limit_bytes), _Collector(limit_bytes)
        try:
            channel.collect(stdout, stderr)
            channel.start(command, deadline)
            try:
                channel.sendall(input, deadline=deadline)
            except TunnelError:
                # A command need not read its input; one that ended tells its status.
                if not channel.closed or self.closed:
                    raise
            channel.shutdown_write()
            if not stdout.end.wait(max(0.0, deadline - time.monotonic())):
                raise TunnelError(f"the command did not end within {timeout_s:g} s: {command}")
            status = channel.wait(max(0.0, deadline - time.monotonic()))
        finally:
            channel.close()
        return Completed(status, bytes(stdout.data), bytes(stderr.data))

    def close(self) -> None:
        """End the connection and every stream in it, and wait for its thread."""
        transport = self._transport
        transport.close()
        transport.sock.close()
        if transport.ident is not None and transport is not threading.current_thread():
            transport.join(_JOIN_S)


class _Collector:
    """Keeps the first bytes of a stream."""

    def __init__(self, limit_bytes: int) -> None:
        self.data = bytearray()
        self.end = threading.Event()
        self._limit = limit_bytes

    def write(self, parts: list[memoryview]) -> int:
        for part in parts:
            self.data += part[: self._limit - len(self.data)]
        return sum(map(len, parts))

    def stalled(self) -> None:
        raise AssertionError("a collector has always room")

    def ended(self, error: TunnelError | None) -> None:
        self.end.set()

    def hung_up(self) -> None:
        pass  # the exit status tells the rest


def _check_host_key(offered: str, expected_line: str) -> None:
    expected = expected_line.split()[1]
    if offered != expected:
        raise TunnelError(
            "the SSH server's host key is not this machine's",
            hint="another program may listen on the port; stop the machine and start it again",
        )


def _reason(error: BaseException) -> str:
    if isinstance(error, EOFError):
        return str(error) or "the other side closed the connection"
    return str(error) or type(error).__name__


def _lost(cause: BaseException | None) -> TunnelError:
    error = TunnelError(LOST if cause is None else f"{LOST}: {_reason(cause)}")
    error.__cause__ = cause
    return error
