"""The wire format: whatever is sent arrives, whatever else arrives is refused."""

from __future__ import annotations

import json
import struct
import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wherry_wire import messages
from wherry_wire.frames import BULK, MAX_PAYLOAD_BYTES, Decoder, Frame, WireError
from wherry_wire.messages import (
    ClockReport,
    ClockSet,
    Done,
    Failure,
    HealthReport,
    Hello,
    Message,
    TrimReport,
    pack,
    unpack,
)

# Machines may be busy; the limit on a test's time is enough of a limit.
unhurried = settings(deadline=None)

u8 = st.integers(0, 0xFF)
u32 = st.integers(0, 0xFFFFFFFF)
frames = st.builds(Frame, u8, u32, st.binary(max_size=100), u8)

KINDS = [
    kind
    for kind in vars(messages).values()
    if isinstance(kind, type) and issubclass(kind, Message) and kind is not Message
]
FIELDS: dict[str, st.SearchStrategy[object]] = {
    "int": st.integers(-(2**63), 2**63 - 1),
    "float": st.floats(allow_nan=False, allow_infinity=False),
    "str": st.text(),
    "bool": st.booleans(),
}


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


@st.composite
def any_message(draw: st.DrawFn) -> Message:
    kind = draw(st.sampled_from(KINDS))
    return kind(**{name: draw(FIELDS[text]) for name, text in kind.__annotations__.items()})


@unhurried
@given(st.lists(frames, max_size=8), st.lists(st.integers(0), max_size=20))
def test_frames_survive_any_split_of_the_stream(sent: list[Frame], cuts: list[int]) -> None:
    decoder = Decoder()
    pieces = split(b"".join(frame.encode() for frame in sent), cuts)
    assert [frame for piece in pieces for frame in decoder.feed(piece)] == sent
    assert decoder.pending_bytes == 0


@pytest.mark.parametrize("piece_bytes", [1 << 10, 1 << 16, 1 << 20])
def test_bulk_frames_of_full_size_survive(piece_bytes: int) -> None:
    sent = [Frame(BULK + n, n, bytes([n]) * MAX_PAYLOAD_BYTES) for n in range(4)]
    data = b"".join(frame.encode() for frame in sent)
    decoder = Decoder()
    pieces = [data[at : at + piece_bytes] for at in range(0, len(data), piece_bytes)]
    assert [frame for piece in pieces for frame in decoder.feed(piece)] == sent


def test_the_header_is_as_documented() -> None:
    assert Frame(0x81, 7, b"xyz", 2).encode() == b"\0\0\0\x03\x81\x02\0\0\0\x07xyz"


def test_too_large_a_frame_is_neither_sent_nor_kept() -> None:
    with pytest.raises(WireError, match="too large"):
        Frame(BULK, 1, bytes(MAX_PAYLOAD_BYTES + 1)).encode()
    with pytest.raises(WireError, match="announces 262145 bytes"):
        Decoder().feed(struct.pack(">IBBI", MAX_PAYLOAD_BYTES + 1, BULK, 0, 1))


def test_a_decoder_keeps_no_more_than_one_frame() -> None:
    decoder = Decoder()
    frame = Frame(BULK, 1, bytes(MAX_PAYLOAD_BYTES)).encode()
    tracemalloc.start()
    try:
        for _ in range(100):
            for at in range(0, len(frame), 4096):
                decoder.feed(frame[at : at + 4096])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * MAX_PAYLOAD_BYTES


def consume(data: bytes, cuts: list[int]) -> None:
    decoder = Decoder()
    for piece in split(data, cuts):
        for frame in decoder.feed(piece):
            unpack(frame)
        assert decoder.pending_bytes <= MAX_PAYLOAD_BYTES + 10


@unhurried
@given(st.binary(max_size=4096), st.lists(st.integers(0), max_size=20))
def test_garbage_is_refused_with_a_wire_error_alone(data: bytes, cuts: list[int]) -> None:
    try:
        consume(data, cuts)
    except WireError:
        pass


