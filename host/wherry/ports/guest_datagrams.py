"""UDP on an IPv6 address alone, relayed through the tunnel: QEMU has no way for it.

A stream of the tunnel carries the datagrams of one port to the agent, each in a frame with
a number for its client (``wherry_guest.datagrams``). It is opened for the first datagram,
and for the next one after it was lost.
"""

from __future__ import annotations

import logging
import selectors
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from wherry.core.errors import WherryError
from wherry.ports.conflicts import open_socket
from wherry.ports.desired import Forward
from wherry.tunnel.stream import Stream
from wherry_wire.frames import DATAGRAM, Decoder, Frame, WireError
from wherry_wire.messages import DatagramsTo, pack

_CLIENTS = 256
_LARGEST_BYTES = 65535
_READ_BYTES = 256 * 1024
_BURST = 64
_RETRY_S = 1.0
_JOIN_S = 5.0

_logger = logging.getLogger(__name__)


class GuestDatagramRelay:
    """Relays datagrams between the clients of one port and an IPv6 address of the guest's.

    :param address: in the guest, with the port.
    :param open_stream: makes a connection to the agent.
    :raises OSError: the port cannot be bound.
    """

    def __init__(
        self, forward: Forward, address: tuple[str, int], open_stream: Callable[[], Stream]
    ) -> None:
        self._address = address
        self._open_stream = open_stream
        self._listener = open_socket(forward)
        self._listener.setblocking(False)
        self._clients: OrderedDict[Any, int] = OrderedDict()
        self._numbers: dict[int, Any] = {}
        self._last = 0
        self._lock = threading.Lock()
        self._stream: Stream | None = None
        self._retry_at = 0.0
        self._wake, self._alarm = socket.socketpair()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"port-{forward.port}", daemon=True)

    def start(self) -> None:
        """Begin to relay."""
        self._thread.start()

    def close(self) -> None:
        """Stop listening and end the threads."""
        with self._lock:
            self._closing = True
            stream = self._stream
        if stream is not None:
            stream.close()
        self._alarm.send(b"x")
        self._thread.join(_JOIN_S)
        for each in (self._listener, self._wake, self._alarm):
            each.close()

    def _run(self) -> None:
        selector = selectors.DefaultSelector()
        try:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._wake, selectors.EVENT_READ)
            while not self._closing:
                selector.select()
                self._from_clients()
        except Exception:
            _logger.exception("a relay of datagrams failed")
        finally:
            selector.close()

    def _from_clients(self) -> None:
        for _ in range(_BURST):
            if self._closing:
                return
            try:
                data, client = self._listener.recvfrom(_LARGEST_BYTES)
            except BlockingIOError:
                return
            except OSError:
                continue  # an ICMP error of an earlier datagram
            try:
                stream = self._towards_guest()
                if stream is not None:
                    stream.sendall(Frame(DATAGRAM, self._number(client), data).encode())
            except WherryError as error:
                # This one is lost, as datagrams may be.
                _logger.info("datagrams do not reach the guest: %s", error)
                self._lost(self._stream)
                self._retry_at = time.monotonic() + _RETRY_S

    def _number(self, client: Any) -> int:
        number = self._clients.get(client)
        if number is None:
            if len(self._clients) >= _CLIENTS:
                _, oldest = self._clients.popitem(last=False)
                del self._numbers[oldest]
            # No number comes again before the guest has forgotten its client.
            self._last = number = self._last % (1 << 31) + 1
            self._clients[client] = number
            self._numbers[number] = client
        self._clients.move_to_end(client)
        return number

    def _towards_guest(self) -> Stream | None:
        """Return the stream; None when it cannot be opened again yet."""
        if self._stream is not None:
            return self._stream
        if time.monotonic() < self._retry_at:
            return None
        stream = self._open_stream()
        with self._lock:
            if self._closing:
                stream.close()
                return None
            self._stream = stream
        address, port = self._address
        stream.sendall(pack(DatagramsTo(address=address, port=port), 0))
        threading.Thread(
            target=self._to_clients, args=(stream,), name=self._thread.name, daemon=True
        ).start()
        return stream

    def _to_clients(self, stream: Stream) -> None:
        decoder = Decoder()
        try:
            while data := stream.recv(_READ_BYTES):
                for frame in decoder.feed(data):
                    client = self._numbers.get(frame.id)
                    if frame.type != DATAGRAM or client is None:
                        continue
                    try:
                        self._listener.sendto(frame.payload, client)
                    except OSError:
                        pass  # the client is gone, or slow
        except (WherryError, WireError) as error:
            if not self._closing:
                _logger.info("datagrams do not come from the guest: %s", error)
        finally:
            self._lost(stream)

    def _lost(self, stream: Stream | None) -> None:
        with self._lock:
            if self._stream is stream:
                self._stream = None
        if stream is not None:
            stream.close()
