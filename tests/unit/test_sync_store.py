"""What is remembered: the ancestor, what is pending, what is kept; and whether to go on."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import IO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sync_pair import scratch
from sync_trees import FIFO, text, tree

from wherry.core.errors import WherryError
from wherry.sync.core.keep import Keep
from wherry.sync.core.reconcile import GUEST, HOST
from wherry.sync.core.recover import Pending, recover
from wherry.sync.core.safety import Halt, check
from wherry.sync.core.store import Store, Withheld
from wherry_sync.diff import diff
from wherry_sync.entry import Entry, updated, walk

names = st.sampled_from(["a", "b", "0", "a b", "é", "a.b"])
trees = st.recursive(
    st.sampled_from(["1", "2*", "->x"]),
    lambda inner: st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
).map(tree)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    found = Store(tmp_path / "sync.db", 1)
    yield found
    found.close()


@given(st.lists(trees, min_size=1, max_size=4))
@settings(deadline=None, max_examples=30)
def test_the_ancestor_comes_back(
    versions: list[Entry | None],
) -> None:
    place = scratch()
    path = place / "sync.db"
    store, other = Store(path, 1), Store(path, 2)
    old: Entry | None = None
    for new in versions:
        changes = diff(old, new)
        assert updated(old, changes) == new
        store.commit(changes)
        old = new
    store.close()
    store = Store(path, 1)
    assert store.load() == old
    assert other.load() is None
    store.close()
    other.close()
    shutil.rmtree(place)


def test_pending_keeps_the_first_before_and_the_last_after(store: Store) -> None:
    store.begin({"f": (text("1"), text("2"))})
    ticket = store.ticket()
    store.begin({"f": (text("2"), None), "g": (None, text("3"))})
    wanted = {"f": Pending(text("1"), None), "g": Pending(None, text("3"))}
    assert store.pending(HOST) == store.pending(GUEST) == wanted
    # What was decided after the flush had begun stays pending, and what was there then is certain.
    store.confirm(GUEST, ticket)
    assert store.pending(GUEST) == {**wanted, "f": Pending(text("2"), None)}
    store.confirm(GUEST, store.ticket())
    assert store.pending(GUEST) == {}
    assert store.pending(HOST) == wanted


def test_a_side_that_ended_in_order_has_lost_nothing(store: Store) -> None:
    store.meet(("h1", "g1"), (7, 8), {})
    assert (store.boot(GUEST), store.device(GUEST)) == ("g1", (8, "g1"))
    store.begin({"f": (None, text("2"))})
    store.part(GUEST, store.ticket())
    assert (store.boot(GUEST), store.device(GUEST)) == ("", (8, "g1"))
    assert store.pending(GUEST) == {}
    assert store.boot(HOST) == "h1"


def test_what_was_begun_is_on_the_disk(tmp_path: Path, store: Store) -> None:
    store.begin({"f": (None, text("2"))})
    copy = tmp_path / "copy.db"
    for suffix in ("", "-wal"):
        copy.with_name(f"copy.db{suffix}").write_bytes((tmp_path / f"sync.db{suffix}").read_bytes())
    after = Store(copy, 1)
    assert after.pending(GUEST) == {"f": Pending(None, text("2"))}
    after.close()


@pytest.fixture
def other(tmp_path: Path, store: Store) -> Iterator[Store]:
    found = Store(tmp_path / "sync.db", 2)
    yield found
    found.close()


def test_what_is_remembered_goes_with_the_files(store: Store, other: Store) -> None:
    store.commit(diff(None, tree({"a": {"in": {"f": "1"}, "in0": "2"}, "in": "3"})))
    store.meet(("h1", "g1"), (7, 8), {})
    store.identify(HOST, 5)
    store.begin({"a/in/f": (text("0"), text("1")), "in": (None, text("3"))}, {"a/in/f": GUEST})
    other.take(1, "a/in", "")
    assert other.load() == tree({"f": "1"})
    assert store.load() == tree({"a": {"in0": "2"}, "in": "3"})
    assert other.pending(HOST) == other.pending(GUEST) == {"f": Pending(text("0"), text("1"))}
    assert other.carried() == [("f", GUEST, text("1"))]
    assert set(store.pending(HOST)) == {"in"}
    assert (other.boot(GUEST), other.device(GUEST)) == ("g1", (8, "g1"))
    # What is the outer root's alone is not the inner one's.
    assert other.inode(HOST) is None
    other.meet(("h1", "g2"), (7, 8), {"f": text("4")})
    other.take(1, "a/in", "")
    store.take(2, "", "a/in")
    assert other.load() is None
    assert other.pending(HOST) == {}
    assert store.load() == tree({"a": {"in": {"f": "4"}, "in0": "2"}, "in": "3"})
    assert set(store.pending(GUEST)) == {"a/in/f", "in"}
    # Either has lost power, and it is not known which.
    assert (store.boot(HOST), store.boot(GUEST) in ("", "g1", "g2")) == ("h1", False)


def test_what_is_taken_over_holds_for_the_copies_that_it_was_known_of(
    store: Store, other: Store, tmp_path: Path
) -> None:
    assert (store.copies(), other.copies()) == ([1], [2])
    for number in (3, 4):
        with closing(Store(tmp_path / "sync.db", number)) as third:
            third.commit(diff(None, tree({"f": "1"})))
    store.take(3, "", "a")
    assert store.copies() == [3]
    store.take(4, "", "b")
    assert store.copies() == [3, 4]
    store.meet(("h1", "g1"), (7, 8), {})
    assert store.copies() == [1]
    other.commit(diff(None, tree({"f": "1"})))
    store.take(2, "", "c")
    assert store.copies() == [1, 2]
    # Handed on before its own copy was seen, and then forgotten.
    other.take(1, "a", "")
    assert other.copies() == [1, 2]
    other.forget()
    assert other.copies() == [2]
    # What nothing is taken from says nothing.
    other.take(1, "a", "")
    assert other.copies() == [2]


def test_what_a_root_in_another_one_knows_is_all_that_is_known(store: Store, other: Store) -> None:
    other.commit(diff(None, tree({"f": "1"})))
    store.take(2, "", "a/in")
    assert store.load() == tree({"a": {"in": {"f": "1"}}})


@pytest.mark.parametrize("inward", [False, True])
def test_what_two_roots_remember_is_forgotten(store: Store, other: Store, inward: bool) -> None:
    """Which of them had it last cannot be told."""
    store.commit(diff(None, tree({"in": {"f": "1"}, "g": "1"})))
    other.commit(diff(None, tree({"f": "2", "h": "2"})))
    if inward:
        other.take(1, "in", "")
    else:
        store.take(2, "", "in")
    assert (store.load(), other.load()) == (tree({"g": "1"}), None)


def test_a_root_that_is_forgotten_has_lost_power_all_the_same(store: Store) -> None:
    store.meet(("h1", "g1"), (7, 8), diff(None, tree({"f": "1"})))
    store.begin({"f": (None, text("2"))})
    store.forget()
    assert (store.load(), store.pending(HOST), store.device(HOST)[0]) == (None, {}, None)
    assert store.boot(GUEST) == "g1"


@pytest.mark.parametrize("number", range(10))
def test_several_roots_may_begin_at_once(tmp_path: Path, number: int) -> None:
    """As those of a new machine's first container do."""
    ready = threading.Barrier(4)
    failures: list[BaseException] = []

    def begin(root: int) -> None:
        ready.wait(10)
        try:
            Store(tmp_path / "sync.db", root).close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=begin, args=[root]) for root in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


