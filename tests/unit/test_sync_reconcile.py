"""The table of decisions, case by case, and what holds for all trees."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sync_trees import FIFO, text, tree

from wherry.sync.core.plan import parts, plan
from wherry.sync.core.reconcile import GUEST, HOST, IN_THE_WAY, Agreement, Reconciliation, reconcile
from wherry.sync.core.traits import Traits
from wherry_sync.entry import (
    EMPTY,
    IGNORED,
    Directory,
    Entry,
    Leaf,
    is_file,
    is_untracked,
    lookup,
    problem,
    tracked,
    updated,
    walk,
)
from wherry_sync.operation import Operation

UNREADABLE = problem("permission denied")
MACOS = Traits(case_sensitive=False)
WINDOWS = Traits(case_sensitive=False, windows_names=True, links=False, executable=False)


def carry_out(found: Reconciliation, host: Entry | None, guest: Entry | None) -> list[Entry | None]:
    """Return both trees after their operations, which are checked against what is there."""
    sides = []
    for side, before in ((0, host), (1, guest)):
        now = before
        todo = plan(found.decisions, lambda d, side=side: (d.host, d.guest)[side])  # type: ignore[misc]
        for operation in (*todo.operations, *todo.builds):
            there = lookup(now, operation.path)
            if isinstance(operation.before, Directory):
                assert isinstance(there, Directory), operation
                # What is not tracked may stay in a directory that was to go, else nothing may.
                if operation.after is None and there.children:
                    assert all(is_untracked(child) for child in there.children.values()), operation
                    continue
                assert isinstance(operation.after, Directory) or not there.children, operation
            else:
                assert there == operation.before, operation
            parent = lookup(now, operation.path.rpartition("/")[0])
            assert isinstance(parent, Directory) or operation.path == "", operation
            now = updated(now, {operation.path: operation.after})
        sides.append(now)
    return sides


def after(found: Reconciliation, ancestor: Entry | None) -> Entry | None:
    """Return the ancestor afterwards."""
    changes = dict(found.ancestor)
    changes.update({decision.path: decision.result for decision in found.decisions})
    return updated(ancestor, changes)


# name: (ancestor, host, guest, both afterwards, what of the guest's is saved)
CASES: dict[str, tuple[object, object, object, object, Mapping[str, object]]] = {
    "nothing changed": ({"f": "1"}, {"f": "1"}, {"f": "1"}, {"f": "1"}, {}),
    "1 new on the host": ({}, {"f": "1"}, {}, {"f": "1"}, {}),
    "2 new in the guest": ({}, {}, {"d": {"f": "1"}}, {"d": {"f": "1"}}, {}),
    "3 edited on the host": ({"f": "1"}, {"f": "2"}, {"f": "1"}, {"f": "2"}, {}),
    "3 edited in the guest": ({"f": "1"}, {"f": "1"}, {"f": "2"}, {"f": "2"}, {}),
    "4 deleted on the host": ({"f": "1"}, {}, {"f": "1"}, {}, {}),
    "4 deleted in the guest": ({"d": {"f": "1"}}, {"d": {"f": "1"}}, {}, {}, {}),
    "5 the same edit": ({"f": "1"}, {"f": "2"}, {"f": "2"}, {"f": "2"}, {}),
    "both deleted": ({"d": {"f": "1"}}, {}, {}, {}, {}),
    "6 different edits": ({"f": "1"}, {"f": "2"}, {"f": "3"}, {"f": "2"}, {"f": "3"}),
    "both new and different": ({}, {"f": "2"}, {"f": "3"}, {"f": "2"}, {"f": "3"}),
    "7 deleted on the host, edited": ({"f": "1"}, {}, {"f": "2"}, {"f": "2"}, {}),
    "7 edited, deleted in the guest": ({"f": "1"}, {"f": "2"}, {}, {"f": "2"}, {}),
    "7 deleted, made executable": ({"f": "1"}, {}, {"f": "1*"}, {"f": "1*"}, {}),
    "8 the host deletes a directory, the guest adds inside": (
        {"d": {"f": "1", "e": {"g": "1"}, "k": {}}},
        {},
        {"d": {"f": "1", "e": {"g": "1", "new": "2"}, "k": {}}},
        {"d": {"e": {"new": "2"}}},
        {},
    ),
    "8 the guest deletes a directory, the host edits inside": (
        {"d": {"f": "1", "g": "1"}},
        {"d": {"f": "2", "g": "1"}},
        {},
        {"d": {"f": "2"}},
        {},
    ),
    "9 both delete part of a directory": (
        {"d": {"f": "1", "g": "1", "h": "1"}},
        {"d": {"g": "1", "h": "1"}},
        {"d": {"f": "1", "h": "1"}},
        {"d": {"h": "1"}},
        {},
    ),
    "9 one deletes all of it, one a part": (
        {"d": {"f": "1", "g": "1"}},
        {},
        {"d": {"g": "1"}},
        {},
        {},
    ),
    "10 file to directory": ({"p": "1"}, {"p": {"f": "2"}}, {"p": "1"}, {"p": {"f": "2"}}, {}),
    "10 directory to file": (
        {"p": {"f": "1", "e": {"g": "1"}}},
        {"p": {"f": "1", "e": {"g": "1"}}},
        {"p": "2"},
        {"p": "2"},
        {},
    ),
    "10 file to link": ({"p": "1"}, {"p": "->x"}, {"p": "1"}, {"p": "->x"}, {}),
    "11 file to directory, edited": (
        {"p": "1"},
        {"p": {"f": "2"}},
        {"p": "3"},
        {"p": {"f": "2"}},
        {"p": "3"},
    ),
    "11 edited, file to directory": (
        {"p": "1"},
        {"p": "3"},
        {"p": {"f": "2", "e": {"g": "4"}}},
        {"p": "3"},
        {"p/f": "2", "p/e/g": "4"},
    ),
    "a directory became a file, the other end deleted inside": (
        {"p": {"f": "1", "g": "1"}},
        {"p": "2"},
        {"p": {"f": "1"}},
        {"p": "2"},
        {},
    ),
    "a directory became a file, the other end added inside": (
        {"p": {"f": "1"}},
        {"p": "2"},
        {"p": {"f": "1", "new": "3"}},
        {"p": "2"},
        {"p/new": "3"},
    ),
    "a directory became a file, the other end deleted it": (
        {"p": {"f": "1"}}, {"p": "2"}, {}, {"p": "2"}, {},
    ),
    "12 no ancestor, equal trees": (
        None, {"d": {"f": "1"}, "l": "->f"}, {"d": {"f": "1"}, "l": "->f"},
        {"d": {"f": "1"}, "l": "->f"}, {},
    ),
    "no ancestor, different trees": (
        None, {"a": "1", "d": {"x": "1"}}, {"b": "1", "d": {"y": "1"}},
        {"a": "1", "b": "1", "d": {"x": "1", "y": "1"}}, {},
    ),
    "13 executable on one side, edited on the other": (
        {"f": "1"}, {"f": "1*"}, {"f": "2"}, {"f": "2*"}, {},
    ),
    "13 the other way round": ({"f": "1*"}, {"f": "2*"}, {"f": "1"}, {"f": "2"}, {}),
    "executable bit and a conflict": (
        {"f": "1"},
        {"f": "2"},
        {"f": "3*"},
        {"f": "2*"},
        {"f": "3*"},
    ),
    "both new, one executable": ({}, {"f": "1"}, {"f": "1*"}, {"f": "1"}, {}),
    "links differ": ({"l": "->a"}, {"l": "->b"}, {"l": "->c"}, {"l": "->b"}, {"l": "->c"}),
    "22 links of all sorts": (
        {}, {},
        {"a": "->/etc/passwd", "b": "->../../x", "c": "->c", "d": "->gone"},
        {"a": "->/etc/passwd", "b": "->../../x", "c": "->c", "d": "->gone"}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_table(case: tuple[object, object, object, object, Mapping[str, object]]) -> None:
    ancestor, host, guest, wanted, saved = case
    found = reconcile(tree(ancestor), tree(host), tree(guest))
    assert carry_out(found, tree(host), tree(guest)) == [tree(wanted), tree(wanted)]
    assert after(found, tree(ancestor)) == tree(wanted)
    assert {d.path: d.saved for d in found.decisions if d.saved} == {
        path: tree(value) for path, value in saved.items()
    }
    assert not found.problems


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("5", "12", "both d"))])
def test_agreement_costs_no_work(name: str) -> None:
    ancestor, host, guest, _, _ = CASES[name]
    assert not reconcile(tree(ancestor), tree(host), tree(guest)).decisions


def test_14_what_is_ignored_keeps_its_directory_without_conflict() -> None:
    ancestor = tree({"d": {"f": "1"}})
    guest = tree({"d": {"f": "1", "cache": IGNORED}})
    found = reconcile(ancestor, tree({}), guest)
    host, husk = carry_out(found, tree({}), guest)
    assert (host, husk) == (tree({}), tree({"d": {"cache": IGNORED}}))
    assert not found.problems
    # The husk is nobody's new directory: it does not come back on the host.
    again = reconcile(after(found, ancestor), host, husk)
    assert len(again) == 0


def test_a_husk_is_a_directory_to_who_has_one() -> None:
    ancestor = tree({"d": {"f": "1"}})
    found = reconcile(ancestor, ancestor, tree({"d": {"cache": IGNORED}}))
    assert carry_out(found, ancestor, None)[0] == tree({"d": {}})


@pytest.mark.parametrize("ancestor", [{}, {"p": "1"}])
def test_untracked_content_is_never_overwritten(ancestor: object) -> None:
    for host, guest in (({"p": FIFO}, {"p": "2"}), ({"p": "2"}, {"p": FIFO})):
        found = reconcile(tree(ancestor), tree(host), tree(guest))
        assert not found.decisions
        assert [(p.path, p.reason) for p in found.problems] == [("p", IN_THE_WAY)]


def test_a_directory_with_ignored_content_is_not_replaced_by_a_file() -> None:
    ancestor = tree({"p": {"f": "1"}})
    host = tree({"p": {"f": "1", "x": IGNORED}})
    found = reconcile(ancestor, host, tree({"p": "2"}))
    assert not found.decisions
    assert found.problems[0].reason == IN_THE_WAY


@pytest.mark.parametrize("other", [{"f": "1"}, {"f": "2"}, {}])
def test_of_a_problem_nothing_is_concluded(other: object) -> None:
    ancestor = tree({"f": "1"})
    for host, guest in (({"f": UNREADABLE}, other), (other, {"f": UNREADABLE})):
        found = reconcile(ancestor, tree(host), tree(guest))
        assert not found.decisions
        assert not found.ancestor
        assert [p.path for p in found.problems] == ["f"]


@pytest.mark.parametrize(
    ("ancestor", "host", "guest", "lacking"),
    [
        ({}, {"f": UNREADABLE}, {}, (GUEST,)),
        ({}, {}, {"f": UNREADABLE}, (HOST,)),
        ({}, {"f": UNREADABLE}, {"f": IGNORED}, (GUEST,)),
        ({"f": "1"}, {"f": UNREADABLE}, {"f": "1"}, (GUEST,)),
        ({"f": "1"}, {"f": "1"}, {"f": UNREADABLE}, (HOST,)),
        ({"f": "1"}, {"f": UNREADABLE}, {"f": "2"}, (HOST, GUEST)),
        ({"f": "1"}, {"f": UNREADABLE}, {}, (HOST, GUEST)),
        ({"f": {"g": "1"}}, {"f": UNREADABLE}, {"f": {"g": "1", "x": IGNORED}}, (GUEST,)),
        ({"f": {"g": "1"}}, {"f": UNREADABLE}, {"f": {}}, (HOST, GUEST)),
        ({"f": {"g": "1"}}, {"f": UNREADABLE}, {"f": {"g": UNREADABLE}}, (HOST, GUEST)),
        ({}, {"f": {"g": UNREADABLE}}, {}, (GUEST,)),
        ({"f": {}}, {}, {"f": {"g": UNREADABLE}}, (HOST,)),
        ({"f": {"g": "1"}}, {}, {"f": {"g": UNREADABLE}}, (HOST, GUEST)),
        ({}, {"f": FIFO}, {"f": "1"}, (HOST,)),
        ({}, {"f": "1"}, {"f": FIFO}, (GUEST,)),
        ({"f": {}}, {"f": "1"}, {"f": {"x": IGNORED}}, (GUEST,)),
    ],
)
def test_a_problem_tells_which_side_lacks_something(
    ancestor: object, host: object, guest: object, lacking: tuple[int, ...]
) -> None:
    found = reconcile(tree(ancestor), tree(host), tree(guest))
    assert {p.lacking for p in found.problems} == {lacking}


def test_what_the_host_cannot_hold_it_lacks() -> None:
    for guest, traits in (
        ({"Foo": "1", "foo": "2"}, MACOS),
        ({"con": "1"}, Traits(windows_names=True)),
        ({"l": "->f"}, Traits(links=False)),
    ):
        found = reconcile(tree({}), tree({}), tree(guest), traits)
        assert [p.lacking for p in found.problems] == [(HOST,)]


def test_a_problem_keeps_its_directory_and_the_rest_goes_on() -> None:
    ancestor = tree({"d": {"f": "1", "g": "1"}, "h": "1"})
    found = reconcile(
        ancestor, tree({"h": "2"}), tree({"d": {"f": UNREADABLE, "g": "1"}, "h": "1"})
    )
    assert {d.path for d in found.decisions} == {"d/g", "h"}
    assert lookup(after(found, ancestor), "d/f") == text("1")


def test_15_of_twins_one_is_on_the_host() -> None:
    guest = tree({"Foo": "1", "foo": "2"})
    found = reconcile(tree({}), tree({}), guest, MACOS)
    assert carry_out(found, tree({}), guest)[0] == tree({"Foo": "1"})
    assert [p.path for p in found.problems] == ["foo"]
    ancestor = after(found, tree({}))
    # What is there stays, whichever comes first in the alphabet.
    found = reconcile(tree({"foo": "2"}), tree({"foo": "2"}), guest, MACOS)
    assert [p.path for p in found.problems] == ["Foo"]
    # Both deleted in the guest: both stay gone.
    found = reconcile(ancestor, tree({"Foo": "1"}), tree({}), MACOS)
    assert carry_out(found, tree({"Foo": "1"}), None)[0] == tree({})
    assert not found.problems


def test_15_a_new_directory_with_twins() -> None:
    guest = tree({"d": {"Foo": {"x": "1"}, "foo": {"y": "1"}}})
    found = reconcile(tree({}), tree({}), guest, MACOS)
    assert carry_out(found, tree({}), guest)[0] == tree({"d": {"Foo": {"x": "1"}}})
    assert [p.path for p in found.problems] == ["d/foo"]


@pytest.mark.parametrize(("old", "new"), [("Foo", "foo"), ({"x": "1"}, {"x": "1"})])
def test_16_another_case_is_a_deletion_and_then_a_creation(old: object, new: object) -> None:
    before, now = {"Foo": "1"}, {"foo": "1"}
    if isinstance(old, dict):
        before, now = {"Foo": old}, {"foo": new}  # type: ignore[dict-item]
    found = reconcile(tree(before), tree(before), tree(now), MACOS)
    todo = plan(found.decisions, lambda d: d.host)
    operations = (*todo.operations, *todo.builds)
    gone = [operation.path.split("/")[0] for operation in operations if operation.after is None]
    assert [operation.path.split("/")[0] for operation in operations] == [
        *gone, *["foo"] * (len(operations) - len(gone)),
    ]  # fmt: skip
    assert set(gone) == {"Foo"}
    assert not found.problems


def test_17_composed_and_decomposed_are_twins_where_the_host_takes_them_for_one() -> None:
    guest = tree({"\u00e9": "1", "e\u0301": "2"})
    assert not reconcile(tree({}), tree({}), guest).problems
    found = reconcile(tree({}), tree({}), guest, MACOS)
    assert len(found.problems) == 1
    assert len(found.decisions) == 1


@pytest.mark.parametrize("name", ["CON", "nul.txt", "a:b", "dot.", "space ", "COM1", "a\nb"])
def test_19_what_windows_cannot_name_stays_in_the_guest(name: str) -> None:
    guest = tree({name: "1", "ok": "1", "d": {name: {"f": "1"}}})
    found = reconcile(tree({}), tree({}), guest, WINDOWS)
    assert carry_out(found, tree({}), guest)[0] == tree({"ok": "1", "d": {}})
    assert {p.path for p in found.problems} == {name, f"d/{name}"}
    assert not reconcile(tree({}), tree({}), guest).problems


def test_links_stay_in_the_guest_where_the_host_has_none() -> None:
    found = reconcile(tree({}), tree({}), tree({"l": "->a", "d": {"l": "->b"}}), WINDOWS)
    assert {p.path for p in found.problems} == {"l", "d/l"}


def test_26_the_executable_bit_survives_an_edit_on_windows() -> None:
    ancestor, host, guest = tree({"f": "1*"}), tree({"f": "1"}), tree({"f": "1*"})
    assert len(reconcile(ancestor, host, guest, WINDOWS)) == 0
    found = reconcile(ancestor, tree({"f": "2"}), guest, WINDOWS)
    assert carry_out(found, tree({"f": "2"}), guest) == [tree({"f": "2"}), tree({"f": "2*"})]
    assert after(found, ancestor) == tree({"f": "2*"})


# What holds for all trees

contents = st.sampled_from(["1", "2", "3", "1*", "2*", "->x", "->y"])
names = st.sampled_from(["a", "b", "c"])
trees = st.recursive(
    contents, lambda inner: st.dictionaries(names, inner, max_size=3), max_leaves=8
)
roots = st.dictionaries(names, trees, max_size=3)


@st.composite
def edited(draw: st.DrawFn) -> tuple[Entry | None, Entry | None, Entry | None]:
    """An ancestor and two trees that have something in common with it."""
    ancestor = tree(draw(roots))
    sides = []
    for _ in range(2):
        changes = draw(
            st.dictionaries(
                st.sampled_from([path for path, _ in walk(ancestor) if path] + ["a", "b", "d"]),
                st.none() | trees,
                max_size=4,
            )
        )
        side: Entry | None = ancestor
        for path, value in changes.items():
            if isinstance(lookup(side, path.rpartition("/")[0]), Directory):
                side = updated(updated(side, {path: None}), {path: tree(value)})
        sides.append(side)
    return ancestor, sides[0], sides[1]


def both_sides_become_equal_and_that_is_the_end_of_it(
    ancestor: Entry | None, host: Entry | None, guest: Entry | None
) -> None:
    found = reconcile(ancestor, host, guest)
    now_host, now_guest = carry_out(found, host, guest)
    assert now_host == now_guest == after(found, ancestor)
    assert len(reconcile(after(found, ancestor), now_host, now_guest)) == 0
    paths = [decision.path for decision in found.decisions]
    assert len(paths) == len(set(paths))


def the_sides_are_treated_alike_but_for_conflicts(
    ancestor: Entry | None, host: Entry | None, guest: Entry | None
) -> None:
    found, mirrored = reconcile(ancestor, host, guest), reconcile(ancestor, guest, host)
    # A guest's directory without files in it has nothing to save.
    conflict = any(d.saved is not None for d in (*found.decisions, *mirrored.decisions))
    if not conflict and not _new_bits_differ(ancestor, host, guest):
        assert after(found, ancestor) == after(mirrored, ancestor)


def _new_bits_differ(ancestor: Entry | None, host: Entry | None, guest: Entry | None) -> bool:
    """Whether both sides have one file anew, executable on one of them; the host decides."""
    for path, mine in walk(host):
        other, base = lookup(guest, path), lookup(ancestor, path)
        if is_file(mine) and is_file(other) and not is_file(base) and mine != other:
            return True
    return False


def no_value_is_lost(ancestor: Entry | None, host: Entry | None, guest: Entry | None) -> None:
    found = reconcile(ancestor, host, guest)
    saved = {(d.path, d.saved) for d in found.decisions if d.saved is not None}
    result, _ = carry_out(found, host, guest)
    for side in (host, guest):
        for path, entry in walk(side):
            base = lookup(ancestor, path)
            if isinstance(entry, Leaf) and entry != base:
                now = lookup(result, path)
                kept = isinstance(now, Leaf) and now[2:] == entry[2:]
                if is_file(entry) and isinstance(base, Leaf) and base[2:] == entry[2:]:
                    # Only its executable bit is new; the contents may be the other side's.
                    kept = isinstance(now, Leaf) and now.executable == entry.executable
                assert kept or (path, entry) in saved, (path, entry)


def what_was_agreed_on_is_skipped_and_nothing_else(
    ancestor: Entry | None, host: Entry | None, guest: Entry | None
) -> None:
    agreement = Agreement()
    first = reconcile(ancestor, host, guest, agreement=agreement)
    assert reconcile(ancestor, host, guest, agreement=agreement) == first
    both, _ = carry_out(first, host, guest)
    base = after(first, ancestor)
    assert len(reconcile(base, both, both, agreement=agreement)) == 0
    assert reconcile(base, host, both, agreement=agreement) == reconcile(base, host, both)


@given(edited())
def test_what_holds_for_all_trees(three: tuple[Entry | None, Entry | None, Entry | None]) -> None:
    """In one test, since it takes longer to draw trees than to look at what becomes of them."""
    both_sides_become_equal_and_that_is_the_end_of_it(*three)
    the_sides_are_treated_alike_but_for_conflicts(*three)
    no_value_is_lost(*three)
    what_was_agreed_on_is_skipped_and_nothing_else(*three)


def test_a_tracked_tree_has_neither_problems_nor_what_is_untracked() -> None:
    assert tracked(tree({"a": IGNORED, "b": UNREADABLE, "c": {"d": FIFO, "e": "1"}})) == tree(
        {"c": {"e": "1"}}
    )


def test_what_is_new_is_made_in_parts_that_begin_with_a_directory() -> None:
    new: list[tuple[str, Entry]] = [
        ("a", EMPTY), ("a/1", text("1")), ("a/2", text("2")), ("a/b", EMPTY), ("a/b/1", text("3")),
        ("a/c", EMPTY), ("d", EMPTY), ("d/1", text("4")),
    ]  # fmt: skip
    builds = [Operation(path, None, entry) for path, entry in new]
    found = [[each.path for each in some] for some in parts(builds, 2)]
    assert found == [["a", "a/1", "a/2"], ["a/b", "a/b/1"], ["a/c", "d", "d/1"]]
    assert [each for some in parts(builds, 2) for each in some] == builds
    assert list(parts(builds, 100)) == [builds]
    assert list(parts([], 2)) == []
