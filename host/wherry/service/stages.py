"""The stages of starting a machine: each has a name, a bound and listeners."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from wherry.core.errors import StageError, WherryError

T = TypeVar("T")

_EMULATION_FACTOR = 5.0


@dataclass(frozen=True)
class Bounds:
    """Seconds that the stages of a start, and the guest's shutdown, may take."""

    image_s: float = 60.0
    accelerator_s: float = 120.0
    disk_s: float = 300.0
    machine_s: float = 30.0
    adopt_s: float = 10.0
    boot_s: float = 45.0
    tunnel_s: float = 20.0
    engine_s: float = 45.0
    files_s: float = 30.0
    ports_s: float = 30.0
    names_s: float = 60.0
    guest_stop_s: float = 90.0
    """The engine gives its containers 10 s by default, then the guest syncs its disk; the
    guest bounds each of its steps, to 40 s together."""

    def for_accelerator(self, accelerator: str) -> Bounds:
        """Return the bounds for the guest's own stages, which emulation makes longer."""
        if accelerator not in ("tcg", ""):
            return self
        return replace(
            self,
            boot_s=self.boot_s * _EMULATION_FACTOR,
            tunnel_s=self.tunnel_s * _EMULATION_FACTOR,
            engine_s=self.engine_s * _EMULATION_FACTOR,
            files_s=self.files_s * _EMULATION_FACTOR,
        )


DEFAULT_BOUNDS = Bounds()

Listener = Callable[[Mapping[str, Any]], None]


class Stages:
    """Runs stages one after another and tells every listener where it is.

    Events are ``{"stage", "state": "begin" | "end", "elapsed_s", "detail"}``; seconds
    count from the first stage's begin.
    """

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._current: Mapping[str, Any] | None = None
        self._listeners: list[Listener] = []

    @property
    def elapsed_s(self) -> float:
        """Seconds since the first stage began."""
        return time.monotonic() - self._begun

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call ``listener`` with each event, beginning with the stage under way.

        :returns: a function that ends it.
        """
        self._listeners.append(listener)
        if self._current is not None:
            listener(self._current)
        return lambda: self._listeners.remove(listener)

    async def run(
        self, name: str, work: Callable[[], Awaitable[T]], *, timeout_s: float, hint: str = ""
    ) -> T:
        """Run one stage.

        :param hint: what to do when it runs out of time, or fails and does not say it itself.
        :raises StageError: it failed, or took more than ``timeout_s`` seconds.
        """
        self.tell(name, "begin")
        try:
            async with asyncio.timeout(timeout_s):
                result = await work()
        except TimeoutError as error:
            raise StageError(name, f"nothing within {timeout_s:g} s", hint=hint) from error
        except StageError:
            raise
        except WherryError as error:
            raise StageError(name, error.message, hint=error.hint or hint) from error
        except OSError as error:
            raise StageError(name, str(error), hint=hint) from error
        self.tell(name, "end")
        return result

    def tell(self, name: str, state: str, detail: str = "") -> None:
        """Tell the listeners about a stage."""
        event = {
            "stage": name,
            "state": state,
            "elapsed_s": round(self.elapsed_s, 3),
            "detail": detail,
        }
        self._current = event if state == "begin" else None
        for listener in list(self._listeners):
            listener(event)
