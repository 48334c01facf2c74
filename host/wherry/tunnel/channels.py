"""Channels as streams.

A Unix socket in the guest is reached by ``direct-streamlocal@openssh.com`` (OpenSSH
PROTOCOL §2.4), which paramiko cannot open (paramiko#544). :class:`StreamChannel`
replaces what paramiko's Channel does with data (see :mod:`wherry.tunnel.inbox`) and
keeps what it does with windows, requests and the end.

Nothing may follow the message that closes a channel: the guest gives the number to the
next channel, or ends the whole connection over it. paramiko decides what to send under
the channel's lock and sends it outside; here all goes through :meth:`StreamChannel._post`
and ``_sending``, which keep that order.

Locks are taken in this order: ``_sending``, the channel's, its inbox's or the windows'. A
sink is told of the end outside all of them, since it may close the channel.
"""

from __future__ import annotations

import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from paramiko.channel import Channel
from paramiko.common import (
    MSG_CHANNEL_CLOSE,
    cMSG_CHANNEL_CLOSE,
    cMSG_CHANNEL_WINDOW_ADJUST,
)
from paramiko.message import Message
from paramiko.ssh_exception import SSHException

from wherry.core.errors import TunnelError
from wherry.tunnel.inbox import Inbox
from wherry.tunnel.packets import (
    CHANNEL_DATA,
    DATA_HEAD,
    MOST_DATA_BYTES,
    SEND_AT_ONCE_BYTES,
    DataPackets,
)
from wherry.tunnel.stream import DrainWrite, Read, Sink
from wherry.tunnel.windows import PORTION_BYTES

MAX_PACKET_BYTES = 32 * 1024
"""The longest data we take in one packet; OpenSSH's choice: longer ones were slower."""

_STDERR = 1
"""SSH_EXTENDED_DATA_STDERR (RFC 4254 §5.2)."""

_LOOK_S = 0.25
"""How often a sender that waits for the guest looks whether it still should."""

_TOGETHER_S = 0.01
"""How long a sender with much to send waits until the guest's window has room for much.

The guest gives window in small portions, and sending each at once would be many small sends.
The wait has an end because a guest may give window only when there is none left.
"""

_CLOSE = struct.Struct(">BI")
_PARKED_BYTES = 16 * 1024

LOST = "the connection to the guest was lost"


class _TooLate(TunnelError):
    """A deadline of ours has passed; the channel itself could go on."""


