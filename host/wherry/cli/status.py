"""status and list."""

from __future__ import annotations

from typing import Any

import click

from wherry.cli.common import json_option, layout, name_argument, print_json, print_table
from wherry.config.layout import Layout, MachinePaths
from wherry.config.units import format_size
from wherry.core.errors import WherryError

_STATUS_TIMEOUT_S = 5.0
"""A service answers this at once, unless it hangs."""

_AT_ONCE = 16
_CLOCK_WORTH_TELLING_S = 1.0


def status_of(where: Layout, paths: MachinePaths) -> dict[str, Any]:
    """Ask the machine's service; if there is none, look at what is on disk.

    A machine whose service is there and does not answer is ``broken``: nobody can use it.
    """
    from wherry.control.client import call
    from wherry.core.clock import Deadline
    from wherry.service.status import describe

    deadline = Deadline(_STATUS_TIMEOUT_S)
    try:
        fields: dict[str, Any] = call(
            where.platform, paths.control_socket, "status", timeout_s=_STATUS_TIMEOUT_S
        )
    except WherryError as error:
        fields = describe(where, paths)
        # Not one that left just now, as at the end of a stop.
        if deadline.passed and fields["service_pid"] is not None:
            fields |= {"state": "broken", "reason": error.message}
    return fields


def _guest(fields: dict[str, Any]) -> str | None:
    guest = fields["guest"]
    if not guest:
        return None
    memory, disk = (
        f"{format_size(_rounded(guest[f'{what}_used_bytes']))} of "
        f"{format_size(_rounded(guest[f'{what}_total_bytes']))} {what}"
        for what in ("memory", "disk")
    )
    ahead = guest["clock_offset_s"]
    clock = f", clock off by {ahead:+.1f} s" if abs(ahead) >= _CLOCK_WORTH_TELLING_S else ""
    return f"uses {memory}, {disk}{clock}"


def _engine(fields: dict[str, Any]) -> str | None:
    """Return the engine's version and, of a machine that runs, whether it answers in the guest."""
    # A service that has run since before an update does not tell the latter two.
    version, problem = fields["engine_version"], fields.get("engine_problem")
    health = fields.get("engine_health") or ("health not known" if problem else None)
    told = ", ".join(filter(None, (version, health)))
    return f"{told} ({problem})" if problem else told


def _rounded(size: int) -> int:
    """Return a size to the MiB, or above 10 GiB to the GiB, which print shortly."""
    unit = 1 << 30 if size >= 10 << 30 else 1 << 20
    return round(size / unit) * unit


@click.command()
@name_argument
@json_option
def status(name: str, as_json: bool) -> None:
    """Show the state of machine NAME."""
    from wherry.service import machine

    where = layout()
    fields = status_of(where, machine.require(where, name))
    if as_json:
        print_json(fields)
        return
    memory = fields["memory_bytes"]
    default = fields["default_socket"] or {}
    lines = {
        "State": fields["state"] + (f" ({fields['reason']})" if fields["reason"] else ""),
        "Docker host": fields["docker_host"],
        "Context": fields["docker_context"],
        "Default": default.get("problem") or (default["path"] if default.get("claimed") else None),
        "Engine": _engine(fields),
        "Accelerator": fields["accelerator"],
        "Size": f"{fields['cpus']} CPUs, {format_size(memory)} memory" if memory else None,
        "Guest": _guest(fields),
        "Image": fields["image"]["version"] if fields["image"] else None,
        "Uptime": f"{fields['uptime_s']:.0f} s" if fields["uptime_s"] else None,
    }
    click.echo(f"Machine {name}")
    for label, value in lines.items():
        if value:
            click.echo(f"  {label + ':':<13}{value}")


@click.command("list")
@json_option
def list_(as_json: bool) -> None:
    """Show all machines."""
    from concurrent.futures import ThreadPoolExecutor

    where = layout()
    # At once, so that services which hang are waited for together.
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        machines = list(
            pool.map(lambda name: status_of(where, where.machine(name)), where.machine_names())
        )
    if as_json:
        print_json(machines)
        return
    print_table(
        ("NAME", "STATE", "CPUS", "MEMORY", "DISK", "CONTEXT"),
        [
            (
                fields["name"],
                fields["state"],
                str(fields["cpus"] or "?"),
                format_size(fields["memory_bytes"]) if fields["memory_bytes"] else "?",
                format_size(fields["disk_bytes"]) if fields["disk_bytes"] else "?",
                fields["docker_context"],
            )
            for fields in machines
        ],
    )