@unhurried
@given(
    st.lists(any_message(), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0), st.integers(1, 255)), min_size=1, max_size=3),
    st.lists(st.integers(0), max_size=4),
)
def test_damage_is_refused_with_a_wire_error_alone(
    sent: list[Message], damage: list[tuple[int, int]], cuts: list[int]
) -> None:
    data = bytearray(b"".join(pack(message, 1) for message in sent))
    for at, bits in damage:
        data[at % len(data)] ^= bits
    try:
        consume(bytes(data), cuts)
    except WireError:
        pass


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@unhurried
@given(st.sampled_from(KINDS), json_values, st.data())
def test_json_of_another_shape_is_refused(kind: type[Message], value: object, data: object) -> None:
    names = list(kind.__annotations__)
    assert isinstance(data, st.DataObject)
    for payload in (value, {name: data.draw(json_values) for name in names}):
        try:
            message = unpack(Frame(kind.TYPE, 1, json.dumps(payload).encode()))
        except WireError:
            continue
        assert unpack(Frame(kind.TYPE, 1, pack(message, 1)[10:])) == message


@unhurried
@given(any_message(), u32)
def test_messages_survive(message: Message, id: int) -> None:
    (frame,) = Decoder().feed(pack(message, id))
    assert frame.id == id
    assert frame.type < BULK
    assert unpack(frame) == message


HELLO = {"protocol": 1, "data_path": "/", "engine_socket": "/run/docker.sock"}


@pytest.mark.parametrize(
    ("kind", "payload", "complaint"),
    [
        (Hello, HELLO | {"protocol": True}, "protocol of Hello is not an integer"),
        (Hello, HELLO | {"protocol": 1.0}, "protocol of Hello is not an integer"),
        (Hello, HELLO | {"protocol": 2**63}, "64 bits"),
        (Hello, HELLO | {"data_path": None}, "data_path of Hello is not a string"),
        (Hello, HELLO | {"data_path": "\ud800"}, "data_path of Hello"),
        (Hello, HELLO | {"self": 1}, "unknown fields: self"),
        (Hello, {"protocol": 1}, "missing or unknown fields: data_path, engine_socket"),
        (Done, {"x": 1}, "unknown fields: x"),
        (Done, [], "not a JSON object"),
        (Done, None, "not a JSON object"),
        (ClockSet, {"time_s": float("nan"), "threshold_s": 1}, "time_s of ClockSet is not finite"),
        (ClockSet, {"time_s": float("inf"), "threshold_s": 1}, "not finite"),
        (ClockSet, {"time_s": 10**400, "threshold_s": 1}, "time_s of ClockSet"),
        (ClockSet, {"time_s": "0", "threshold_s": 1}, "not a number"),
        (ClockReport, {"offset_s": 0, "corrected": 0}, "not true or false"),
        (TrimReport, {"trimmed_bytes": "1"}, "not an integer"),
    ],
)
def test_a_wrong_field_is_named(kind: type[Message], payload: object, complaint: str) -> None:
    with pytest.raises(WireError, match=complaint):
        unpack(Frame(kind.TYPE, 1, json.dumps(payload).encode()))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{",
        b"\xff",
        "{}".encode("utf-16"),
        b"[" * MAX_PAYLOAD_BYTES,
        b'{"a":' * 50_000,
        b"9" * MAX_PAYLOAD_BYTES,
        b"{} {}",
    ],
    ids=["empty", "half", "no UTF-8", "UTF-16", "deep list", "deep object", "digits", "two"],
)
def test_what_is_no_json_is_refused(payload: bytes) -> None:
    with pytest.raises(WireError, match="Done is not"):
        unpack(Frame(Done.TYPE, 1, payload))


def test_unknown_types_and_flags_are_refused() -> None:
    with pytest.raises(WireError, match="unknown type 0x7f"):
        unpack(Frame(0x7F, 1, b"{}"))
    with pytest.raises(WireError, match="unknown flags 0x01"):
        unpack(Frame(Done.TYPE, 1, b"{}", 1))


def test_two_messages_cannot_have_one_type() -> None:
    with pytest.raises(TypeError, match="Failure have one type"):
        type("Twin", (Message,), {"TYPE": Failure.TYPE, "__annotations__": {}})


def test_a_whole_number_is_a_float_field_s_float() -> None:
    report = ClockReport(offset_s=1, corrected=False)
    assert type(report.offset_s) is float
    assert report != Done()
    assert repr(report) == "ClockReport(offset_s=1.0, corrected=False)"


def test_health_fits_many_times_into_a_frame() -> None:
    values = {name: 2**62 for name, text in HealthReport.__annotations__.items() if text != "str"}
    report = HealthReport(**values, engine_version="28.5.2", engine_problem="x" * 1000)
    assert len(pack(report, 1)) < 2000
