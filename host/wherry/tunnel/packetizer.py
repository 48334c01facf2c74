"""SSH's binary packet protocol (RFC 4253 §6) with AES-GCM (RFC 5647, OpenSSH PROTOCOL §1.6).

paramiko's packetizer reads each packet by two or more small reads and copies its
content some five times, which bounds a relay more than the cipher does. This one

- reads as much as the socket has into one buffer and parses packets there,
- gives channel data straight to a handler, without a Message,
- seals several packets of data where they lie and sends them by one call.

It does so for AES-GCM alone, which the guest always agrees to; everything before
the first key exchange, and every other cipher, goes through paramiko's own code.

Only paramiko's public and protected methods are overridden, none of its private
attributes are touched; ``tests/unit/test_tunnel_paramiko.py`` fails when a release
moves one of them.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

from paramiko.message import Message
from paramiko.packet import NeedRekeyException, Packetizer
from paramiko.ssh_exception import SSHException

from wherry.core.sockets import SharedSocket
from wherry.tunnel.packets import (
    BLOCK_BYTES,
    CHANNEL_DATA,
    DATA_AT,
    DATA_HEAD,
    MOST_DATA_BYTES,
    SEALED_BYTES,
    TAG_BYTES,
    DataPackets,
    plain_text,
)

WINDOW_ADJUST = 93
"""SSH_MSG_CHANNEL_WINDOW_ADJUST (RFC 4254 §5.2)."""

MAX_PACKET_BYTES = 256 * 1024
"""OpenSSH neither sends nor takes a longer packet (``PACKET_MAX_SIZE`` in packet.c)."""

_BUFFER_BYTES = 2 * MAX_PACKET_BYTES
SMALL_BYTES = 8 * 1024
"""Up to this a write hurries; more is a part of a transfer."""

_READ_BYTES = 256 * 1024
"""More in one go would push everything else out of the processor's cache."""

_LEAST_ROOM_BYTES = 64 * 1024
_PARTS_AT_ONCE = 8
_UINT32 = struct.Struct(">I")
_TWO_UINT32 = struct.Struct(">II")
_NONCE = struct.Struct(">4sQ")

DataHandler = Callable[[int, list[memoryview]], None]


class _Cipher:
    """One direction's AES-GCM: the key, and the nonce that every packet advances."""

    def __init__(self, engine: Any, nonce: bytes) -> None:
        self.encrypt: Callable[..., bytes] = engine.encrypt
        self.decrypt: Callable[..., bytes] = engine.decrypt
        # Newer releases of cryptography have these; they save a fresh object for each packet.
        self.encrypt_into: Callable[..., int] | None = getattr(engine, "encrypt_into", None)
        self.decrypt_into: Callable[..., int] | None = getattr(engine, "decrypt_into", None)
        fixed, first = _NONCE.unpack(nonce)
        self.nonces: Iterator[bytes] = map(
            partial(_NONCE.pack, fixed), chain(range(first, 1 << 64), range(first))
        )
        """Each packet's nonce; the invocation counter is RFC 5647 §7.1's. No Python runs here."""


