"""``.wherryignore`` and a root's settings -> what both ends evaluate.

The syntax is gitignore's; :mod:`pathspec` translates it, and the regular expressions go to the
guest, which has no such library. Lines of the settings come after those of the file, so they
win.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from pathspec import GitIgnoreSpec

from wherry.core.errors import ConfigError
from wherry_sync.ignore import Ignore

FILE_NAME = ".wherryignore"


def parse(file: Iterable[str], settings: Iterable[str] = ()) -> Ignore:
    """Return the rules in lines of gitignore's syntax.

    :raises ConfigError: a line is not of that syntax.
    """
    rules = []
    for source, lines in ((FILE_NAME, file), ("the root's ignore setting", settings)):
        for number, line in enumerate(lines, 1):
            try:
                # None for an empty line, one without an expression for a comment.
                for pattern in GitIgnoreSpec.from_lines([line]).patterns:
                    if pattern.include is not None and pattern.regex is not None:
                        rules.append((pattern.regex.pattern, bool(pattern.include)))
            except ValueError as error:
                raise ConfigError(f"{source}, line {number}: {error}") from error
    return Ignore(rules)


def below(path: str, ignore: Ignore) -> Ignore:
    """Return a directory's rules as rules of one around it, where it is at a path.

    The directory itself is left out by none of them: they are about what is in it.
    """
    start = re.escape(f"{path}/") + r"(?!\Z)"
    # Each is matched from the beginning on, whether it says so or not.
    return Ignore(
        [(f"{start}(?:{text.removeprefix('^')})", ignores) for text, ignores in ignore.rules]
    )
