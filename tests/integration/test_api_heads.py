"""The longest heads of all kinds: the time and memory that they take, by the real clock."""

from __future__ import annotations

import contextlib
import time
import tracemalloc

import pytest
from http_messages import LONG_FILLERS, LONG_HEADS, read

from wherry.api.http import (
    ESCAPE_LIMIT,
    HEAD_LIMIT_BYTES,
    HEADER_LIMIT,
    MARK_LIMIT,
    MalformedRequest,
    parse_request,
)

IN_NO_TIME_S = 0.5
PEAK_BYTES = 20 << 20


@pytest.mark.parametrize(
    "filler",
    [b" ", b"x ", b"\t", b"e", b",", b"a,", b"abc,", b"%41", b"a&", b"ab=%41&", b"a: b\r\n", b"=a"],
)
def test_the_longest_heads_take_little_more_memory_than_they_are_long(filler: bytes) -> None:
    """Those that are refused, and those that just are not; with all that is asked of a head."""
    few = {b" ": MARK_LIMIT - 4, b"\t": MARK_LIMIT - 4, b",": MARK_LIMIT, b"&": MARK_LIMIT}
    few |= {b"%": ESCAPE_LIMIT, b"\n": HEADER_LIMIT - 2}
    for head in (
        b"GET / HTTP/1.1\r\nHost: d\r\nX: FILLx\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: d\r\nConnection: FILLx\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: d\r\nExpect: FILLx\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: d\r\nContent-Length: FILL1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: d\r\nXFILL: x\r\n\r\n",
        b"GET /FILLx HTTP/1.1\r\nHost: d\r\n\r\n",
        b"GET /?FILLx HTTP/1.1\r\nHost: d\r\n\r\n",
        b"GFILL / HTTP/1.1\r\nHost: d\r\n\r\n",
    ):
        longest = (HEAD_LIMIT_BYTES - len(head)) // len(filler)
        for count in {longest, *(few[mark] for mark in few if mark in filler)}:
            raw = head.replace(b"FILL", filler * min(count, longest))
            tracemalloc.start()
            try:
                with contextlib.suppress(MalformedRequest):
                    found = parse_request(raw)
                    assert found.query is not None
                    assert {found.keep_alive, found.expects_continue, found.may_hijack} <= {
                        True,
                        False,
                    }
                    assert found.with_body(3)
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            assert peak < PEAK_BYTES, (head, count)


@pytest.mark.parametrize("filler", LONG_FILLERS)
@pytest.mark.parametrize("head", LONG_HEADS)
def test_the_longest_head_is_read_or_refused_in_no_time(head: bytes, filler: bytes) -> None:
    """While it is looked at nobody else is served: a pattern holds the interpreter."""
    longest = (HEAD_LIMIT_BYTES - len(head)) // len(filler)
    # What is refused, and what just is not: it is looked at for longer.
    for count in (longest, ESCAPE_LIMIT, MARK_LIMIT - 4, HEADER_LIMIT - 2):
        begun = time.process_time()
        with contextlib.suppress(MalformedRequest):
            read(head.replace(b"FILL", filler * min(longest, count)))
        assert time.process_time() - begun < IN_NO_TIME_S


@pytest.mark.parametrize("target_bytes", [HEAD_LIMIT_BYTES // 2, HEAD_LIMIT_BYTES - 100])
def test_the_longest_head_takes_no_longer_in_small_parts(target_bytes: int) -> None:
    data = b"GET /%b HTTP/1.1\r\nHost: d\r\nX: " % (b"a" * target_bytes)
    data += b"a" * (HEAD_LIMIT_BYTES - len(data))
    begun = time.process_time()
    assert not read(data, step=4)
    assert time.process_time() - begun < 1.0