class FastPacketizer(Packetizer):  # type: ignore[misc]  # paramiko ships no types
    """Packets over a socket, at the speed of a relay.

    :param sock: without a timeout, which would cost a poll(2) for each call. Nobody
        needs to look up from a read in between: closing the socket wakes it, and that we
        want new keys is seen after the next packet, which a sender's window brings.
    """

    # AES-GCM under one key is good for 2^32 blocks, 64 GiB (RFC 4344 §3.2); half of
    # it, and far fewer exchanges than paramiko's every 512 MiB, each of which
    # halts all streams for two round trips to a slow guest.
    REKEY_BYTES = 1 << 35
    REKEY_PACKETS = 1 << 30
    REKEY_BYTES_OVERFLOW_MAX = 1 << 32
    REKEY_PACKETS_OVERFLOW_MAX = 1 << 30

    def __init__(self, sock: SharedSocket) -> None:
        super().__init__(sock)
        self._sock = sock
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._plain = memoryview(bytearray(_BUFFER_BYTES))
        self._start = 0
        self._end = 0
        self._sendmsg = sock.sendmsg
        self._quick_ack: int | None = getattr(socket, "TCP_QUICKACK", None)  # Linux has it
        self._write_lock = threading.Lock()
        self._scratch = DataPackets()
        self._out_sealed = memoryview(bytearray(SEALED_BYTES))
        self._cipher_in: _Cipher | None = None
        self._cipher_out: _Cipher | None = None
        self._bytes_in = self._packets_in = 0
        self._bytes_out = self._packets_out = 0
        self.last_received = time.monotonic()
        self._pushed_back: memoryview | None = None
        self.ready_for_data: Callable[[], bool] = lambda: False
        self.on_data: DataHandler = lambda channel, parts: None
        self.on_window: Callable[[int, int], bool] = lambda channel, count: False

    # -- what paramiko's transport calls --------------------------------------------

    def start_handshake(self, timeout: float) -> None:
        """Start no timer: the connection has one deadline for the whole handshake."""

    def complete_handshake(self) -> None:
        """Stop no timer; paramiko calls this for every message."""

    def set_inbound_cipher(self, block_engine: Any, *args: Any, **options: Any) -> None:
        """Switch the inbound keys; AES-GCM's are kept here as well."""
        super().set_inbound_cipher(block_engine, *args, **options)
        aead = options.get("aead", False)
        self._cipher_in = _Cipher(block_engine, options["iv_in"]) if aead else None
        self._bytes_in = self._packets_in = 0

    def set_outbound_cipher(self, block_engine: Any, *args: Any, **options: Any) -> None:
        """Switch the outbound keys; AES-GCM's are kept here as well."""
        super().set_outbound_cipher(block_engine, *args, **options)
        aead = options.get("aead", False)
        self._cipher_out = _Cipher(block_engine, options["iv_out"]) if aead else None
        self._bytes_out = self._packets_out = 0

    # -- reading ----------------------------------------------------------------------

    def readline(self, timeout: float) -> str:
        """Read a line of the banner (RFC 4253 §4.2) through the same buffer as the packets."""
        while (at := self._buffer.find(b"\n", self._start, self._end)) < 0:
            if self._end - self._start > 8192:
                raise SSHException("the SSH banner's line is too long")
            self._fill(self._end - self._start + 1)
        line = bytes(self._view[self._start : at])
        self._start = at + 1
        return line.rstrip(b"\r").decode(errors="replace")

    def read_all(self, n: int, check_rekey: bool = False) -> bytes:
        """Read exactly ``n`` bytes."""
        out = b""
        while len(out) < n:
            take = min(n - len(out), MAX_PACKET_BYTES)
            self._fill(take)
            out += self._view[self._start : self._start + take]
            self._start += take
        return out

    def read_message(self) -> tuple[int, Any]:
        """Return the next message that :attr:`on_data` and :attr:`on_window` do not take."""
        while (cipher := self._cipher_in) is not None:
            packet = self._next_packet(cipher)
            end = len(packet) - packet[0]
            kind = packet[1]
            if kind == CHANNEL_DATA and end >= DATA_AT:
                taken = self._take_data(cipher, packet, end)
            elif kind == WINDOW_ADJUST and end >= 10:
                taken = self.on_window(*_TWO_UINT32.unpack_from(packet, 2))
            else:
                taken = False
            if taken:
                if self.need_rekey():
                    raise NeedRekeyException
                continue
            self._acknowledge_now()
            message = Message(bytes(packet[2:end]))
            # RFC 4253 §11.4 wants it for SSH_MSG_UNIMPLEMENTED; it starts anew with the keys.
            message.seqno = (self._packets_in - 1) & 0xFFFF_FFFF
            return kind, message
        answer: tuple[int, Any] = super().read_message()
        return answer

    def _acknowledge_now(self) -> None:
        """Have the system acknowledge what came, if nothing of ours is about to do so.

        sshd leaves Nagle's algorithm on where there is no terminal: while the word that a
        channel is open or closed is not acknowledged, it sends no data after it, and the
        system would take 40 ms (tcp(7), TCP_QUICKACK).
        """
        if self._quick_ack is not None:
            try:
                self._sock.setsockopt(socket.IPPROTO_TCP, self._quick_ack, 1)
            except OSError:
                pass  # the connection is going

    def _take_data(self, cipher: _Cipher, packet: memoryview, end: int) -> bool:
        """Give data to :attr:`on_data`, with what is in the buffer for the same channel.

        A reader is so woken once for all that arrived, not for each packet.
        """
        if not self.ready_for_data():
            return False
        (channel,) = _UINT32.unpack_from(packet, 2)
        parts = [packet[DATA_AT:end]]
        buffer, stop = self._buffer, self._end
        while len(parts) < _PARTS_AT_ONCE and (at := self._start) + 4 <= stop:
            (size,) = _UINT32.unpack_from(buffer, at)
            if at + 4 + size + TAG_BYTES > stop or not _is_length(size):
                break
            # The channel's number is encrypted: only a packet that is read tells it.
            packet = self._open(cipher, at, size)
            end = len(packet) - packet[0]
            if (
                packet[1] != CHANNEL_DATA
                or end < DATA_AT
                or _UINT32.unpack_from(packet, 2)[0] != channel
            ):
                self._pushed_back = packet
                break
            parts.append(packet[DATA_AT:end])
        self.on_data(channel, parts)
        return True

    def _next_packet(self, cipher: _Cipher) -> memoryview:
        """Return a packet's plain text: the padding's length, payload, padding.

        It is good until the next packet that is not whole in the buffer is read.
        """
        if self._pushed_back is not None:
            packet, self._pushed_back = self._pushed_back, None
            return packet
        self._fill(4)
        (size,) = _UINT32.unpack_from(self._buffer, self._start)
        if not _is_length(size):
            raise SSHException(f"the packet's length is {size}")
        self._fill(4 + size + TAG_BYTES)
        return self._open(cipher, self._start, size)

    def _open(self, cipher: _Cipher, at: int, size: int) -> memoryview:
        """Take a packet that is whole in the buffer, and return its plain text."""
        view, body = self._view, at + 4
        self._start = stop = body + size + TAG_BYTES
        if cipher.decrypt_into is None:
            plain = cipher.decrypt(next(cipher.nonces), view[body:stop], view[at:body])
            packet = memoryview(plain)
        else:
            # At the same place as the sealed one, so it lasts as long: until _fill().
            packet = self._plain[body : body + size]
            cipher.decrypt_into(next(cipher.nonces), view[body:stop], view[at:body], packet)
        if packet[0] > size - 2:
            raise SSHException("the packet is all padding")
        self._packets_in += 1
        self._bytes_in += size
        if self._bytes_in >= self.REKEY_BYTES or self._packets_in >= self.REKEY_PACKETS:
            self._want_rekey_in()
        return packet

    def _want_rekey_in(self) -> None:
        if not self.need_rekey():
            self._trigger_rekey()
        elif (
            self._bytes_in >= self.REKEY_BYTES + self.REKEY_BYTES_OVERFLOW_MAX
            or self._packets_in >= self.REKEY_PACKETS + self.REKEY_PACKETS_OVERFLOW_MAX
        ):
            raise SSHException("the guest ignores that we ask for new keys")

    def _fill(self, wanted: int) -> None:
        """Have at least ``wanted`` bytes in the buffer, and as many more as there are."""
        have = self._end - self._start
        if have >= wanted:
            return
        if not have:
            self._start = self._end = 0
        elif _BUFFER_BYTES - self._start < max(wanted, _LEAST_ROOM_BYTES):
            # The move is rare and small: at most the head of one packet.
            self._buffer[:have] = self._buffer[self._start : self._end]
            self._start, self._end = 0, have
        while self._end - self._start < wanted:
            try:
                count = self._sock.recv_into(self._view[self._end : self._end + _READ_BYTES])
            except OSError:
                if self.closed:
                    raise EOFError from None
                raise
            if not count:
                raise EOFError
            self._end += count
            self.last_received = time.monotonic()

    # -- writing ----------------------------------------------------------------------

    def send_message(self, data: Any) -> None:
        """Send one message."""
        if self._cipher_out is None:
            super().send_message(data)
            return
        with self._write_lock:
            self._send_sealed(self._sealed(b"", data.asbytes()), 1)

    def send_now(self, payload: bytes) -> bool:
        """Send one message unless that would wait; tell whether it was sent."""
        if self._cipher_out is None or not self._write_lock.acquire(blocking=False):
            return False
        try:
            if not has_room(self._sock):
                return False
            self._send_sealed(self._sealed(b"", payload), 1)
        finally:
            self._write_lock.release()
        return True

    def send_data(self, channel: int, data: memoryview, most: int) -> None:
        """Send channel data as packets of up to ``most`` bytes of it each, by one call."""
        if self._cipher_out is None:
            for at in range(0, len(data), most):
                part = data[at : at + most]
                message = Message()
                message.add_bytes(DATA_HEAD.pack(CHANNEL_DATA, channel, len(part)))
                message.add_bytes(part)
                super().send_message(message)
            return
        with self._write_lock:
            if len(data) <= SMALL_BYTES or most < MOST_DATA_BYTES:
                buffers: list[bytes] = []
                for at in range(0, len(data), most):
                    part = data[at : at + most]
                    head = DATA_HEAD.pack(CHANNEL_DATA, channel, len(part))
                    buffers += self._sealed(head, part)
                self._send_sealed(buffers, len(buffers) // 2)
                return
            while data:
                count = self._scratch.fill(data)
                self._send_laid(channel, self._scratch, count)
                data = data[count:]

    def send_packets(self, channel: int, packets: DataPackets, count: int) -> None:
        """Send the first ``count`` bytes of the packets' data, by one call."""
        if self._cipher_out is None:
            for part in packets.filled(count):
                self.send_data(channel, part, MOST_DATA_BYTES)
            return
        with self._write_lock:
            self._send_laid(channel, packets, count)

    def _send_laid(self, channel: int, packets: DataPackets, count: int) -> None:
        """Seal packets side by side and send them, holding the lock.

        Nothing is allocated on the way: fresh memory for each packet costs as much as the
        cipher.
        """
        cipher, sealed = self._cipher_out, self._out_sealed
        assert cipher is not None
        end = index = 0
        while count > 0:
            plain = packets.plain(index, channel, min(count, MOST_DATA_BYTES))
            head, body = end, end + _UINT32.size
            end = body + len(plain) + TAG_BYTES
            _UINT32.pack_into(sealed, head, len(plain))
            if cipher.encrypt_into is not None:
                cipher.encrypt_into(next(cipher.nonces), plain, sealed[head:body], sealed[body:end])
            else:
                sealed[body:end] = cipher.encrypt(next(cipher.nonces), plain, sealed[head:body])
            count -= MOST_DATA_BYTES
            index += 1
        self._send_sealed([sealed[:end]], index)

    def write_all(self, out: memoryview | bytes) -> None:
        """Send all bytes, in order."""
        try:
            self._sock.sendall(out)
        except OSError:
            raise EOFError from None

    def _sealed(self, head: bytes, body: memoryview | bytes) -> list[bytes]:
        """Return a packet's length, and its encrypted rest."""
        cipher = self._cipher_out
        assert cipher is not None
        plain = plain_text(head, body)
        size = _UINT32.pack(len(plain))
        return [size, cipher.encrypt(next(cipher.nonces), plain, size)]

    def _send_sealed(self, buffers: Sequence[bytes | memoryview], packets: int) -> None:
        total = sum(map(len, buffers))
        sent = 0
        if self._sendmsg is not None:
            try:
                sent = self._sendmsg(buffers)
            except OSError:
                raise EOFError from None
        if sent < total:
            self.write_all(memoryview(b"".join(buffers))[sent:])
        self._bytes_out += total
        self._packets_out += packets
        if (
            self._bytes_out >= self.REKEY_BYTES or self._packets_out >= self.REKEY_PACKETS
        ) and not self.need_rekey():
            self._trigger_rekey()


def _is_length(size: int) -> bool:
    """Whether a packet's plain text can be of so many bytes."""
    return BLOCK_BYTES <= size <= MAX_PACKET_BYTES and not size % BLOCK_BYTES


def has_room(sock: SharedSocket) -> bool:
    """Whether a small write to the socket would not wait."""
    try:
        if hasattr(select, "poll"):
            poller = select.poll()
            poller.register(sock.fileno(), select.POLLOUT)
            return bool(poller.poll(0))
        return bool(select.select([], [sock], [], 0)[1])
    except (OSError, ValueError):
        return False  # it is being closed
