"""QEMU's command line, as a pure function of what is to run.

Names and defaults are those of qemu(1). Devices are chosen per architecture, the
processor model per accelerator.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from wherry.vm.driver import MachineSpec

GUEST_SSH_PORT = 22
SSH_HOST = "127.0.0.1"

NETWORK_DEVICE = "net0"
"""The id of the user-mode network, which ``hostfwd_add`` names."""

_MIB = 1 << 20


@dataclass(frozen=True)
class Board:
    """What differs between the guest architectures."""

    machine: str
    serial: str
    """The console's name in the guest."""
    bus: str
    """Suffix of virtio devices: how they are attached."""


BOARDS = {
    "x86_64": Board("q35,hpet=off,vmport=off,smbus=off,sata=off,i8042=off,usb=off", "ttyS0", "pci"),
    "aarch64": Board("virt", "ttyAMA0", "pci"),
}


def processor(accelerator: str, architecture: str) -> str:
    """Return the ``-cpu`` model.

    Hardware acceleration passes the host's processor through. WHPX knows no
    ``host``, so it gets a plain model. Emulation gets all that TCG can emulate, but for
    two features that cost more than they give: with ERMS the kernel copies by
    ``rep movsb``, which TCG executes byte by byte, and with LA57 each page walk is longer.
    """
    if accelerator in ("kvm", "hvf"):
        return "host"
    if accelerator == "whpx":
        return "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+aes" if architecture == "x86_64" else "host"
    # On arm64 the plain model: pointer authentication costs dear in emulation.
    return "max,erms=off,la57=off" if architecture == "x86_64" else "cortex-a57"


def base_arguments(
    *,
    architecture: str,
    accelerator: str,
    cpus: int,
    memory_bytes: int,
    kernel: Path,
    initrd: Path,
    cmdline: str,
) -> list[str]:
    """Return what every boot has, also the trial boot of an accelerator."""
    board = BOARDS[architecture]
    accel = accelerator
    if accelerator == "tcg":
        accel = "tcg,thread=multi,tb-size=512"
        # Programs at fixed addresses are translated once and not at each start. The guest
        # randomises again (randomize_va_space) as soon as the engine answers.
        cmdline += " norandmaps"
    # fmt: off
    return [
        "-no-user-config",
        "-nodefaults",
        "-display", "none",
        "-vga", "none",
        "-parallel", "none",
        "-machine", board.machine,
        "-accel", accel,
        "-cpu", processor(accelerator, architecture),
        "-smp", str(cpus),
        "-m", f"{memory_bytes // _MIB}M",
        "-no-reboot",
        "-kernel", os.fspath(kernel),
        "-initrd", os.fspath(initrd),
        "-append", f"{cmdline} console={board.serial}".strip(),
    ]
    # fmt: on


def arguments(spec: MachineSpec) -> list[str]:
    """Return the arguments for a whole machine, without the program's own name.

    The SSH port is 0: QEMU binds a free one, and its monitor tells which, so that
    nobody can take it between choice and use.

    The monitor is a Unix socket in the machine's own directory on every system. QEMU 7.2 has
    them on Windows too, where connecting takes the right to write to the socket's file. Its
    other ways there are worse: any user can connect to a TCP port, a pipe of QEMU's
    (``-chardev pipe``) can be read by everyone and takes one client ever, and standard
    input ends with the service, after which the machine could not be taken over.
    """
    bus = BOARDS[spec.image.architecture].bus
    data = _escape(spec.data_disk)
    # fmt: off
    result = base_arguments(
        architecture=spec.image.architecture,
        accelerator=spec.accelerator,
        cpus=spec.cpus,
        memory_bytes=spec.memory_bytes,
        kernel=spec.image.kernel,
        initrd=spec.image.initrd,
        cmdline=spec.image.cmdline + (" wherry.new_disk" if spec.new_disk else ""),
    )
    result += [
        "-name", f"wherry-{spec.name}",
        # A guest that powered off is ended by us, who have then read why: what QEMU says
        # just before it ends by itself can be lost with the connection.
        "-no-shutdown",
        "-rtc", "base=utc",
        "-chardev", f"file,id=console,path={_escape(spec.console_log)}",
        "-serial", "chardev:console",
        "-qmp", f"unix:{_escape(spec.qmp_socket)},server=on,wait=off",
        *_read_only_disk("root", spec.image.root, bus),
        "-blockdev", f"driver=file,node-name=data-file,filename={data},discard=unmap",
        "-blockdev", "driver=qcow2,node-name=data,file=data-file,discard=unmap,detect-zeroes=unmap",
        "-device", f"virtio-blk-{bus},drive=data,serial=wherry-data",
        "-netdev", f"user,id={NETWORK_DEVICE},hostfwd=tcp:{SSH_HOST}:0-:{GUEST_SSH_PORT}",
        "-device", f"virtio-net-{bus},netdev={NETWORK_DEVICE},romfile=",
        "-device", f"virtio-balloon-{bus},free-page-reporting=on",
        "-device", f"virtio-rng-{bus}",
    ]
    if spec.image.emulation is not None:
        result += _read_only_disk("emulation", spec.image.emulation, bus)
    for name, path in sorted(spec.firmware_files.items()):
        result += ["-fw_cfg", f"name=opt/wherry/{name},file={_escape(path)}"]
    # fmt: on
    return result


def _read_only_disk(name: str, path: Path, bus: str) -> list[str]:
    # fmt: off
    return [
        "-blockdev", f"driver=file,node-name={name}-file,filename={_escape(path)},read-only=on",
        "-blockdev", f"driver=raw,node-name={name},file={name}-file,read-only=on",
        "-device", f"virtio-blk-{bus},drive={name},serial=wherry-{name}",
    ]
    # fmt: on


def _escape(path: Path) -> str:
    """Double the commas: QEMU's option syntax separates by them."""
    return os.fspath(path).replace(",", ",,")
