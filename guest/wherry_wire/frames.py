"""Frames: cutting a byte stream into bounded pieces, without doing any I/O.

    u32 payload length | u8 type | u8 flags | u32 request id | payload

All numbers are big-endian. A type below :data:`BULK` is a control frame, whose payload is a
JSON object; types from there on carry bytes of a format that their feature defines. A reply
has the id of its request. Id 0 belongs to no request: what the agent says unasked.
"""

from __future__ import annotations

import struct

MAX_PAYLOAD_BYTES = 256 * 1024
"""Small enough that a control frame never waits long behind a bulk frame."""

BULK = 0x80
"""The first type whose payload is not JSON."""

DATAGRAM = 0x90
"""A datagram; the id is its client's number (:class:`~wherry_wire.messages.DatagramsTo`)."""

_HEADER = struct.Struct(">IBBI")


class WireError(Exception):
    """The other end broke the protocol: the session cannot go on."""


class Frame:
    """One piece of the stream.

    :param type: what the payload is, 0 to 255.
    :param id: the request that it belongs to, 0 to 2³²-1; 0 for none.
    :param flags: 0 to 255; the meaning of a bit belongs to the type.
    """

    __slots__ = ("flags", "id", "payload", "type")

    def __init__(self, type: int, id: int, payload: bytes, flags: int = 0) -> None:
        self.type = type
        self.id = id
        self.payload = payload
        self.flags = flags

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Frame):
            return NotImplemented
        return self.encode() == other.encode()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Frame(0x{self.type:02x}, {self.id}, {len(self.payload)} bytes, {self.flags})"

    def encode(self) -> bytes:
        """Return the frame as it goes over the wire.

        :raises WireError: the payload is too large.
        """
        if len(self.payload) > MAX_PAYLOAD_BYTES:
            raise WireError(f"a frame of {len(self.payload)} bytes is too large")
        return _HEADER.pack(len(self.payload), self.type, self.flags, self.id) + self.payload


class Decoder:
    """Turns bytes, in whatever pieces they come, back into frames.

    It holds at most one incomplete frame: a length above the limit is refused when the
    header is complete, before any of the payload is kept.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def pending_bytes(self) -> int:
        """Bytes of the frame that is not complete yet; 0 between two frames."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[Frame]:
        """Take the next bytes of the stream and return the frames that they complete.

        :raises WireError: a frame is too large; the decoder must not be used again.
        """
        self._buffer += data
        frames = []
        start = 0
        while len(self._buffer) - start >= _HEADER.size:
            length, type, flags, id = _HEADER.unpack_from(self._buffer, start)
            if length > MAX_PAYLOAD_BYTES:
                raise WireError(f"a frame announces {length} bytes, above {MAX_PAYLOAD_BYTES}")
            payload = start + _HEADER.size
            if len(self._buffer) < payload + length:
                break
            frames.append(Frame(type, id, bytes(self._buffer[payload : payload + length]), flags))
            start = payload + length
        del self._buffer[:start]
        return frames
