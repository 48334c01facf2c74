"""The two archives the kernel starts from: the initrd, and the probe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from wherry_images import cpio
from wherry_images.modules import module_name, select_by_name

# What finding and mounting the root takes; some are built into the kernel.
INITRD_MODULES = ("virtio_mmio", "virtio_pci", "virtio_blk", "erofs", "overlay")


def initrd(
    init: bytes, busybox: bytes, modules: Path, dependencies: Mapping[str, Sequence[str]]
) -> bytes:
    """Return the initrd: `init`, busybox, and the modules from the directory `modules`.

    It is not compressed: QEMU hands it over in one copy, which costs less than unpacking it.
    """
    files = select_by_name(INITRD_MODULES, dependencies)
    names = [module_name(path) + ".ko" for path in files]
    directories = ["bin", "dev", "lower", "modules", "proc", "root", "sys", "upper"]
    return cpio.archive(
        [
            *map(cpio.directory, directories),
            cpio.file("bin/busybox", busybox, 0o755),
            cpio.file("init", init, 0o755),
            cpio.file("modules/order", "".join(name + "\n" for name in names).encode()),
            *(
                cpio.file(f"modules/{name}", (modules / path).read_bytes())
                for name, path in zip(names, files, strict=True)
            ),
        ]
    )


def probe(init: bytes, busybox: bytes) -> bytes:
    """Return the archive that says that it runs and ends: the least a machine can do."""
    return cpio.archive(
        [
            cpio.directory("bin"),
            cpio.directory("dev"),
            cpio.file("bin/busybox", busybox, 0o755),
            cpio.file("init", init, 0o755),
        ]
    )