WITHHELD = Withheld(text("1"), b"1 2", text("2"))


def test_what_is_withheld_is_remembered(tmp_path: Path) -> None:
    path = tmp_path / "sync.db"
    with closing(Store(path, 1)) as store:
        store.withhold({"f": WITHHELD, "g": Withheld(None, b"")}, written=False)
    with closing(Store(path, 1)) as store, closing(Store(path, 2)) as other:
        assert store.withheld() == {"f": WITHHELD, "g": Withheld(None, b"")}
        assert (store.written(), other.written(), other.withheld()) == (False, None, {})
        store.withhold({"f": None, "g": WITHHELD}, written=True)
        assert (store.withheld(), store.written()) == ({"g": WITHHELD}, True)
        # What is owed is so all the same.
        store.forget()
        assert (store.withheld(), store.written()) == ({}, True)


@pytest.mark.parametrize("owes", [None, 1, 2])
def test_what_is_withheld_goes_along(tmp_path: Path, owes: int | None) -> None:
    path = tmp_path / "sync.db"
    with (
        closing(Store(path, 1)) as one,
        closing(Store(path, 2)) as two,
        closing(Store(path, 3)) as outer,
    ):
        for number, store in enumerate((one, two), 1):
            store.commit(diff(None, tree({"f": "1"})))
            store.withhold({"f": WITHHELD}, written=number == owes)
        outer.take(1, "", "a")
        outer.take(2, "", "b")
        assert outer.withheld() == {"a/f": WITHHELD, "b/f": WITHHELD}
        assert (outer.written(), one.withheld()) == (owes is not None, {})
        two.withhold({}, written=False)
        two.take(3, "b", "")
        assert (two.withheld(), outer.withheld()) == ({"f": WITHHELD}, {"a/f": WITHHELD})
        assert two.written() is (owes is not None)


