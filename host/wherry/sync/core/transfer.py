"""How far a round is with the contents that it carries over."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from wherry_sync.entry import Leaf


@dataclass
class Transfer:
    """Contents on their way; changed by one thread, and read by any, who may be a file behind.

    :ivar total_files: all that there are, and ``total_bytes`` their size.
    :ivar path: whose contents are being carried over, or were last; empty before the first.
    """

    total_files: int
    total_bytes: int
    done_files: int = 0
    done_bytes: int = 0
    path: str = ""
    begun_s: float = field(default_factory=time.monotonic)

    def rate(self, now_s: float) -> float:
        """Return the bytes in a second so far."""
        return self.done_bytes / max(now_s - self.begun_s, 1e-3)

    def left_s(self, now_s: float) -> float | None:
        """Return how long it takes from now on if it goes on like that; None if unknown."""
        if not self.done_bytes:
            return None
        return max(0, self.total_bytes - self.done_bytes) / self.rate(now_s)

    def begin(self, path: str) -> None:
        """Take note of the file that is next."""
        self.path = path

    def end(self, size: int) -> None:
        """Take note that a file is done, with bytes that were not counted yet."""
        self.done_files += 1
        self.done_bytes += size

    def watch(
        self,
        wanted: Sequence[tuple[str, Leaf]],
        contents: Iterable[tuple[Leaf, int, Iterable[bytes]]],
    ) -> Iterator[tuple[Leaf, int, Iterable[bytes]]]:
        """Yield contents as they come, and count them.

        :param wanted: what was asked for: paths, and the leaves that come back.
        """
        paths = {id(leaf): path for path, leaf in wanted}
        for leaf, mtime_ns, chunks in contents:
            self.begin(paths.get(id(leaf), ""))
            yield leaf, mtime_ns, self._counted(chunks)
            self.end(0)

    def _counted(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self.done_bytes += len(chunk)
            yield chunk
