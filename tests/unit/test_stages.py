"""The stages of a start, and what the guest's console tells of one that fails."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from wherry.core.errors import StageError, WherryError
from wherry.service import console
from wherry.service.stages import Stages


async def forever() -> None:
    await asyncio.Event().wait()


def test_listeners_hear_each_stage_begin_and_end() -> None:
    heard: list[Mapping[str, Any]] = []

    async def work() -> str:
        stages = Stages()
        silence = stages.listen(heard.append)

        async def one() -> str:
            return "done"

        result = await stages.run("boot", one, timeout_s=5)
        silence()
        await stages.run("tunnel", one, timeout_s=5)
        return result

    assert asyncio.run(work()) == "done"
    assert [(event["stage"], event["state"]) for event in heard] == [
        ("boot", "begin"),
        ("boot", "end"),
    ]
    assert all(event["elapsed_s"] >= 0 for event in heard)


def test_who_listens_late_hears_of_the_stage_under_way() -> None:
    heard: list[Mapping[str, Any]] = []

    async def work() -> None:
        stages, go_on = Stages(), asyncio.Event()
        task = asyncio.create_task(stages.run("boot", go_on.wait, timeout_s=5))
        await asyncio.sleep(0)
        stages.listen(heard.append)
        assert [(event["stage"], event["state"]) for event in heard] == [("boot", "begin")]
        go_on.set()
        await task

    asyncio.run(work())


@pytest.mark.parametrize(("own", "said"), [("do this", "do this"), ("", "do that")])
def test_a_failure_says_what_to_do_next(own: str, said: str) -> None:
    async def fails() -> None:
        raise WherryError("it broke", hint=own)

    async def work() -> None:
        with pytest.raises(StageError) as caught:
            await Stages().run("boot", fails, timeout_s=5, hint="do that")
        assert str(caught.value) == f"boot: it broke; {said}"

    asyncio.run(work())


def test_a_stage_without_an_end_is_ended_by_its_bound() -> None:
    async def work() -> None:
        cancelled = asyncio.Event()

        async def hang() -> None:
            try:
                await forever()
            finally:
                cancelled.set()

        with pytest.raises(StageError) as caught:
            await Stages().run("boot", hang, timeout_s=0.01, hint="look at the console")
        assert str(caught.value) == "boot: nothing within 0.01 s; look at the console"
        assert caught.value.stage == "boot"
        assert cancelled.is_set()

    asyncio.run(work())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (WherryError("no engine", hint="look"), "engine: no engine; look"),
        (OSError(28, "No space left on device"), "engine: .*No space left on device; try"),
        (StageError("inner", "it broke"), "inner: it broke"),
    ],
)
def test_a_failure_names_its_stage(error: Exception, said: str) -> None:
    async def fail() -> None:
        raise error

    with pytest.raises(StageError, match=said):
        asyncio.run(Stages().run("engine", fail, timeout_s=5, hint="try"))


def test_a_cancelled_start_is_not_a_failed_stage() -> None:
    async def work() -> None:
        task = asyncio.create_task(Stages().run("boot", forever, timeout_s=5))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(work())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", ""),
        ("wherry: init\r\nwherry: ssh\r\n", ""),
        ("wherry: fatal: no data disk\r\n", "the guest stopped: no data disk"),
        ("wherry: init\nwherry: fatal: a\nwherry: fatal: b\n", "the guest stopped: a"),
        ("[  1.5] wherry: fatal: x\r\r\n", "the guest stopped: x"),
        ("wherry: fatal: half a li", ""),
        (
            "[ 2.1] Kernel panic - not syncing: VFS: Unable to mount root\r\n",
            "the guest's kernel panicked: VFS: Unable to mount root",
        ),
        ("Kernel panic - not syncing: x\nwherry: fatal: y\n", "the guest stopped: y"),
    ],
)
def test_why_the_guest_gave_up(text: str, reason: str) -> None:
    assert console.explain(text) == reason


async def wait(path: Path, bound_s: float = 5) -> None:
    async with asyncio.timeout(bound_s):
        await console.wait_for_line(path, "wherry: ssh")


def test_the_line_is_awaited(tmp_path: Path) -> None:
    path = tmp_path / "console.log"

    async def work() -> None:
        waiting = asyncio.create_task(wait(path))
        for text in (
            "",
            "boot\r\n",
            "boot\r\nwherry: s",
            "boot\r\nnot wherry: ssh\r\nwherry: sshd\r\n",
        ):
            path.write_bytes(text.encode())
            await asyncio.sleep(0.03)
            assert not waiting.done()
        path.write_bytes(b"\xff\x1b[0m boot\r\nwherry: ssh\r\n")
        await waiting

    asyncio.run(work())


def test_a_guest_that_gives_up_ends_the_wait(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    path.write_text("wherry: init\r\nwherry: fatal: no disk\r\n")
    with pytest.raises(WherryError, match="the guest stopped: no disk; see: wherry logs"):
        asyncio.run(wait(path))


def test_without_a_console_the_wait_goes_on(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError):
        asyncio.run(wait(tmp_path / "absent", 0.05))
