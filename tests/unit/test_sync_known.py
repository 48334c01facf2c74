"""What a scanner knows takes little memory, and does what dictionaries do."""

from __future__ import annotations

import sys

from hypothesis import given
from hypothesis import strategies as st

from wherry_sync.known import NEVER, Notes, Records
from wherry_sync.records import INODE, STATUS

NAMES = st.sampled_from(["", "a", "b", "é", "z", "\udce4", "a.txt"])
RECORDS = st.one_of(
    st.binary(min_size=STATUS.size, max_size=STATUS.size),
    st.binary(min_size=INODE.stop, max_size=INODE.stop),
    st.binary(min_size=8, max_size=8),
)


@given(st.dictionaries(NAMES, RECORDS), st.lists(NAMES))
def test_they_are_those_of_a_dictionary(known: dict[str, bytes], forgotten: list[str]) -> None:
    found = Records(known)
    for name in forgotten:
        known.pop(name, None)
        found.forget(name)
    assert found.unpacked() == known
    for name in ("", "a", "aa", "b", "é", "z", "zz", "\udce4", "a.txt"):
        assert found.get(name) == known.get(name, NEVER)
    assert Records(found.unpacked()).unpacked() == known


def test_one_that_is_known_by_identity_stays_that_object() -> None:
    marker = bytes(7)
    found = Records({"a": marker})
    assert found.get("a") is found.unpacked()["a"] is marker


def test_a_record_of_a_file_takes_little_more_than_its_bytes() -> None:
    known = {f"file-{number}.py": bytes(STATUS.size) for number in range(1000)}
    found = Records(known)
    size = sum(sys.getsizeof(getattr(found, each)) for each in Records.__slots__)
    assert size < 1000 * (STATUS.size + 9) + 500


PATHS = st.sampled_from(["a", "b", "d/a", "d/é", "d/e/a", "d/e/b", "e/a"])
NOTED = st.tuples(st.binary(min_size=STATUS.size, max_size=STATUS.size), st.binary(max_size=50))


@given(
    st.lists(st.tuples(PATHS, st.one_of(st.none(), NOTED))),
    st.booleans(),
)
def test_notes_are_those_of_a_dictionary(
    steps: list[tuple[str, tuple[bytes, bytes] | None]], cleared: bool
) -> None:
    notes, expected = Notes(), dict[str, tuple[bytes, bytes]]()
    for path, noted in steps:
        if noted is None:
            assert notes.pop(path) == expected.pop(path, None)
        else:
            notes.put(path, *noted)
            expected[path] = noted
    if cleared:
        notes.clear()
        expected.clear()
    for path in ("e/a", "d/e/b", "a", "d/a", "d/e/a", "b", "d/é"):
        assert notes.pop(path) == expected.pop(path, None)
        assert notes.pop(path) is None
