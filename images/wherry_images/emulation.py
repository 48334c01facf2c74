"""The add-on with which the guest runs programs of the architectures that are not its own.

It is a disk of its own beside the root: a boot needs none of it. It has QEMU's user emulation
(qemu-user(1)) and Debian's registration for binfmt_misc, at the paths that the registration names,
relative to where the guest mounts it.
"""

from __future__ import annotations

from pathlib import Path

from wherry_images.architecture import ARCHITECTURES, Architecture


def take(root: Path, target: Path, architecture: Architecture) -> None:
    """Move the emulators that a guest of `architecture` needs from `root` to the new `target`."""
    target.mkdir()
    for name in ARCHITECTURES.keys() - {architecture.name}:
        # The registration's name for the program: it tells QEMU that the kernel passes the name
        # that the user called on, as BusyBox needs it.
        (root / f"usr/bin/qemu-{name}").rename(target / f"{name}-binfmt-P")
        registration = f"qemu-{name}.conf"
        (root / "usr/share/qemu/binfmt.d" / registration).rename(target / registration)
