"""The data disk: a sparse qcow2, made once, checked before every start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wherry.config.units import format_size, parse_size
from wherry.core.errors import WherryError
from wherry.core.files import write_atomic
from wherry.core.processes import Argument, run

_CREATE_TIMEOUT_S = 60.0
_CHECK_TIMEOUT_S = 300.0
_INFO_TIMEOUT_S = 30.0

_CHECK_ERRORS = 2
"""``qemu-img check`` ends with 2 for corruption and 3 for leaked clusters alone (its man page)."""


def create(path: Path, size: int, *, qemu_img: Path) -> None:
    """Make an empty disk of ``size`` bytes that takes no space yet.

    64 KiB clusters with extended L2 entries (QEMU 5.2) let a discard free 2 KiB
    pieces, and a small write not copy a whole cluster.

    :raises WherryError: the disk cannot be made, for example for lack of space.
    """
    argv: list[Argument] = [
        qemu_img,
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "extended_l2=on",
        path,
        str(size),
    ]
    try:
        run(argv, timeout_s=_CREATE_TIMEOUT_S)
    except WherryError as error:
        path.unlink(missing_ok=True)
        raise WherryError(
            f"the data disk {path} cannot be made: {_last(error)}",
            hint="free some space, or set WHERRY_HOME to another disk",
        ) from error


def may_format(path: Path, mark: Path, *, qemu_img: Path) -> bool:
    """Return whether the guest may make a file system on a disk.

    Only on one that was made for it and never used since: the guest cannot tell contents that
    it does not know from none.

    :param mark: a file that is there, and empty, since the disk was made; it goes when there
        is a file system. In between it says on which file one is being made: that may have
        been interrupted.
    :raises WherryError: the disk cannot be read.
    """
    if not mark.exists():
        return False
    status = path.stat()
    ours = f"{status.st_dev} {status.st_ino}\n".encode()
    begun = mark.read_bytes()
    if begun and begun != ours:
        mark.unlink()
        return False
    if not begun:
        argv: list[Argument] = [qemu_img, "map", "-U", "-f", "qcow2", "--output=json", path]
        extents = json.loads(run(argv, timeout_s=_INFO_TIMEOUT_S).stdout)
        if any(each["data"] for each in extents):
            mark.unlink()
            return False
        write_atomic(mark, ours)
    return True


def virtual_size(path: Path, *, qemu_img: Path) -> int:
    """Return the size in bytes that the guest sees.

    :raises WherryError: the disk is missing, or no qcow2.
    """
    # -U reads beside a QEMU that has the disk open.
    argv: list[Argument] = [qemu_img, "info", "-U", "-f", "qcow2", "--output=json", path]
    information: dict[str, Any] = json.loads(run(argv, timeout_s=_INFO_TIMEOUT_S).stdout)
    return int(information["virtual-size"])


def check(path: Path, *, qemu_img: Path) -> int:
    """Make sure that a disk is one, is whole, and is a qcow2; return its size in bytes.

    :raises WherryError: it is missing, truncated, corrupt or something else.
    """
    restore = f"restore {path.name} from a backup, or delete the machine to start afresh"
    if not path.is_file():
        raise WherryError(f"the data disk {path} is missing", hint=restore)
    try:
        size = virtual_size(path, qemu_img=qemu_img)
        checked = run(
            [qemu_img, "check", "-q", "-f", "qcow2", path], timeout_s=_CHECK_TIMEOUT_S, check=False
        )
    except WherryError as error:
        raise WherryError(
            f"the data disk {path} is damaged: {_last(error)}", hint=restore
        ) from error
    if b'" lock' in checked.stderr:  # "Failed to get shared "write" lock"
        raise WherryError(
            f"the data disk {path} is in use by another program",
            hint="end what uses it, such as a QEMU or qemu-img of your own",
        )
    if checked.returncode in (1, _CHECK_ERRORS):
        said = checked.stderr.decode(errors="replace").strip().splitlines()
        raise WherryError(
            f"the data disk {path} is truncated or corrupt: {' '.join(said[:1])}",
            hint=restore,
        )
    return size


def grow(path: Path, size: int, *, qemu_img: Path) -> None:
    """Enlarge a disk to ``size`` bytes; the guest enlarges its file system when it boots.

    :raises WherryError: the disk is already larger: shrinking would cut data off.
    """
    present = check(path, qemu_img=qemu_img)
    if size < present:
        raise WherryError(
            f"disk = {format_size(size)} is smaller than the data disk, {format_size(present)}",
            hint=f"a disk can only grow: wherry config set disk {_exact(present)}",
        )
    if size > present:
        argv: list[Argument] = [qemu_img, "resize", "-q", "-f", "qcow2", path, str(size)]
        try:
            run(argv, timeout_s=_CREATE_TIMEOUT_S)
        except WherryError as error:
            raise WherryError(
                f"the data disk {path} cannot be enlarged: {_last(error)}",
                hint=f"free some space, or: wherry config set disk {_exact(present)}",
            ) from error


def _exact(size: int) -> str:
    """Return a size as a setting takes it: as it is shown, unless that is rounded."""
    shown = format_size(size).replace(" ", "")
    return shown if parse_size(shown) == size else str(size)


def _last(error: WherryError) -> str:
    return error.message.rsplit(": ", 1)[-1]
