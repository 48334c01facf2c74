"""What goes over the wire comes out as it was, and what is malformed is refused, never believed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wherry_sync import wire
from wherry_sync.entry import EMPTY, IGNORED, file, link, problem
from wherry_wire.frames import MAX_PAYLOAD_BYTES, Decoder, WireError

DIGEST = b"d" * 32


def payloads(frames: list[bytes]) -> list[bytes]:
    decoder = Decoder()
    return [frame.payload for data in frames for frame in decoder.feed(data)]


@given(st.lists(st.tuples(st.binary(max_size=300), st.binary(max_size=300))))
def test_rows_come_out_as_they_went_in(rows: list[tuple[bytes, ...]]) -> None:
    frames = list(wire.rows(rows))
    assert [row for data in payloads(frames) for row in wire.parse_rows(data, 2)] == rows


def test_rows_of_the_largest_fields_fit_into_frames() -> None:
    row = (b"p" * 33_000, b"l" * 4096, b"l" * 4096)
    frames = payloads(list(wire.rows([row] * 50)))
    assert max(map(len, frames)) <= MAX_PAYLOAD_BYTES
    assert [each for data in frames for each in wire.parse_rows(data, 3)] == [row] * 50


@given(st.binary(max_size=200), st.integers(1, 3))
def test_no_bytes_break_the_parser_of_rows(data: bytes, width: int) -> None:
    try:
        rows = list(wire.parse_rows(data, width))
    except WireError:
        return
    assert sum(4 + len(field) for row in rows for field in row) == len(data)


CHUNKS = st.lists(st.binary(min_size=1, max_size=400) | st.just(b"x" * 300_000), max_size=3)


@given(st.lists(st.tuples(st.binary(max_size=42), st.integers(-(2**63), 2**63 - 1), CHUNKS)))
def test_contents_come_out_as_they_went_in(files: list[tuple[bytes, int, list[bytes]]]) -> None:
    found = payloads(list(wire.contents(files)))
    assert all(len(data) <= MAX_PAYLOAD_BYTES for data in found)
    frames = iter(found)
    arriving = wire.Contents(lambda: next(frames, None))
    result = [(key, mtime_ns, b"".join(chunks)) for key, mtime_ns, chunks in arriving]
    assert result == [(key, mtime_ns, b"".join(chunks)) for key, mtime_ns, chunks in files]


def test_what_is_left_of_a_file_is_passed_over() -> None:
    files = [(b"1", 0, [b"a" * 200_000, b"b" * 200_000]), (b"2", 0, [b"c"])]
    frames = iter(payloads(list(wire.contents(files))))
    arriving = wire.Contents(lambda: next(frames, None))
    assert [(key, next(chunks)[:1]) for key, _, chunks in arriving] == [(b"1", b"a"), (b"2", b"c")]


def test_what_is_left_of_a_file_that_its_reader_closed_is_passed_over() -> None:
    """As one does that fails half-way, of a full disk, and was reading by ``yield from``."""
    files = [(b"1", 0, [b"a" * 200_000, b"b" * 200_000]), (b"2", 0, [b"c"])]
    frames = iter(payloads(list(wire.contents(files))))

    def reading(chunks: Iterator[bytes]) -> Iterator[bytes]:
        yield from chunks

    found = []
    for key, _, chunks in wire.Contents(lambda: next(frames, None)):
        reader = reading(chunks)
        found.append((key, next(reader)[:1]))
        reader.close()  # type: ignore[attr-defined]
    assert found == [(b"1", b"a"), (b"2", b"c")]


@given(st.lists(st.binary(max_size=60), max_size=4))
def test_no_bytes_break_the_parser_of_contents(data: list[bytes]) -> None:
    frames = iter(data)
    try:
        for _, _, chunks in wire.Contents(lambda: next(frames, None)):
            for _ in chunks:
                pass
    except WireError:
        pass


def test_contents_that_are_cut_off_are_refused() -> None:
    (whole,) = payloads(list(wire.contents([(b"key", 1, [b"abc", b"def"])])))

    def read(data: bytes) -> None:
        frames = iter([data])
        for _, _, chunks in wire.Contents(lambda: next(frames, None)):
            list(chunks)

    read(whole)
    for end in range(1, len(whole)):
        with pytest.raises(WireError):
            read(whole[:end])


ENTRIES = [None, EMPTY, IGNORED, file(True, 5, DIGEST), link(b"../x"), problem("why")]


@pytest.mark.parametrize("entry", ENTRIES)
def test_entries_come_out_as_they_went_in(entry: object) -> None:
    assert wire.parse_entry(wire.pack_entry(entry)) == entry  # type: ignore[arg-type]


@given(st.binary(max_size=60))
def test_bytes_that_are_no_entry_are_refused(data: bytes) -> None:
    try:
        entry = wire.parse_entry(data)
    except WireError:
        return
    assert wire.pack_entry(entry) == data


@pytest.mark.parametrize(
    "data",
    [
        b"F" + b"\0" * 40,
        b"F\x02" + b"\0" * 40,
        b"F\0\xff" + b"\0" * 39,
        b"L",
        b"Lto\0nothing",
        b"X",
        b"U" + b"u" * 5000,
    ],
)
def test_malformed_entries_are_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        wire.parse_entry(data)


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "..", "a/../b", "a//b", "a/", ".", "a/./b", "nul\0", ".wherry-x/f", "x" * 256],
)
def test_a_path_that_leads_elsewhere_is_refused(path: str) -> None:
    with pytest.raises(WireError):
        wire.parse_path(path.encode())


def test_a_path_is_not_too_deep_and_is_text() -> None:
    assert wire.parse_path("/".join(["d"] * 129).encode())
    with pytest.raises(WireError):
        wire.parse_path("/".join(["d"] * 130).encode())
    with pytest.raises(WireError):
        wire.parse_path(b"\xff")


def test_a_name_that_is_only_shown_may_be_odd_but_leads_nowhere() -> None:
    assert wire.parse_path(b"a/.wherry-x", shown=True) == "a/.wherry-x"
    for path in ("a/..", "../b", "a//", "/b"):
        with pytest.raises(WireError):
            wire.parse_path(path.encode(), shown=True)


def test_numbers_are_in_range() -> None:
    assert wire.parse_number(wire.pack_number(4), 5) == 4
    for data in (wire.pack_number(5), b"", b"\0\0\0\0\0"):
        with pytest.raises(WireError):
            wire.parse_number(data, 5)
