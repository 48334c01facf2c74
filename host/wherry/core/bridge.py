"""The only crossing between threads and the event loop.

Control lives on one event loop, bytes in threads (paramiko blocks). Messages
cross here, chunks of data never do: a crossing costs 6 to 100 µs.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def in_thread(function: Callable[[], T], *, name: str) -> T:
    """Run a blocking function in a thread of its own and await its result.

    A thread of its own, not the loop's pool: calls into paramiko may block for
    their whole time limit, and a full pool would stall unrelated work. When the
    awaiting task is cancelled the thread goes on, so ``function`` has a time limit
    of its own.
    """
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def body() -> None:
        try:
            result = function()
        except BaseException as error:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        else:
            if future.set_running_or_notify_cancel():
                future.set_result(result)

    threading.Thread(target=body, name=name, daemon=True).start()
    return await asyncio.wrap_future(future)


def post(loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *args: object) -> None:
    """Have the loop call ``callback`` soon; from any thread; dropped once the loop is closed."""
    try:
        loop.call_soon_threadsafe(callback, *args)
    except RuntimeError:
        if not loop.is_closed():
            raise


def call(
    loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T], *, timeout_s: float
) -> T:
    """Run a coroutine on the loop from another thread and wait for its result.

    :raises TimeoutError: it took longer than ``timeout_s`` seconds; it is cancelled.
    """
    future = asyncio.run_coroutine_threadsafe(coroutine, loop)
    try:
        return future.result(timeout_s)
    except TimeoutError:
        future.cancel()
        raise
