"""How far a synchronisation is, and how that is told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sync_pair import Pair

from wherry.cli.progress import progress_line
from wherry.service.syncing import tell
from wherry.sync.core.transfer import Transfer


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path)
    yield made
    made.close()


def test_a_round_tells_what_it_carries_over(pair: Pair) -> None:
    seen: list[Transfer] = []

    def look(point: str) -> None:
        if point in ("transfer", "place", "operation") and pair.cycle.transfer is not None:
            seen.append(replace(pair.cycle.transfer))

    (pair.host / "new").mkdir()
    for number in range(3):
        (pair.host / "new" / f"{number}").write_text(f"{number}" * 10)
    pair.fuse.action = look
    pair.settle()
    assert {(each.total_files, each.total_bytes) for each in seen} == {(3, 30)}
    assert [each.path for each in seen[:3]] == ["new/0", "new/1", "new/2"]
    assert (seen[-1].done_files, seen[-1].done_bytes) == (3, 30)
    assert pair.cycle.transfer is None
    seen.clear()
    (pair.guest / "new" / "1").write_text("changed")
    pair.settle()
    assert (seen[0].total_files, seen[0].total_bytes) == (1, 7)
    assert seen[-1].path == "new/1"


def test_the_rate_and_the_time_left() -> None:
    transfer = Transfer(4, 10_000_000, begun_s=100.0)
    assert transfer.left_s(101.0) is None
    transfer.begin("a")
    transfer.end(2_500_000)
    assert transfer.rate(102.0) == 1_250_000
    assert transfer.left_s(102.0) == 6.0
    told = tell(transfer, now_s=102.0)
    assert progress_line(told) == "1 of 4 files, 2.5 of 10.0 MB, 1.2 MB/s, 6 s left"
    assert told["path"] == "a"