@pytest.mark.parametrize("remembered", [False, True])
def test_what_is_owed_goes_along_though_nothing_else_does(tmp_path: Path, remembered: bool) -> None:
    path = tmp_path / "sync.db"
    with closing(Store(path, 1)) as outer, closing(Store(path, 2)) as inner:
        outer.withhold({}, written=True)
        if remembered:
            for store, found in ((outer, {"in": {"f": "1"}}), (inner, {"f": "1"})):
                store.commit(diff(None, tree(found)))
            inner.withhold({}, written=False)
        inner.take(1, "in", "")
        assert inner.written() is True


def test_what_is_withheld_goes_along_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "sync.db"
    with closing(Store(path, 1)) as outer, closing(Store(path, 2)) as inner:
        outer.withhold({"in/f": WITHHELD}, written=False)
        inner.take(1, "in", "")
        assert (inner.withheld(), inner.written()) == ({"f": WITHHELD}, False)


@pytest.mark.parametrize("version", [1, 2, 3, 4, 5])
def test_a_file_of_an_earlier_release_is_read(tmp_path: Path, version: int) -> None:
    path = tmp_path / "sync.db"
    with closing(Store(path, 1)) as store:
        store.meet(("h1", "g1"), (7, 8), diff(None, tree({"f": "1"})))
    with closing(sqlite3.connect(path)) as database:
        database.executescript("DROP TABLE withheld; DROP TABLE written")
        if version < 5:
            database.execute("ALTER TABLE side DROP COLUMN inode")
        if version < 4:
            database.execute("DROP TABLE copies")
        if version < 3:
            database.execute("ALTER TABLE side DROP COLUMN device_boot")
        if version == 1:
            database.execute("ALTER TABLE pending DROP COLUMN origin")
        database.execute(f"PRAGMA user_version = {version}")
    with closing(Store(path, 1)) as store:
        assert store.load() == tree({"f": "1"})
        assert (store.boot(HOST), store.device(HOST)) == ("h1", (7, "h1" if version > 2 else ""))
        assert store.copies() == [1]
        # Who had written was not told.
        assert (store.written(), store.withheld()) == (True, {})
        store.begin({"f": (None, text("2"))}, {"f": HOST})
        store.meet(("h2", "g2"), (9, 8), {})
        assert (store.device(HOST), store.inode(HOST)) == ((9, "h2"), None)
        store.identify(HOST, 2**64 - 1)
        store.meet(("h2", "g2"), (9, 8), {})
        assert (store.inode(HOST), store.inode(GUEST)) == (2**64 - 1, None)


