"""UDP on an IPv6 address alone, relayed through the tunnel: QEMU has no way for it.

A stream of the tunnel carries the datagrams of one port to the agent, each in a frame with
a number for its client (``wherry_guest.datagrams``). It is opened for the first datagram,
and again for one that comes after it was lost; those that come meanwhile wait a little.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable

from wherry.core.errors import TunnelError, WherryError
from wherry.ports.desired import Forward
from wherry.ports.udp import Client, Relay
from wherry.tunnel.stream import Stream
from wherry_wire.frames import DATAGRAM, Decoder, Frame, WireError
from wherry_wire.messages import DatagramsTo, pack

_CLIENTS = 256
_READ_BYTES = 256 * 1024
_WAITING = 64
"""Datagrams that wait for a stream; the oldest make room."""

_FRESH_S = 5.0
"""Who asks by UDP has asked again by then."""

_RETRY_S = 1.0
_SEND_S = 5.0
_JOIN_S = 5.0

_logger = logging.getLogger(__name__)


class GuestDatagramRelay(Relay):
    """Relays datagrams between the clients of one port and an IPv6 address of the guest's.

    One thread receives from clients, and never waits for the guest for longer than
    ``_SEND_S`` seconds; each stream has one that opens it and reads from it.

    :param address: in the guest, with the port.
    :param open_stream: makes a connection to the agent; may wait.
    :raises OSError: the port cannot be bound.
    """

    def __init__(
        self, forward: Forward, address: tuple[str, int], open_stream: Callable[[], Stream]
    ) -> None:
        super().__init__(forward)
        self._address = address
        self._open_stream = open_stream
        self._lock = threading.Lock()
        self._clients: OrderedDict[Client, int] = OrderedDict()
        """Numbers; the one that was silent for longest first."""
        self._by_number: dict[int, Client] = {}
        self._last = 0
        self._waiting: deque[tuple[float, bytes]] = deque(maxlen=_WAITING)
        self._opened: Stream | None = None
        self._stream: Stream | None = None
        """The one that is opened, when nothing waits for it any more."""
        self._reader: threading.Thread | None = None
        self._retry_at = 0.0

    def close(self) -> None:
        """Stop listening and end the threads; one that opens a stream ends when it has."""
        with self._lock:
            self._closing = True
            stream, reader = self._opened, self._reader
        if stream is not None:
            stream.close()
            if reader is not None:
                reader.join(_JOIN_S)
        super().close()

    def _from_client(self, data: bytes, client: Client) -> None:
        frame = Frame(DATAGRAM, self._number(client), data).encode()
        with self._lock:
            stream = self._stream
            if stream is None:
                self._waiting.append((time.monotonic(), frame))
                self._ask_for_stream()
        if stream is not None:
            self._send(stream, frame)

    def _number(self, client: Client) -> int:
        """Return a client's number, which no other one has had for long."""
        with self._lock:
            number = self._clients.get(client)
            if number is None:
                if len(self._clients) >= _CLIENTS:
                    _, oldest = self._clients.popitem(last=False)
                    del self._by_number[oldest]
                self._last = number = self._last % (1 << 31) + 1
                self._clients[client] = number
                self._by_number[number] = client
            self._clients.move_to_end(client)
            return number

    def _client(self, number: int) -> Client | None:
        with self._lock:
            client = self._by_number.get(number)
            if client is not None:
                self._clients.move_to_end(client)
            return client

    def _ask_for_stream(self) -> None:
        """Have a stream opened, unless one is, or was just now; with the lock held."""
        now = time.monotonic()
        if self._closing or self._reader is not None or now < self._retry_at:
            return
        self._retry_at = now + _RETRY_S
        reader = threading.Thread(target=self._connect, name=self._thread.name, daemon=True)
        try:
            reader.start()
        except RuntimeError as error:
            _logger.warning("datagrams do not reach the guest: %s", error)
            return
        self._reader = reader

    def _connect(self) -> None:
        """Open a stream, send what waited for it, and read from it to its end."""
        stream: Stream | None = None
        try:
            stream = self._open_stream()
            address, port = self._address
            next_ = pack(DatagramsTo(address=address, port=port), 0)
            with self._lock:
                if self._closing:
                    return
                self._opened = stream
            while next_:
                stream.sendall(next_, _in_time())
                with self._lock:
                    oldest = time.monotonic() - _FRESH_S
                    next_ = b"".join(frame for since, frame in self._waiting if since >= oldest)
                    self._waiting.clear()
                    if not next_:
                        self._stream = stream
            self._to_clients(stream)
        except (WherryError, WireError) as error:
            if not self._closing:
                _logger.info("datagrams do not reach the guest: %s", error)
        except Exception:
            _logger.exception("a relay of datagrams failed")
        finally:
            with self._lock:
                self._opened = self._stream = self._reader = None
            if stream is not None:
                stream.close()

    def _send(self, stream: Stream, frame: bytes) -> None:
        try:
            stream.sendall(frame, _in_time())
        except WherryError as error:
            # This one is lost, as datagrams may be; half of it may be on its way.
            if not self._closing:
                _logger.info("datagrams do not reach the guest: %s", error)
            stream.close()

    def _to_clients(self, stream: Stream) -> None:
        decoder = Decoder()
        while data := stream.recv(_READ_BYTES):
            for frame in decoder.feed(data):
                client = self._client(frame.id) if frame.type == DATAGRAM else None
                if client is None:
                    continue
                try:
                    self._listener.answer(frame.payload, client)
                except OSError:
                    pass  # the client is gone, or slow


def _in_time() -> Callable[[], None]:
    """Return what ends a sending that takes too long."""
    end = time.monotonic() + _SEND_S

    def waiting() -> None:
        if time.monotonic() > end:
            raise TunnelError(f"the guest takes no datagrams for {_SEND_S:g} s")

    return waiting
