"""paramiko's Transport with the choices of a tunnel into our own guest.

What is overridden, and why:

- the lists of algorithms: the guest's processor may be emulated, so the cheapest
  safe choice is first, and nothing that needs much arithmetic is offered;
- the packetizer (:mod:`wherry.tunnel.packetizer`), and the way of channel data;
- opening channels: paramiko opens no streamlocal, waits by polling, keeps the
  reason of a refusal where concurrent openings overwrite it, and forgets a channel
  that was closed before it was confirmed;
- sending from the transport's own thread: paramiko's waits there for the end of a
  key exchange, which only that thread can bring about;
- channels that the guest opens: paramiko takes none of streamlocal's;
- keepalive: paramiko's never looks whether an answer came.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any, TypeVar

from paramiko.common import (
    CONNECTION_FAILED_CODE,
    cMSG_CHANNEL_OPEN,
    cMSG_CHANNEL_OPEN_SUCCESS,
    cMSG_GLOBAL_REQUEST,
)
from paramiko.kex_curve25519 import KexCurve25519
from paramiko.message import Message
from paramiko.ssh_exception import SSHException
from paramiko.transport import Transport

from wherry.core.errors import TunnelError
from wherry.tunnel.channels import LOST, MAX_PACKET_BYTES, StreamChannel
from wherry.tunnel.command import CommandChannel
from wherry.tunnel.packetizer import SMALL_BYTES, FastPacketizer
from wherry.tunnel.packets import DataPackets
from wherry.tunnel.windows import WINDOW_BYTES, Windows

C = TypeVar("C", bound=StreamChannel)

Accept = Callable[[StreamChannel], None]
"""Takes a stream that a program in the guest opened; called in the transport's thread, so it must
not block."""

# Reaches no handler unless --debug asks: what it says is in our errors as well.
_logger = logging.getLogger("wherry.tunnel.paramiko")
_logger.setLevel(logging.CRITICAL)

SPARE_AGE_S = 30.0
"""A stream that was opened ahead is kept so long: the engine drops a silent client after
five minutes (``ReadHeaderTimeout`` in dockerd's ``cmd/dockerd/daemon.go``)."""

_ADMINISTRATIVELY_PROHIBITED = 1
_CONNECT_FAILED = 2
"""Reasons of SSH_MSG_CHANNEL_OPEN_FAILURE (RFC 4254 §5.1)."""


class _ChannelData:
    """Channel data on its way through paramiko's ``_send_user_message``."""

    __slots__ = ("channel", "data", "most")

    def __init__(self, channel: int, data: memoryview, most: int) -> None:
        self.channel, self.data, self.most = channel, data, most


class _Seen:
    """Which channel numbers were ever in use, without paramiko's entry for each.

    Numbers are given out in ascending order.
    """

    def __init__(self) -> None:
        self._last = -1

    def __setitem__(self, chanid: int, _: bool) -> None:
        self._last = max(self._last, chanid)

    def __contains__(self, chanid: int) -> bool:
        return chanid <= self._last


def _dispatch(name: str) -> Callable[[Any, Any], None]:
    """Return what calls a channel's own method of that name with a message."""

    def call(channel: Any, message: Any) -> None:
        getattr(channel, name)(message)

    return call


class TunnelTransport(Transport):  # type: ignore[misc]  # paramiko ships no types
    """One SSH connection to the guest.

    :param sock: connected; owned by the transport from now on.
    :param keepalive_s: seconds of silence after which the guest is asked for a sign.
    :param dead_after_s: seconds of silence after which the connection is given up.
    :param ended: called once, in the transport's thread, when it ends; with why.
    """

    _preferred_kex = (
        *(("curve25519-sha256@libssh.org",) if KexCurve25519.is_available() else ()),
        "ecdh-sha2-nistp256",
    )
    _preferred_keys = ("ssh-ed25519",)
    _preferred_pubkeys = ("ssh-ed25519",)
    # paramiko 5.1 has no chacha20-poly1305.
    _preferred_ciphers = (
        "aes128-gcm@openssh.com",
        "aes256-gcm@openssh.com",
        "aes128-ctr",
        "aes256-ctr",
    )
    _preferred_macs = ("hmac-sha2-256-etm@openssh.com", "hmac-sha2-256")
    _preferred_compression = ("none",)

    # paramiko's table holds Channel's own functions, so no subclass is asked.
    _channel_handler_table = MappingProxyType(
        {kind: _dispatch(f.__name__) for kind, f in Transport._channel_handler_table.items()}
    )

    def __init__(
        self,
        sock: Any,
        *,
        keepalive_s: float,
        dead_after_s: float,
        ended: Callable[[BaseException | None], None],
    ) -> None:
        self._active_check_timeout = None  # the socket's timeout: none
        super().__init__(
            sock,
            default_window_size=WINDOW_BYTES,
            default_max_packet_size=MAX_PACKET_BYTES,
            packetizer_class=FastPacketizer,
        )
        self.name = "tunnel"
        self.logger = _logger
        self.log_name = _logger.name
        self.packetizer.set_log(_logger)
        self.packetizer.ready_for_data = self._ready_for_data
        self.packetizer.on_data = self._channel_data
        self.packetizer.on_window = self._channel_window
        self.channels_seen = _Seen()
        self.windows = Windows()
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._keep_watch, name="tunnel-watch", daemon=True)
        self._keepalive_s = keepalive_s
        self._dead_after_s = dead_after_s
        self._asked_at = 0.0
        self._dead: EOFError | None = None
        self._ended = ended
        self._opening: dict[int, StreamChannel] = {}
        self._deferred: list[Any] = []
        self._bulk = threading.Lock()
        self._listeners: dict[str, Accept] = {}
        self._spare_lock = threading.Lock()
        self._spares: dict[str, tuple[StreamChannel, float]] = {}

    def run(self) -> None:
        """Serve the connection until it ends, then say so."""
        self._watch.start()
        try:
            super().run()
        finally:
            self._over.set()
            self._watch.join()
            self._fail_opening()
            self._drop_spares()  # each of them has ended
            # paramiko wakes these waits only when the other side ended the connection.
            if self.completion_event is not None:
                self.completion_event.set()
            if self.auth_handler is not None:
                self.auth_handler.abort()
            self._ended(self._dead or self.saved_exception)

    # -- opening ------------------------------------------------------------------------

    def prepare_unix(self, path: str) -> None:
        """Have a stream to a Unix socket of the guest open before it is asked for.

        It never waits. There is at most one for each path, for :data:`SPARE_AGE_S` and a
        little more; whoever asks next gets it.
        """
        with self._spare_lock:
            if path in self._spares or self._over.is_set():
                return
            now = time.monotonic()
            try:
                channel = self._begin_unix(path, now + SPARE_AGE_S, now=True)
            except TunnelError:
                return
            if channel is not None:
                self._spares[path] = channel, now + SPARE_AGE_S

    def _take_spare(self, path: str, deadline: float) -> StreamChannel | None:
        """Return the stream that was prepared, if it is still good."""
        if path not in self._spares:
            return None
        with self._spare_lock:
            channel, expires = self._spares.get(path, (None, 0.0))
            if channel is None or not channel.untouched or time.monotonic() >= expires:
                return None  # the watch closes it
            del self._spares[path]
        channel.open_deadline = deadline
        return channel

    def _drop_spares(self) -> None:
        """Close the prepared streams that nobody gets any more; never waits."""
        now = time.monotonic()
        with self._spare_lock:
            for path, (channel, expires) in list(self._spares.items()):
                if now >= expires or not channel.untouched:
                    if not channel.close_now():
                        continue  # next time
                    del self._spares[path]

    def begin_unix(self, path: str, deadline: float) -> StreamChannel:
        """Ask for a stream to a Unix socket of the guest, without waiting for the answer."""
        channel = self._take_spare(path, deadline)
        if channel is None:
            channel = self._begin_unix(path, deadline, now=False)
            assert channel is not None
        return channel

    def _begin_unix(self, path: str, deadline: float, *, now: bool) -> StreamChannel | None:
        tail = Message()
        tail.add_string(path)
        tail.add_string("")  # reserved
        tail.add_int(0)  # reserved
        return self._begin(
            StreamChannel, "direct-streamlocal@openssh.com", tail.asbytes(), deadline, path, now
        )

    def begin_tcp(self, address: str, port: int, deadline: float) -> StreamChannel:
        """Ask for a stream to a port in the guest (RFC 4254 §7.2), without waiting."""
        tail = Message()
        tail.add_string(address)
        tail.add_int(port)
        tail.add_string("127.0.0.1")  # where the connection comes from; for the guest's log
        tail.add_int(0)
        target = f"{address}, port {port}"
        channel = self._begin(
            StreamChannel, "direct-tcpip", tail.asbytes(), deadline, target, False
        )
        assert channel is not None
        return channel

    def begin_session(self, deadline: float) -> CommandChannel:
        """Ask for a session channel (RFC 4254 §6.1), without waiting for the answer."""
        channel = self._begin(CommandChannel, "session", b"", deadline, "a command", False)
        assert channel is not None
        return channel

    def _begin(
        self,
        channel_class: type[C],
        kind: str,
        tail: bytes,
        deadline: float,
        target: str,
        now: bool,
    ) -> C | None:
        message = Message()
        message.add_byte(cMSG_CHANNEL_OPEN)
        message.add_string(kind)
        with self.lock:
            if not self.active:
                raise TunnelError(LOST)
            chanid = self._next_channel()
            channel = channel_class(chanid, deadline, target)
            self._channels.put(chanid, channel)
            self.channels_seen[chanid] = True
            self._opening[chanid] = channel
            channel._set_transport(self)
            channel._set_window(WINDOW_BYTES, MAX_PACKET_BYTES)
        message.add_int(chanid)
        message.add_int(WINDOW_BYTES)
        message.add_int(MAX_PACKET_BYTES)
        message.add_bytes(tail)
        if now:
            if not self.send_now(message.asbytes()):
                self._opening.pop(chanid, None)
                self._channels.delete(chanid)
                return None
        else:
            try:
                self._send_user_message(message)
            except (EOFError, OSError, SSHException) as error:
                raise TunnelError(LOST) from error
        if not self.active:
            # The thread may have ended before the channel was in its table.
            self._fail_opening()
        return channel

    def _parse_channel_open_success(self, m: Any) -> None:
        start = m.packet.tell()
        channel = self._opening.pop(m.get_int(), None)
        m.packet.seek(start)
        super()._parse_channel_open_success(m)
        if channel is not None:
            channel.confirmed()

    def _parse_channel_open_failure(self, m: Any) -> None:
        chanid = m.get_int()
        code = m.get_int()
        text = m.get_text()
        channel = self._opening.pop(chanid, None)
        if channel is None:
            return
        self._channels.delete(chanid)
        channel.refused(_refusal(channel.target, code, text))

    def _fail_opening(self) -> None:
        while self._opening:
            try:
                _, channel = self._opening.popitem()
            except KeyError:
                return  # another thread was faster
            channel.refused(TunnelError(LOST))

    # -- listening ----------------------------------------------------------------------

    def listen_unix(self, path: str, accept: Accept) -> bool:
        """Have the guest's sshd listen at a path (OpenSSH PROTOCOL §2.4); tell whether it does.

        To be called when nothing else was asked on the connection: answers have no number.
        """
        self._listeners[path] = accept
        return self.global_request("streamlocal-forward@openssh.com", (path,)) is not None

    def _parse_channel_open(self, m: Any) -> None:
        start = m.packet.tell()
        kind = m.get_text()
        guest_number, window, most = m.get_int(), m.get_int(), m.get_int()
        path = m.get_text() if kind == "forwarded-streamlocal@openssh.com" else ""
        accept = self._listeners.get(path)
        if accept is None:
            m.packet.seek(start)
            super()._parse_channel_open(m)  # refuses it
            return
        with self.lock:
            number = self._next_channel()
            channel = StreamChannel(number, time.monotonic(), f"a client of {path}")
            self._channels.put(number, channel)
            self.channels_seen[number] = True
            channel._set_transport(self)
            channel._set_window(WINDOW_BYTES, MAX_PACKET_BYTES)
            channel._set_remote_channel(guest_number, window, most)
        message = Message()
        message.add_byte(cMSG_CHANNEL_OPEN_SUCCESS)
        message.add_int(guest_number)
        message.add_int(number)
        message.add_int(WINDOW_BYTES)
        message.add_int(MAX_PACKET_BYTES)
        self._send_user_message(message)
        accept(channel)

    # -- data ---------------------------------------------------------------------------

    def send_data(self, channel: int, data: memoryview, most: int) -> None:
        """Send channel data in packets of up to ``most`` bytes; waits during a key exchange."""
        with self._turn(len(data)):
            self._send_data(channel, data, most)

    def send_packets(self, channel: int, packets: DataPackets, count: int) -> None:
        """Send ``count`` bytes of data from where they lie; waits during a key exchange."""
        with self._turn(count):
            with self.clear_to_send_lock:
                if self.active and self.clear_to_send.is_set():
                    self.packetizer.send_packets(channel, packets, count)
                    return
            for part in packets.filled(count):
                self._send_user_message(_ChannelData(channel, part, len(part)))

    def _turn(self, count: int) -> AbstractContextManager[object]:
        """Return what is to be held while so many bytes are sent.

        At most one thread with much to send is under way, so a thread with little to send
        waits for one of them and not for all.
        """
        return nullcontext() if count <= SMALL_BYTES else self._bulk

    def _send_data(self, channel: int, data: memoryview, most: int) -> None:
        with self.clear_to_send_lock:
            if self.active and self.clear_to_send.is_set():
                self.packetizer.send_data(channel, data, most)
                return
        self._send_user_message(_ChannelData(channel, data, most))

    def send_now(self, payload: bytes) -> bool:
        """Send one message unless that would wait, or the connection ended; tell if it was sent.

        No key exchange may begin in between, so the lock that it takes is held.
        """
        if not self.clear_to_send_lock.acquire(blocking=False):
            return False
        try:
            return self.clear_to_send.is_set() and bool(self.packetizer.send_now(payload))
        except (EOFError, OSError, SSHException):
            return False  # the transport's thread learns the same
        finally:
            self.clear_to_send_lock.release()

    def _ready_for_data(self) -> bool:
        """Whether data may come now; during a key exchange paramiko judges it."""
        return not self._expected_packet

    def _channel_data(self, chanid: int, parts: list[memoryview]) -> None:
        channel = self._channels.get(chanid)
        if channel is not None:
            channel.feed(parts)
        elif chanid not in self.channels_seen:
            raise SSHException(f"data for a channel {chanid} that never was")

    def _channel_window(self, chanid: int, count: int) -> bool:
        channel = self._channels.get(chanid)
        if channel is None or self._expected_packet:
            return False
        channel.more_window(count)
        return True

    def _send_message(self, data: Any) -> None:
        if isinstance(data, _ChannelData):
            self.packetizer.send_data(data.channel, data.data, data.most)
        else:
            self.packetizer.send_message(data)

    def _send_user_message(self, data: Any) -> None:
        if threading.current_thread() is not self:
            super()._send_user_message(data)
            return
        with self.clear_to_send_lock:
            if not self.clear_to_send.is_set():
                self._deferred.append(data)
                return
            self._send_message(data)

    def _parse_newkeys(self, m: Any) -> None:
        super()._parse_newkeys(m)
        deferred, self._deferred = self._deferred, []
        for data in deferred:
            self._send_user_message(data)

    # -- keepalive ----------------------------------------------------------------------

    def _keep_watch(self) -> None:
        """Look at the silence from time to time; the body of a thread of its own."""
        while not self._over.wait(self._keepalive_s / 2):
            if not self.authenticated_as_client():
                continue  # the handshake has a deadline of its own
            self._drop_spares()
            now = time.monotonic()
            silence = now - self.packetizer.last_received
            if silence >= self._dead_after_s:
                self._dead = EOFError(f"no sign of life for {silence:.0f} s")
                self.packetizer.close()
                return
            if silence >= self._keepalive_s and now - self._asked_at >= self._keepalive_s:
                self._ask(now)

    def _ask(self, now: float) -> None:
        """Ask for any answer, unless that would wait: then what waits asks as well."""
        message = Message()
        message.add_byte(cMSG_GLOBAL_REQUEST)
        message.add_string("keepalive@openssh.com")
        message.add_boolean(True)
        if self.send_now(message.asbytes()):
            self._asked_at = now

    def authenticated_as_client(self) -> bool:
        """Whether the handshake is over."""
        return self.auth_handler is not None and bool(self.auth_handler.is_authenticated())


def _refusal(target: str, code: int, text: str) -> TunnelError:
    """Explain SSH_MSG_CHANNEL_OPEN_FAILURE (RFC 4254 §5.1)."""
    if code == _CONNECT_FAILED:
        return TunnelError(
            f"nothing answers at {target} in the guest (connect failed: {text})",
            hint="the guest may still be starting",
        )
    if code == _ADMINISTRATIVELY_PROHIBITED:
        return TunnelError(f"the guest forbids {target} (administratively prohibited: {text})")
    reason = CONNECTION_FAILED_CODE.get(code, f"code {code}")
    return TunnelError(f"the guest did not open {target} ({reason}: {text})")
