"""A check that leaving packages out has left no program without a shared library.

Source: elf(5), for the 64-bit little-endian files that both architectures have.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from wherry.core.errors import WherryError

_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NULL, _DT_NEEDED, _DT_STRTAB = 0, 1, 5


def needed_libraries(data: bytes) -> list[str]:
    """Return the names of the shared libraries that the ELF file `data` asks for.

    Anything that is not an ELF file asks for none.
    """
    if data[:6] != b"\x7fELF\x02\x01":
        return []
    (table,) = struct.unpack_from("<Q", data, 32)
    entry_size, count = struct.unpack_from("<HH", data, 54)
    # Type, flags, offset, virtual address, physical address, size in the file.
    segments = [
        struct.unpack_from("<IIQQQQ", data, table + number * entry_size) for number in range(count)
    ]
    needed, strings = [], 0
    for kind, _, offset, _, _, size in segments:
        if kind == _PT_DYNAMIC:
            for tag, value in struct.iter_unpack("<QQ", data[offset : offset + size]):
                if tag == _DT_NULL:
                    break
                if tag == _DT_NEEDED:
                    needed.append(value)
                elif tag == _DT_STRTAB:
                    strings = value
    for kind, _, offset, address, _, size in segments:
        if kind == _PT_LOAD and address <= strings < address + size:
            start = strings - address + offset
            return [_string(data, start + name) for name in needed]
    return []


def check_libraries(root: Path) -> None:
    """Raise WherryError when a file in `root` asks for a library that is not there."""
    present = {path.name for path in _files(root)}
    for path in _files(root):
        if path.is_symlink() or path.suffix == ".ko":
            continue
        for name in needed_libraries(path.read_bytes()):
            if name not in present:
                raise WherryError(
                    f"{path.relative_to(root)} needs {name}, which no package of the image has",
                    hint="take its package off the list `without` in recipe/packages.toml",
                )


def _string(data: bytes, start: int) -> str:
    return data[start : data.index(b"\0", start)].decode()


def _files(root: Path) -> Iterator[Path]:
    return (path for path in sorted(root.rglob("*")) if path.is_symlink() or path.is_file())