def test_a_file_of_another_release_or_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "later.db"
    Store(path, 1).close()
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(WherryError, match="another release"):
        Store(path, 1)
    (tmp_path / "no.db").write_bytes(b"not a database" * 100)
    with pytest.raises(WherryError, match="cannot be read"):
        Store(tmp_path / "no.db", 1)


# Safety, 48

TWO = tree({"a": "1", "b": "1"})


@pytest.mark.parametrize(
    ("ancestor", "found", "changed", "halt"),
    [
        (TWO, TWO, {}, None),
        (None, None, {}, None),
        (TWO, None, {}, Halt.VANISHED),
        (TWO, text("1"), {}, Halt.KIND),
        (text("1"), tree({}), {}, Halt.KIND),
        (TWO, tree({}), {}, Halt.EMPTIED),
        (TWO, tree({"fifo": FIFO}), {}, Halt.EMPTIED),
        (TWO, tree({"c": "1"}), {}, None),
        (tree({"a": "1"}), tree({}), {}, None),
        (tree({"d": {"a": "1", "b": "1"}}), tree({}), {}, None),
        # 51: what a container does is real, and goes to the trash.
        (TWO, tree({}), {"may_empty": True}, None),
        (TWO, None, {"may_empty": True}, Halt.VANISHED),
        (TWO, TWO, {"device": 2}, Halt.DEVICE),
        (TWO, tree({}), {"device": 2}, Halt.DEVICE),
        (TWO, TWO, {"known_device": None}, None),
        # The system has given it another number.
        (TWO, tree({"a": "2", "c": "3"}), {"device": 2, "rebooted": True}, None),
        (text("1"), text("2"), {"device": 2, "rebooted": True}, None),
        (tree({}), TWO, {"device": 2, "rebooted": True}, None),
        # Not all that was below it when the disk was mounted there is the disk.
        (TWO, tree({"c": "1"}), {"device": 2, "rebooted": True}, Halt.DEVICE),
        (tree({"a": "1"}), tree({}), {"device": 2, "rebooted": True}, Halt.DEVICE),
        (tree({"a": "1"}), tree({"a": FIFO}), {"device": 2, "rebooted": True}, Halt.DEVICE),
        (TWO, tree({}), {"device": 2, "rebooted": True, "may_empty": True}, Halt.DEVICE),
        # Another one that has something of it, as after a new clone.
        (TWO, tree({"a": "2", "c": "3"}), {"replaced": True}, None),
        (tree({}), TWO, {"replaced": True}, None),
        (TWO, tree({"c": "1"}), {"replaced": True}, Halt.REPLACED),
        (tree({"a": "1"}), tree({}), {"replaced": True}, Halt.REPLACED),
    ],
)
def test_what_must_not_be_believed(
    ancestor: Entry | None, found: Entry | None, changed: dict[str, object], halt: Halt | None
) -> None:
    facts: dict[str, object] = {
        "device": 1,
        "known_device": 1,
        "rebooted": False,
        "replaced": False,
        "may_empty": False,
    }
    facts |= changed
    assert check(ancestor, found, **facts) is halt  # type: ignore[arg-type]


# Losses of power

BOTH = Pending(text("1"), text("2"))


@pytest.mark.parametrize(
    ("host", "guest", "pending", "wanted"),
    [
        # The guest has what was decided on, or what the ancestor says.
        ("2", "2", BOTH, {}),
        # It is old, empty or gone: nobody's edit, so the host's is put there.
        ("2", "1", BOTH, {"f": "1"}),
        ("2", "", BOTH, {"f": ""}),
        ("2", None, BOTH, {"f": None}),
        # It is something else: both are kept, the host's in place.
        ("2", "torn", BOTH, {"f": None}),
        # A deleted file came back.
        (None, "1", Pending(text("1"), None), {"f": "1"}),
        # Not pending, so it was on the disk; the contents are not believed all the same.
        ("2", "other", None, {"f": None}),
        ("2", "", None, {"f": ""}),
        # A deletion is believed: a file that is on the disk does not go away by itself.
        ("2", None, None, {}),
    ],
)
def test_what_a_guest_lost_is_not_an_edit(
    host: str | None, guest: str | None, pending: Pending | None, wanted: dict[str, str | None]
) -> None:
    after = None if pending is not None and pending.after is None else "2"
    changes = recover(
        tree({"f": after}),
        tree({"f": host}),
        tree({"f": guest}),
        host_lost=None,
        guest_lost={} if pending is None else {"f": pending},
    )
    assert changes == {path: tree(value) for path, value in wanted.items()}


