"""Reading and editing ``config.toml``.

Reading is strict: an unknown key or a wrong value is an error that names the file
and the line. Editing keeps comments and order (tomlkit).
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wherry.config import engine_keys
from wherry.config.model import SETTINGS, Config, Problem, build, host_problem
from wherry.core.errors import ConfigError, UsageError
from wherry.core.files import write_atomic

if TYPE_CHECKING:
    from wherry.platform import Platform

_ENCODING = "utf-8-sig"
"""UTF-8, with the byte order mark that editors on Windows put before it, or without."""

_TOML_LINE = re.compile(r" \(at line (?P<line>\d+), column (?P<column>\d+)\)$")

_FREE_TABLES = ("engine",)
"""Tables whose keys are not ours: what is below them is not looked at here."""


def load(path: Path, platform: Platform) -> Config:
    """Read a machine's configuration; a missing file is an empty one.

    :raises ConfigError: the file is malformed, or a key or value is wrong.
    """
    return build(read_values(path), platform)


def read_values(path: Path) -> dict[str, Any]:
    """Return the parsed values that the file sets, by dotted key.

    :raises ConfigError: as :func:`load`.
    """
    return parse(read_text(path), path)


def read_text(path: Path) -> str:
    """Return a configuration's text; a missing file is an empty one.

    :raises ConfigError: it is no text, or not ours to read.
    """
    try:
        return path.read_text(encoding=_ENCODING)
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def load_for(path: Path, platform: Platform, *, disk_total: int) -> Config:
    """Read a configuration that this host can give; ``disk_total`` as for :func:`host_problem`.

    :raises ConfigError: as :func:`load`, or it asks for more than the host has.
    """
    config = load(path, platform)
    if problem := host_problem(config, platform, disk_total=disk_total):
        raise refusal(problem, read_text(path), path)
    return config


def refusal(problem: Problem, text: str, path: Path) -> ConfigError:
    """Return the error that names where a configuration's text has a setting that is refused."""
    line = f":{_line_of(text, problem.key)}" if problem.key in parse(text, path) else ""
    return ConfigError(f"{path}{line}: {problem.message}", hint=problem.hint)


def parse(text: str, path: Path) -> dict[str, Any]:
    """Parse a configuration's text; ``path`` is for messages alone."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_toml_message(str(error), text, path), hint=f"edit {path}") from error
    values = {}
    for key, raw in _flatten(document):
        where = f"{path}:{_line_of(text, key)}"
        if key not in SETTINGS:
            raise ConfigError(f"{where}: unknown key {key}", hint=_suggestion(key))
        try:
            values[key] = SETTINGS[key].parse(raw)
        except ValueError as error:
            raise ConfigError(f"{where}: {key}: {error}", hint=SETTINGS[key].help) from error
    return values


def _toml_message(said: str, text: str, path: Path) -> str:
    """Put the line where every other error has it."""
    found = _TOML_LINE.search(said)
    if found is None:  # "(at end of document)"
        return f"{path}:{text.count(chr(10), 0, len(text.rstrip())) + 1}: not valid TOML: {said}"
    what = f"{said[: found.start()]} in column {found['column']}"
    return f"{path}:{found['line']}: not valid TOML: {what}"


def edit(
    path: Path,
    changes: Mapping[str, Any],
    *,
    check: Callable[[str], None] = lambda text: None,
) -> None:
    """Set keys, or remove those whose new value is None, and keep the rest as it is.

    :param changes: values by dotted key, not yet parsed; ``engine.KEY`` and
        ``engine.TABLE.KEY`` reach into the engine's table.
    :param check: called with the text as it would be; what it raises keeps the file.
    :raises UsageError: a key or value is wrong; the file is then unchanged.
    :raises ConfigError: the file itself is malformed.
    """
    import tomlkit
    import tomlkit.items

    read_values(path)  # a malformed file must not be half understood and rewritten
    document = tomlkit.parse(read_text(path))
    for key, raw in changes.items():
        parts = split_key(key)
        _put(document, parts, _checked(key, parts, raw))
    text = tomlkit.dumps(document)
    parse(text, path)
    check(text)
    write_atomic(path, text.encode())


def _put(holder: Any, path: list[str], value: Any) -> None:
    """Set what a path leads to, or remove it and the tables that are empty then."""
    import tomlkit

    name, *rest = path
    if not isinstance(holder, MutableMapping):
        raise UsageError(f"{name} cannot be set in what is no table")
    if not rest:
        if value is None:
            holder.pop(name, None)
        else:
            holder[name] = value
        return
    if name not in holder:
        if value is None:
            return
        holder[name] = tomlkit.table()
    _put(holder[name], rest, value)
    if value is None and not holder[name]:
        holder.pop(name)


def _checked(key: str, path: list[str], raw: Any) -> Any:
    """Return the value as it goes into the file; None removes the key."""
    table, *below = path
    if below and table in _FREE_TABLES:
        value = engine_keys.from_word(below, raw) if isinstance(raw, str) else raw
        if raw is not None:
            _parsed(table, {below[0]: value})
        return value
    if key not in SETTINGS:
        raise UsageError(f"unknown key {key}", hint=_suggestion(key))
    if raw is None:
        return None
    value = _parsed(key, raw)
    return value if key not in ("memory", "disk") else raw


def _parsed(key: str, raw: Any) -> Any:
    setting = SETTINGS[key]
    try:
        return setting.parse(raw)
    except ValueError as error:
        raise UsageError(f"{key}: {error}", hint=setting.help) from error


def split_key(key: str) -> list[str]:
    """Return the parts of a dotted key; in the engine's table it may have more than two.

    :raises UsageError: it is no key.
    """
    head, *rest = key.split(".", 1)
    if rest and head in _FREE_TABLES:
        try:
            return engine_keys.split_key(key)
        except ValueError as error:
            raise UsageError(str(error), hint="write it as in TOML, with dots") from error
    return [head, *rest]


def _flatten(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in document.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in _FREE_TABLES:
            yield from _flatten(value, f"{key}.")
        else:
            yield key, value


def _suggestion(key: str) -> str:
    close = difflib.get_close_matches(key, SETTINGS, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"known keys: {', '.join(SETTINGS)}"


def _line_of(text: str, key: str) -> int:
    """Return the line, from 1, that sets a key: tomllib tells no positions of values."""
    table, key = "", _bare(key)
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if line.startswith("["):
            table = _bare(line.split("#", 1)[0]).strip("[]") + "."
            if table == key + ".":
                return number
        elif "=" in line and not line.startswith("#"):
            name = table + _bare(line.split("=", 1)[0])
            if name == key or name.startswith(key + ".") or key.startswith(name + "."):
                return number
    return 1


def _bare(key: str) -> str:
    """Return a key without the quotes and spaces that TOML allows around its parts."""
    return re.sub(r"[\"'\s]", "", key)
