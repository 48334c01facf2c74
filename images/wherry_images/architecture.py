"""What differs between the processor architectures the image is built for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """One architecture under the names that QEMU, Debian and the multiarch layout give it."""

    name: str
    debian: str
    triplet: str


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("x86_64", "amd64", "x86_64-linux-gnu"),
        Architecture("aarch64", "arm64", "aarch64-linux-gnu"),
    )
}