def test_a_decision_that_was_not_carried_out_everywhere_is_not_undone() -> None:
    # The guest's edit "2" was to go to the host; the guest has it on its disk.
    changes = recover(
        tree({"f": "1"}), tree({"f": "1"}), tree({"f": "2"}), host_lost=None, guest_lost={"f": BOTH}
    )
    assert changes == {}


@pytest.mark.parametrize(("host", "wanted"), [("1", "1"), ("", ""), (None, None)])
def test_a_host_that_lost_power_gets_the_guests(host: str | None, wanted: str | None) -> None:
    trees = tree({"f": "2"}), tree({"f": host}), tree({"f": "2"})
    changes = recover(*trees, host_lost={"f": BOTH}, guest_lost=None)
    assert changes == {"f": tree(wanted)}
    # The guest has it, so that it lost power as well makes no difference.
    assert recover(*trees, host_lost={"f": BOTH}, guest_lost={"f": BOTH}) == changes


@pytest.mark.parametrize("ancestor", ["1", "2"])
def test_what_a_host_has_that_lost_power_may_be_torn_and_the_guests_is_kept(ancestor: str) -> None:
    # Whether the round was written down or not.
    trees = tree({"f": ancestor}), tree({"f": "3"}), tree({"f": "2"})
    changes = recover(*trees, host_lost={"f": BOTH}, guest_lost=None)
    assert changes == {"f": None}
    assert recover(*trees, host_lost={"f": BOTH}, guest_lost={"f": BOTH}) == changes
    # What was on the host's disk is believed.
    assert recover(*trees, host_lost={}, guest_lost=None) == {}


# What is kept


def test_kept_files_are_bounded_and_the_oldest_go(tmp_path: Path) -> None:
    keep = Keep(tmp_path / "trash", limit_bytes=10, limit_files=3)
    for number in range(5):
        assert keep.save(f"f{number}", text("1234"), [b"12", b"34"])
    assert [kept.path for kept in keep] == ["f3", "f4"]
    assert b"".join(keep.open(next(iter(keep)))) == b"1234"
    for number in range(5):
        keep.save(f"g{number}", text("1"), [b"1"])
    assert [kept.path for kept in keep] == ["g2", "g3", "g4"]
    keep.close()
    again = Keep(tmp_path / "trash")
    assert [kept.path for kept in again] == ["g2", "g3", "g4"]
    assert len(list((tmp_path / "trash").iterdir())) == 4
    again.close()


def test_a_file_above_the_bound_is_kept_beside_the_others_until_the_next(tmp_path: Path) -> None:
    keep = Keep(tmp_path / "trash", limit_bytes=10, limit_files=3)

    def kept_with(name: str, contents: str) -> list[str]:
        keep.save(name, text(contents), [contents.encode()])
        return [kept.path for kept in keep]

    assert kept_with("large", "x" * 50) == ["large"]
    assert kept_with("a", "1234") == ["a"]
    assert kept_with("b", "1234") == ["a", "b"]
    assert kept_with("large", "x" * 50) == ["a", "b", "large"]
    assert kept_with("larger", "x" * 90) == ["a", "b", "larger"]
    assert kept_with("c", "1234") == ["b", "c"]
    keep.close()


def test_the_same_is_kept_once_and_the_wrong_not_at_all(tmp_path: Path) -> None:
    keep = Keep(tmp_path / "conflicts")
    assert keep.save("f", text("1"), [b"1"])
    assert keep.save("f", text("1"), [b"1"])
    assert not keep.save("f", text("2"), [b"3"])
    assert len(list(keep)) == 1
    keep.close()


