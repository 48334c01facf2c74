"""The guest's rules that lead names to the host, with programs that play iptables."""

from __future__ import annotations

import shutil

import pytest

from wherry_guest import network

from .conftest import Programs

# As iptables does with -C: whether there is such a rule.
CHECK = """
case "$*" in
*" -C "*) grep -q -e "${*##* }" "$0.rules" ;;
esac
"""
KEEP = """cat >"${0%-restore}.rules" """


@pytest.fixture
def rules(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> Programs:
    for name in ("cat", "grep"):
        found = shutil.which(name, path="/usr/bin:/bin")
        assert found is not None
        (programs.directory / name).symlink_to(found)
    programs.install("iptables", CHECK)
    programs.install("iptables-restore", KEEP)
    return programs


def leads_to(rules: Programs) -> set[str]:
    text = (rules.directory / "iptables.rules").read_text()
    return {line.split()[-1] for line in text.splitlines() if "DNAT" in line}


def test_an_agent_that_ends_takes_back_what_it_has_set(rules: Programs) -> None:
    network.lead_names(1111)
    assert leads_to(rules) == {"10.0.2.2:1111"}
    network.lead_names_back(1111)
    assert leads_to(rules) == set()


def test_an_agent_that_ends_late_leaves_what_another_one_has_set(rules: Programs) -> None:
    network.lead_names(1111)
    network.lead_names(2222)
    network.lead_names_back(1111)
    assert leads_to(rules) == {"10.0.2.2:2222"}
