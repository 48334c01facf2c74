"""How a packet of channel data lies in memory (RFC 4253 §6, RFC 4254 §5.2), before it is sealed.

The length, which is not encrypted with AES-GCM, is kept apart. The rest, the plain text, is the
padding's length, the head, the data and the padding, which need not be random: the cipher hides
and authenticates it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

CHANNEL_DATA = 94
"""SSH_MSG_CHANNEL_DATA (RFC 4254 §5.2)."""

DATA_HEAD = struct.Struct(">BII")
"""The kind, the channel, and how much data follows."""

DATA_AT = 1 + DATA_HEAD.size
"""Where a plain text has its data."""

MOST_DATA_BYTES = 32 * 1024
"""The data of one of our packets when there is much: the most that OpenSSH takes."""

TAG_BYTES = 16
BLOCK_BYTES = 16

_PADDING = tuple(bytes([n]) for n in range(2 * BLOCK_BYTES))
_ZEROS = tuple(bytes(n) for n in range(2 * BLOCK_BYTES))
_PACKETS = 8
_RECORD_BYTES = DATA_AT + MOST_DATA_BYTES + 2 * BLOCK_BYTES

SEND_AT_ONCE_BYTES = _PACKETS * MOST_DATA_BYTES
"""How much data one call sends before other streams may: a bound on what they wait."""

SEALED_BYTES = _PACKETS * (4 + _RECORD_BYTES + TAG_BYTES)
"""How much that is at most when it is sealed, with each packet's length and tag."""


class DataPackets:
    """Room for :data:`SEND_AT_ONCE_BYTES` of data, which can be sealed where it is."""

    def __init__(self) -> None:
        room = memoryview(bytearray(_PACKETS * _RECORD_BYTES))
        offsets = range(0, len(room), _RECORD_BYTES)
        self._records = [room[at : at + _RECORD_BYTES] for at in offsets]
        self.data = [record[DATA_AT : DATA_AT + MOST_DATA_BYTES] for record in self._records]
        """Where the data of each packet goes; all but the last of those sent are full."""
        self._plain = list(self._records)
        self._laid = [(-1, -1)] * _PACKETS

    def room(self, most: int) -> list[memoryview]:
        """Return where up to ``most`` bytes of data go: whole packets, or a part of one."""
        whole = most // MOST_DATA_BYTES
        return self.data[:whole] if whole else [self.data[0][:most]]

    def fill(self, data: memoryview) -> int:
        """Copy as much of ``data`` as there is room for, and return how much."""
        begun = len(data)
        for place in self.data:
            part, data = data[: len(place)], data[len(place) :]
            place[: len(part)] = part
            if not data:
                break
        return begun - len(data)

    def filled(self, count: int) -> Iterator[memoryview]:
        """Yield the first ``count`` bytes of data, by packets."""
        for data in self.data:
            if count <= 0:
                return
            yield data[:count]
            count -= len(data)

    def plain(self, index: int, channel: int, count: int) -> memoryview:
        """Return a packet's plain text with its first ``count`` bytes of data."""
        # As a rule it is the same packet as before, with other data.
        if self._laid[index] != (channel, count):
            record = self._records[index]
            end = DATA_AT + count
            padding = record[0] = _padding(end)
            DATA_HEAD.pack_into(record, 1, CHANNEL_DATA, channel, count)
            self._plain[index] = record[: end + padding]
            self._laid[index] = channel, count
        plain = self._plain[index]
        plain[-plain[0] :] = _ZEROS[plain[0]]
        return plain


def plain_text(head: bytes, body: memoryview | bytes) -> bytes:
    """Return the plain text of a packet of any kind."""
    padding = _padding(1 + len(head) + len(body))
    return b"".join((_PADDING[padding], head, body, _ZEROS[padding]))


def _padding(length: int) -> int:
    """Return how much is to follow so many bytes of a plain text (RFC 4253 §6)."""
    padding = BLOCK_BYTES - length % BLOCK_BYTES
    return padding if padding >= 4 else padding + BLOCK_BYTES