def test_the_index_does_not_grow_with_what_is_gone(tmp_path: Path) -> None:
    keep = Keep(tmp_path / "conflicts")
    for number in range(500):
        keep.save("f", text(str(number)), [str(number).encode()])
        keep.drop("f", text(str(number - 1)))
    assert len((tmp_path / "conflicts" / "index").read_text().splitlines()) < 110
    keep.close()
    again = Keep(tmp_path / "conflicts")
    assert [(kept.number, b"".join(again.open(kept))) for kept in again] == [(500, b"499")]
    again.close()


def test_what_is_kept_again_counts_as_new_unless_it_is_the_same_event(tmp_path: Path) -> None:
    keep = Keep(tmp_path / "conflicts")
    keep.save("f", text("1"), [b"1"])
    keep.save("f", text("1"), [], again=True)
    assert [kept.number for kept in keep] == [1]
    keep.save("f", text("1"), [])
    for opened in (keep, Keep(tmp_path / "conflicts")):
        (kept,) = opened
        assert (kept.number, opened.last) == (2, 2)
        assert b"".join(opened.open(kept)) == b"1"
        opened.close()


def test_a_file_is_taken_whatever_it_is_called(tmp_path: Path) -> None:
    keep = Keep(tmp_path / "trash")
    (tmp_path / "t-1").write_text("1")
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        keep.take(fd, "t-1", "../../CON/\n", text("1"))
    finally:
        os.close(fd)
    (kept,) = keep
    assert kept.path == "../../CON/\n"
    assert b"".join(keep.open(kept)) == b"1"
    assert not (tmp_path / "t-1").exists()
    keep.close()


def test_a_torn_index_costs_its_last_line(tmp_path: Path) -> None:
    keep = Keep(tmp_path / "trash")
    keep.save("f", text("1"), [b"1"])
    keep.close()
    with (tmp_path / "trash" / "index").open("a") as index:
        index.write('{"number": 2, "pa')
    (tmp_path / "trash" / "9").write_text("rubbish")
    again = Keep(tmp_path / "trash")
    assert [kept.path for kept in again] == ["f"]
    assert not (tmp_path / "trash" / "9").exists()
    again.close()


def test_a_diff_lists_what_is_below_too() -> None:
    old, new = tree({"d": {"e": {"f": "1"}}, "g": "1"}), tree({"d": "2", "g": "1"})
    assert diff(old, new) == {"d": text("2"), "d/e": None, "d/e/f": None}
    assert {path for path, _ in walk(old)} == {"", "d", "d/e", "d/e/f", "g"}


@pytest.mark.parametrize("failure", [OSError("the connection was cut"), KeyboardInterrupt()])
def test_what_came_in_half_is_not_kept_and_comes_again(
    tmp_path: Path, failure: BaseException
) -> None:
    """A crash, or a connection that is cut: half a file must not pass for the whole one."""

    def half() -> Iterator[bytes]:
        yield b"hal"
        raise failure

    keep = Keep(tmp_path / "conflicts")
    leaf = text("half and half")
    with pytest.raises(type(failure)):
        keep.save("f", leaf, half())
    keep.close()
    again = Keep(tmp_path / "conflicts")
    assert list(again) == []
    assert again.save("f", leaf, [b"half and half"])
    (kept,) = again
    assert b"".join(again.open(kept)) == b"half and half"
    again.close()


def test_what_was_copied_in_half_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another filesystem a file is copied, and that can end half-way."""

    def torn(source: object, target: IO[bytes]) -> None:
        target.write(b"tor")
        raise KeyboardInterrupt

    def across(*arguments: object, **options: object) -> None:
        raise OSError(errno.EXDEV, "another filesystem")

    keep = Keep(tmp_path / "trash")
    (tmp_path / "f").write_bytes(b"torn")
    fd = os.open(tmp_path, os.O_RDONLY)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", torn)
        patch.setattr(os, "rename", across)
        with pytest.raises(KeyboardInterrupt):
            keep.take(fd, "f", "f", text("torn"))
    os.close(fd)
    keep.close()
    again = Keep(tmp_path / "trash")
    assert list(again) == []
    again.close()
