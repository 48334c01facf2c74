"""What writes to a bind mount goes on while any part of what carries it is killed.

Both sides write at all times, each file by a rename as databases and editors do, its contents
a number that only grows. So whatever is killed when: a file that is older than it was, or torn,
or empty, or gone, was lost.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mount_trees import LIST, listed
from sandbox import Sandbox, wait_until

pytestmark = [pytest.mark.vm, pytest.mark.endurance, pytest.mark.timeout(3600)]

COPIES = 300
"""How often a file repeats its number, so that a torn one shows."""

IN_CONTAINER = r"""
cd /src; i=$1
while [ -e go ]; do
  i=$((i + 1)); t=$(printf %08d $i)
  yes $t | head -n 300 >tmp-c; mv tmp-c c$((i % 10))
  mkdir -p d$((i % 3)); echo $t >d$((i % 3))/e$((i % 4))
  [ $((i % 5)) = 0 ] && rm -rf d$(((i + 1) % 3))
  echo $i >/counter
  usleep 20000
done
"""


class Writer:
    """Writes on the host until it is told to stop."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.random = random.Random(seed)
        self.written: dict[str, int] = {}
        self.number = 0
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        while not self.over.wait(self.random.random() / 20):
            self.number += 1
            name = f"h{self.random.randrange(10)}"
            new = self.root / "tmp-h"
            new.write_text(f"{self.number:08}\n" * COPIES)
            new.replace(self.root / name)
            self.written[name] = self.number

    def stop(self) -> None:
        self.over.set()
        self.thread.join()


def number_in(text: str) -> int:
    """Return the number that a file has throughout."""
    lines = text.splitlines()
    assert len(lines) == COPIES, f"{len(lines)} lines"
    assert set(lines) == {lines[0]}, "a torn file"
    assert re.fullmatch(r"\d{8}", lines[0])
    return int(lines[0])


def seen(root: Path) -> dict[str, int]:
    """Return the numbers of the container's files on the host."""
    return {path.name: number_in(path.read_text()) for path in root.glob("c?")}


@pytest.fixture
def killed() -> Iterator[list[str]]:
    """What was killed, shown when the test fails."""
    found: list[str] = []
    yield found
    print("\n".join(found))


def kill(machine: Sandbox, what: str) -> None:
    """Kill a part without a word, and have the machine run again."""
    status = machine.status()
    if what == "agent":
        argv = ["pkill", "-9", "-f", "[r]un/wherry/agent-"]
        machine.wherry("shell", "--", *argv, check=False)
        return
    os.kill(status["service_pid" if what == "service" else "qemu_pid"], signal.SIGKILL)
    if what == "QEMU":
        wait_until(lambda: machine.status()["state"] == "broken", 60, "the loss is noticed")
    machine.wherry("start")


@pytest.mark.parametrize(("seed", "rounds"), [(1, 30)])
def test_59_60_kill_9_at_random_points(
    machine: Sandbox, tmp_path: Path, killed: list[str], seed: int, rounds: int
) -> None:
    root = tmp_path / "src"
    root.mkdir()
    choose = random.Random(seed)
    conflicts: list[object] = []
    machine.docker(
        "run", "-d", "--name", "chaos", "-v", f"{root}:/src", "busybox", "sleep", "99999"
    )
    try:
        for number in range(rounds):
            what = choose.choice(["service", "service", "agent", "agent", "QEMU"])
            (root / "go").write_text("")
            start = ["exec", "-d", "chaos", "sh", "-c", IN_CONTAINER, "sh", str(number * 10_000)]
            machine.docker(*start)
            writer = Writer(root, seed * 1000 + number)
            delay_s = choose.random() * 3
            time.sleep(delay_s)
            before = seen(root)
            killed.append(f"{number}: {what} after {delay_s:.2f} s, {len(before)} files")
            kill(machine, what)
            writer.stop()
            (root / "go").unlink()
            machine.docker("start", "chaos")

            def still() -> bool:
                done = machine.docker("exec", "chaos", "sh", "-c", "ls /src/go", check=False)
                return done.returncode != 0

            wait_until(still, 60, "the container stops writing")
            time.sleep(0.5)
            there = machine.docker("exec", "chaos", "sh", "-c", LIST).stdout.decode()
            here = listed(root)
            assert sorted(there.splitlines()) == here, killed[-1]
            for name, last in writer.written.items():
                assert number_in((root / name).read_text()) == last, (name, killed[-1])
            now = seen(root)
            for name, last in before.items():
                assert now[name] >= last, (name, killed[-1])
            found = json.loads(machine.wherry("sync", "conflicts", "--json").stdout)
            # Each file is written on one side, so it would be what we left half-written. What a
            # guest without power has left is of any age, and may be what nobody has seen.
            assert what == "QEMU" or found == conflicts, killed[-1]
            conflicts = found
        state = machine.home / "machines" / "default" / "sync"
        left = [path for path in state.glob("*/stage/*") if path.name != "journal"]
        assert left == [], "rubbish in the stage"
        done = machine.wherry("shell", "--", "sh", "-c", "ls -A /data/sync/stage/r*/")
        rubbish = re.findall(rb"^(?:t|c|b|part)-.*$", done.stdout, re.MULTILINE)
        assert rubbish == [], "rubbish in the guest's stage"
    finally:
        machine.docker("rm", "-f", "chaos", check=False)