class StreamChannel(Channel):  # type: ignore[misc]  # paramiko ships no types
    """A channel as a :class:`wherry.tunnel.stream.Stream`.

    It can be used while it is being opened: sending waits for the confirmation.

    :param chanid: our number of the channel.
    :param open_deadline: until when, on the monotonic clock, opening may take.
    :param target: what is opened, for messages.
    """

    def __init__(self, chanid: int, open_deadline: float, target: str) -> None:
        super().__init__(chanid)
        self.in_buffer = Inbox()
        self.in_stderr_buffer = Inbox()
        self.in_window_sofar = 0
        self.target = target
        self.closed_while_opening = False
        self.open_deadline = open_deadline
        self._failure: TunnelError | None = None
        self._parked: memoryview | None = None
        self._sending = threading.Lock()
        self._packets: DataPackets | None = None
        self._first_window = 0
        self._wanted = 1
        self._due: deque[tuple[Any, bool]] = deque()
        self._close_sent = False

    def __del__(self) -> None:
        # paramiko closes here, that is in whatever thread and under whatever lock the
        # garbage collector happens to run. Whoever opened a channel closes it.
        pass

    # -- Stream -----------------------------------------------------------------------

    def recv(self, size: int) -> bytes:
        """See :meth:`Stream.recv`."""
        data: bytes = self.in_buffer.read(size)
        if data:
            self._acknowledge(len(data))
        else:
            self._raise_failure()
        return data

    def recv_into(self, buffer: memoryview) -> int:
        """See :meth:`Stream.recv_into`."""
        count: int = self.in_buffer.read_into(buffer)
        if count:
            self._acknowledge(count)
        else:
            self._raise_failure()
        return count

    def sendall(
        self,
        data: memoryview | bytes,
        waiting: Callable[[], None] | None = None,
        deadline: float | None = None,
    ) -> None:
        """See :meth:`Stream.sendall`.

        :param deadline: until when, on the monotonic clock, it may take.
        """
        try:
            self._send_all(memoryview(data), waiting, deadline)
        except _TooLate as error:
            self._abandon(error)
            raise

    def _send_all(
        self, view: memoryview, waiting: Callable[[], None] | None, deadline: float | None
    ) -> None:
        if not self.active and len(view) <= _PARKED_BYTES and self._park(view):
            return
        while view:
            count = self._take_window(min(len(view), SEND_AT_ONCE_BYTES), waiting, deadline)
            part, most = view[:count], self.out_max_packet_size
            self._transmit(partial(self.transport.send_data, self.remote_chanid, part, most))
            view = view[count:]

    def send_from(self, read: Read, waiting: Callable[[], None] | None = None) -> int:
        """See :meth:`Stream.send_from`."""
        if self._packets is None:
            self._packets = DataPackets()
        packets = self._packets
        room = self._take_room()
        if not room:
            # Whoever reads is to learn of the end also while the guest takes nothing.
            part = packets.data[0]
            count = read([part])
            self.sendall(part[:count], waiting)
            return count
        count = 0
        try:
            count = read(packets.room(room))
        finally:
            if count < room:
                self.more_window(room - count)
        if count:
            self._transmit(partial(self.transport.send_packets, self.remote_chanid, packets, count))
        return count

    def _take_room(self) -> int:
        """Take what the guest's window has room for now; 0 while nothing can be sent."""
        with self.lock:
            sending = self.active and not self.closed and not self.eof_sent
            if not sending or self.out_max_packet_size < MOST_DATA_BYTES:
                return 0
            enough = min(SEND_AT_ONCE_BYTES, self._first_window // 8)
            if self.out_window_size < enough:
                self._wanted = enough
                self.out_buffer_cv.wait(_TOGETHER_S)
                self._wanted = 1
            room: int = min(SEND_AT_ONCE_BYTES, self.out_window_size)
            self.out_window_size -= room
            return room

    def _transmit(self, send: Callable[[], None]) -> None:
        """Send data for which window was taken, unless the channel was closed meanwhile."""
        try:
            with self._sending:
                if self._close_sent:
                    raise self._failure or TunnelError(f"{self.target} closed the stream")
                send()
        except (EOFError, OSError, SSHException) as error:
            raise TunnelError(LOST) from error
        finally:
            if self._due:
                self._flush()

    def shutdown_write(self) -> None:
        """See :meth:`Stream.shutdown_write`."""
        late: TunnelError | None = None
        with self.lock:
            try:
                self._wait_active()
                message = self._send_eof()
            except TunnelError as error:
                # There is no other side left to learn of the end, or none to wait for.
                message, late = None, error
        if isinstance(late, _TooLate):
            self._abandon(late)
        if message is not None:
            self._post(message)

    def close(self) -> None:
        """See :meth:`Stream.close`."""
        with self.lock:
            if not self.closed and self._failure is None:
                self._failure = TunnelError(f"the stream to {self.target} was closed")
            if not self.active and not self.closed:
                # paramiko's close() would do nothing, and the guest's confirmation,
                # when it comes, would leave the channel open there for ever.
                self.closed_while_opening = True
                self._set_closed()
        super().close()
        self._flush()
        self._tell_end()
        self.in_buffer.detach()
        self.in_stderr_buffer.detach()

    def _abandon(self, error: TunnelError) -> None:
        """Close it because of ``error``, so that whoever reads it learns of that too."""
        with self.lock:
            if self._failure is None:
                self._failure = error
        self.close()

    def close_now(self) -> bool:
        """Close a stream that nobody has used, unless that would wait; tell if it is closed."""
        with self.lock:
            if self.active and not self.closed:
                # Noted before: the guest's answer may be here at once, and a second close is one
                # of a channel that sshd knows no more, which ends the connection.
                self._close_sent = True
                if not self.transport.send_now(_CLOSE.pack(MSG_CHANNEL_CLOSE, self.remote_chanid)):
                    self._close_sent = False
                    return False
        self.close()
        return True

    def deliver_to(self, sink: Sink) -> None:
        """See :meth:`Stream.deliver_to`."""
        self.in_buffer.attach(sink)
        self._tell_end()

    def drain(self, sink_write: DrainWrite) -> None:
        """See :meth:`Stream.drain`."""
        taken: list[int] = []
        try:
            while self.in_buffer.drain(sink_write, taken):
                self._acknowledge(taken.pop())
        finally:
            self._tell_end()

    @property
    def untouched(self) -> bool:
        """Whether the guest has neither refused it, nor sent anything, nor ended it."""
        return not (self.closed or self.eof_received or len(self.in_buffer))

    def wait_open(self) -> None:
        """Wait until the guest has confirmed the channel.

        :raises TunnelError: it refused, or did not answer in time.
        """
        with self.lock:
            self._wait_active()

    # -- what the transport's thread calls ---------------------------------------------

    def feed(self, parts: list[memoryview]) -> None:
        """Take channel data."""
        taken = self.in_buffer.feed(parts)
        if taken:
            self._acknowledge(taken)

    def more_window(self, count: int) -> None:
        """Take the guest's leave to send ``count`` bytes more."""
        with self.lock:
            self.out_window_size += count
            if self.out_window_size >= self._wanted:
                self.out_buffer_cv.notify_all()

    def refused(self, error: TunnelError) -> None:
        """Take the guest's refusal to open the channel."""
        with self.lock:
            if self._failure is None:
                self._failure = error
            self._set_closed()
        self._tell_end()

    def confirmed(self) -> None:
        """Learn that the channel is open; close it if nobody wants it any more."""
        if self.closed_while_opening:
            message = Message()
            message.add_byte(cMSG_CHANNEL_CLOSE)
            message.add_int(self.remote_chanid)
            self._post(message, last=True)

    def _set_remote_channel(self, chanid: int, window_size: int, max_packet_size: int) -> None:
        with self.lock:
            super()._set_remote_channel(chanid, window_size, max_packet_size)
            self._first_window = window_size
            parked = self._parked
            if (
                parked is not None
                and not self.closed
                and len(parked) <= min(self.out_window_size, max_packet_size)
            ):
                head = DATA_HEAD.pack(CHANNEL_DATA, self.remote_chanid, len(parked))
                if self.transport.send_now(head + parked):
                    self.out_window_size -= len(parked)
                    self._parked = None
            self.out_buffer_cv.notify_all()

    def _log(self, level: int, msg: str, *args: Any) -> None:
        """Say nothing: paramiko has six lines for a channel, in the way of its first byte."""

    def _feed(self, m: Any) -> None:
        self.feed([memoryview(m if isinstance(m, bytes) else m.get_binary())])

    def _feed_extended(self, m: Any) -> None:
        kind = m.get_int()
        data = m.get_binary()
        taken = len(data)
        if kind == _STDERR:
            taken = self.in_stderr_buffer.feed([memoryview(data)])
        if taken:
            self._acknowledge(taken)

    def _handle_eof(self, m: Any) -> None:
        super()._handle_eof(m)
        self._tell_end()

    def _close_internal(self) -> tuple[None, None]:
        # paramiko's callers would send these by themselves.
        eof, close = super()._close_internal()
        if eof is not None:
            self._due.append((eof, False))
        if close is not None:
            self._due.append((close, True))
        return None, None

    def _handle_close(self, m: Any) -> None:
        super()._handle_close(m)
        self._flush()
        self._tell_end()

    def _request_failed(self, m: Any) -> None:
        super()._request_failed(m)
        self._flush()
        self._tell_end()

    def _unlink(self) -> None:
        with self.lock:
            if not self.closed and not self.eof_received and self._failure is None:
                self._failure = TunnelError(LOST)
        super()._unlink()
        self._tell_end()

    # -- internals ---------------------------------------------------------------------

    def _tell_end(self) -> None:
        self.in_buffer.tell_end(self._failure, gone=self.closed)
        self.in_stderr_buffer.tell_end(self._failure, gone=self.closed)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _acknowledge(self, count: int) -> None:
        """Give window back to the guest, in large portions (RFC 4254 §5.2)."""
        with self.lock:
            owed = self.in_window_sofar + count
            self.in_window_sofar = owed
            if owed <= PORTION_BYTES or self.closed or self.eof_received:
                return
            more = self.transport.windows.give(self.chanid, owed)
            if not more:
                return
            self.in_window_sofar = owed - more
        message = Message()
        message.add_byte(cMSG_CHANNEL_WINDOW_ADJUST)
        message.add_int(self.remote_chanid)
        message.add_int(more)
        self._post(message)

    def _post(self, message: Any, *, last: bool = False) -> None:
        """Send a message of the channel, or leave it to the thread that is sending now."""
        self._due.append((message, last))
        self._flush()

    def _flush(self) -> None:
        """Send what is due, unless another thread is sending, which will look here after.

        It never waits for that thread: the transport's own thread comes here too, and
        the other one may be waiting for it to finish a key exchange.
        """
        while self._due and self._sending.acquire(blocking=False):
            try:
                while self._due:
                    message, last = self._due.popleft()
                    if not self._close_sent:
                        self._close_sent = last
                        self.transport._send_user_message(message)
            except (EOFError, OSError, SSHException):
                pass  # the connection is going; reading goes on to what has arrived
            finally:
                self._sending.release()

    def _wait_active(self) -> None:
        """Wait, holding the lock, until the channel is open."""
        while not self.active and not self.closed:
            left = self.open_deadline - time.monotonic()
            if left <= 0:
                raise _TooLate(f"the guest did not open {self.target} in time")
            self.out_buffer_cv.wait(left)
        if self.closed:
            raise self._failure or TunnelError(f"{self.target} closed the stream")

    def _park(self, data: memoryview) -> bool:
        """Leave data to the thread that learns that the channel is open; tell if it sent it.

        A client's first bytes are there before that, and so need not wait until the
        thread that read them runs again.
        """
        with self.lock:
            if self.active:
                return False
            self._parked = data
            try:
                self._wait_active()
                return self._parked is None
            finally:
                self._parked = None

    def _take_window(
        self, wanted: int, waiting: Callable[[], None] | None, deadline: float | None
    ) -> int:
        """Wait for room in the guest's window and take up to ``wanted`` bytes of it."""
        with self.lock:
            if not self.out_window_size or not self.active or self.closed or self.eof_sent:
                self._await_window(waiting, deadline)
            count: int = min(wanted, self.out_window_size)
            self.out_window_size -= count
            return count

    def _await_window(self, waiting: Callable[[], None] | None, deadline: float | None) -> None:
        """Wait, holding the lock, for any room in the guest's window."""
        self._wait_active()
        while not self.out_window_size:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise _TooLate(f"{self.target} did not take the data in time")
            if waiting is not None:
                waiting()
                left = _LOOK_S if left is None else min(left, _LOOK_S)
            self.out_buffer_cv.wait(left)
            if self.closed:
                break
        if self.closed or self.eof_sent:
            raise self._failure or TunnelError(f"{self.target} takes no more data")
