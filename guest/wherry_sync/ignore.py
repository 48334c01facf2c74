"""Which paths are not synchronised.

The syntax of ``.wherryignore`` is gitignore's, which the host translates into regular
expressions (``wherry.sync.core.rules``), as the guest has no library for it. The last one that
matches decides, and what is in an ignored directory is ignored (gitignore(5)).
"""

from __future__ import annotations

import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


class Ignore:
    """Rules in the order in which they were written.

    :param rules: pairs of a regular expression, and whether a match ignores or readmits. A
        directory's path is matched with a slash at its end.
    :raises ValueError: an expression is wrong.
    """

    def __init__(self, rules: Sequence[tuple[str, bool]] = ()) -> None:
        self.rules = tuple(rules)
        try:
            self._rules = [(re.compile(text).match, ignores) for text, ignores in reversed(rules)]
            # One expression answers for nearly all paths that no rule is about.
            self._any = re.compile("|".join(f"(?:{_anonymous(text)})" for text, _ in rules)).match
        except re.error as error:
            raise ValueError(f"a rule is no regular expression: {error}") from error

    def __call__(self, path: str, is_directory: bool) -> bool:
        """Whether a path is ignored, given that its parent is not."""
        if not self._rules:
            return False
        if is_directory:
            path += "/"
        if self._any(path) is None:
            return False
        for match, ignores in self._rules:
            if match(path) is not None:
                return ignores
        return False


def _anonymous(text: str) -> str:
    # A group's name may occur once in an expression.
    return re.sub(r"\(\?P<\w+>", "(", text)


NOTHING = Ignore()
