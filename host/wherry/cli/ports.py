"""ports."""

from __future__ import annotations

from typing import Any

import click

from wherry.cli.common import json_option, layout, name_argument, print_json, print_table

_TIMEOUT_S = 10.0


@click.command()
@name_argument
@json_option
def ports(name: str, as_json: bool) -> None:
    """Show where the containers of machine NAME are reachable."""
    from wherry.cli.status import status_of
    from wherry.control.client import call
    from wherry.core.errors import NotRunning
    from wherry.service import machine

    where = layout()
    paths = machine.require(where, name)
    if status_of(where, paths)["state"] != "running":
        raise NotRunning(f"machine {name} is not running", hint=f"start it: wherry start {name}")
    found: list[dict[str, Any]] = call(
        where.platform, paths.control_socket, "ports", timeout_s=_TIMEOUT_S
    )
    if as_json:
        print_json(found)
        return
    print_table(
        ("HOST", "CONTAINER", "KIND", "STATE"),
        [
            (
                f"{_address(each)}:{each['port']}/{each['protocol']}",
                f"{each['container']}:{each['container_port']}",
                each["kind"],
                each["state"] + (f": {each['reason']}" if each["reason"] else ""),
            )
            for each in found
        ],
    )


def _address(each: dict[str, Any]) -> str:
    address: str = each["address"]
    return f"[{address}]" if ":" in address else address
