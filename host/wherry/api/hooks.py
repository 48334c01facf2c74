"""What other features do with requests and answers on their way.

A *hook* is a function that is called with each :class:`Request` its rule matches, before
the request goes on to the engine. It may

- look at the method, path, query and headers, and at the body if its rule reads it;
- give another body (:meth:`Request.replace_body`);
- wait, with a bound, best by :meth:`Request.wait`;
- refuse, by raising :class:`Refusal`: the client gets the status and message;
- return a :class:`Watch` to follow the answer.

When it returns, the request goes on. Several hooks of one request are called in the
order in which they were added, each seeing the body as the one before left it; a refusal
ends the row, and the watches already returned learn of it by their ``end``. Any other
exception becomes a 500. Hooks and watches are called in threads of the connection, never
two at once for one connection, and must not block without a bound: the connection's
client waits as long, others do not. A request that no rule matches costs nothing.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from wherry.api.answers import Refusal
from wherry.api.http import Headers, RequestHead, ResponseHead

__all__ = ["ClientGone", "Hook", "Hooks", "Refusal", "Request", "Watch"]

DEFAULT_BODY_LIMIT_BYTES = 4 << 20
"""Enough for any request to create something."""

LINE_LIMIT_BYTES = 1 << 20
"""Longer lines are passed on without being watched."""


class ClientGone(Exception):
    """The client left, or the endpoint is being closed; nobody waits for the request any more."""


@dataclass(frozen=True)
class Watch:
    """What follows the answer to one request; each part may be left out.

    Each function may wait, with a bound, and what it was called before waits with it.
    What ``line`` and ``end`` raise is logged, and the bytes go on.

    :param head: called with the answer's head before the client gets it; also with 101.
        It may raise :class:`Refusal`, which the client then gets in place of the answer;
        the connection ends.
    :param line: called with each line of the answer's body, without its end, before the
        client gets it: an event of ``/events``, the result of ``/wait``. Not called for a
        raw stream (attach, exec), nor for a line of more than 1 MiB. For the first line of a
        chunked answer it may return another one, which the client then gets instead.
    :param end: called once and last, before the client sees the end: the last bytes of a
        body, or the end of a raw stream, are held until it returns. Called with whether
        the answer came whole; False also when the request was refused after the hook
        ran, when the engine broke off or the client left, and then nothing is held.
    """

    head: Callable[[ResponseHead], None] | None = None
    line: Callable[[bytes], bytes | None] | None = None
    end: Callable[[bool], None] | None = None


class Request:
    """A request on its way to the engine, as a hook sees it.

    What a hook returns may still :meth:`wait`; the head and the body are gone by then.

    :param head: its head, as it came.
    :param body: its content; None when no rule reads it.
    :param patience: waits for an event; see :meth:`wait`.
    """

    def __init__(
        self,
        head: RequestHead,
        body: bytes | None,
        patience: Callable[[threading.Event, float], bool],
    ) -> None:
        self.head = head
        self.body = body
        self.replaced = False
        self.params: Mapping[str, str] = {}
        """What the pattern's names stand for, in the rule that is being followed."""
        self._patience = patience

    @property
    def method(self) -> str:
        """Such as ``POST``."""
        return self.head.method

    @property
    def path(self) -> str:
        """The decoded path without the API's version, such as ``/containers/create``."""
        return self.head.path

    @property
    def api_version(self) -> str:
        """Such as ``1.51``; empty when the client named none."""
        return self.head.api_version

    @property
    def query(self) -> Mapping[str, list[str]]:
        """The query's values by name."""
        return self.head.query

    @property
    def headers(self) -> Headers:
        """Names in lower case, and values."""
        return self.head.headers

    def replace_body(self, body: bytes) -> None:
        """Have the engine get another body; only in a rule that reads the body."""
        if self.body is None:
            raise ValueError("the rule does not read the body")
        self.body = body
        self.replaced = True

    def let_go(self) -> None:
        """Keep no bytes of a request that goes on: what watches its answer keeps this."""
        del self.head, self.body

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        """Wait until an event is set; False when it is not set in time.

        Also for the functions of a :class:`Watch`, in which it is the answer that waits.

        :raises ClientGone: the client left meanwhile; a hook lets this pass.
        """
        return self._patience(event, timeout_s)


Hook = Callable[[Request], Watch | None]


@dataclass(frozen=True)
class Rule:
    """Which requests a hook is called for.

    :param body_limit: the longest body that is read for the hook, in bytes; 0: none is.
    """

    method: str
    pattern: re.Pattern[str]
    hook: Hook
    body_limit: int


class Match:
    """The rules of one request."""

    def __init__(self, rules: list[tuple[Rule, Mapping[str, str]]]) -> None:
        self._rules = rules
        self.body_limit = max(rule.body_limit for rule, _ in rules)

    def run(self, request: Request, watches: list[Watch]) -> None:
        """Call the hooks; append what they return, as far as they came.

        :raises Exception: what a hook raised; no later one is called.
        """
        for rule, params in self._rules:
            request.params = params
            watch = rule.hook(request)
            if watch is not None:
                watches.append(watch)


class Hooks:
    """The rules of an endpoint; may be added to at any time, from any thread."""

    def __init__(self) -> None:
        self._rules: dict[str, tuple[Rule, ...]] = {}
        self._lock = threading.Lock()

    def on(self, method: str, path: str, hook: Hook, *, body_limit: int = 0) -> None:
        """Call ``hook`` for requests of a method and path.

        :param method: such as ``POST``. The engine answers HEAD where it answers GET; a
            hook for both is added twice.
        :param path: without the API's version; ``{name}`` stands for any characters,
            slashes included, as in moby's routes: ``/containers/{id}/start``.
        :param body_limit: read the body, up to so many bytes, before the hook is called;
            a longer one is refused with 413. See :data:`DEFAULT_BODY_LIMIT_BYTES`.
        """
        parts = re.split(r"\{(\w+)\}", path)
        pattern = "".join(
            f"(?P<{part}>.*)" if index % 2 else re.escape(part) for index, part in enumerate(parts)
        )
        rule = Rule(method, re.compile(pattern, re.DOTALL), hook, body_limit)
        with self._lock:
            # Replaced, never changed: readers take no lock.
            self._rules = {**self._rules, method: (*self._rules.get(method, ()), rule)}

    def match(self, head: RequestHead) -> Match | None:
        """Return the rules for a request; None when there are none."""
        found: list[tuple[Rule, Mapping[str, str]]] = [
            (rule, match.groupdict())
            for rule in self._rules.get(head.method, ())
            if (match := rule.pattern.fullmatch(head.path))
        ]
        return Match(found) if found else None
