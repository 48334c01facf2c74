"""config.toml: what is read, what is refused and where, what editing keeps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wherry.config.load import edit, load, load_for, parse, read_values
from wherry.config.model import GIB, SETTINGS, build, host_problem
from wherry.config.units import format_size, parse_size
from wherry.core.errors import ConfigError, UsageError
from wherry.platform import Platform

HERE = Path("config.toml")


def test_a_missing_file_means_defaults(tmp_path: Path, host: Platform) -> None:
    config = load(tmp_path / "config.toml", host)
    assert (config.cpus, config.memory_bytes, config.disk_bytes) == (4, 4 * GIB, 64 * GIB)
    assert (config.accelerator, config.image, config.default_socket) == ("auto", "", False)


def test_defaults_fit_a_small_host(host: Any) -> None:
    host.cpus, host.memory = 1, 2 * GIB
    config = build({}, host)
    assert (config.cpus, config.memory_bytes) == (1, GIB)
    assert host_problem(config, host) is None


def test_every_setting_is_read(host: Platform) -> None:
    text = """
cpus = 2
memory = "1.5 GiB"
disk = 10737418240
accelerator = "tcg"
image = "1.0"
[endpoint]
default_socket = true
[engine]
log-driver = "local"
"""
    config = build(parse(text, HERE), host)
    assert (config.cpus, config.memory_bytes, config.disk_bytes) == (2, 3 * GIB // 2, 10 * GIB)
    assert (config.accelerator, config.image, config.default_socket) == ("tcg", "1.0", True)
    assert config.engine == {"log-driver": "local"}


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("cpus = 2\n\n# note\nmemroy = '4GiB'\n", 4, "unknown key memroy; did you mean memory?"),
        ("xyzzy = 1", 1, "unknown key xyzzy; known keys: cpus, memory,"),
        ("[endpoint]\n\ndefault_sockets = true", 3, "did you mean endpoint.default_socket?"),
        ("[nowhere]\na = 1", 2, "unknown key nowhere.a"),
        ("[a.b]\nc = 1", 2, "unknown key a.b.c"),
        ("[ a ] # it\n'c' = 1", 2, "unknown key a.c"),
        ("memory . size = 1", 1, "unknown key memory.size"),
        ('["a"]\nc = 1', 2, "unknown key a.c"),
        ("endpoint.default_socket = 3", 1, "3 is neither true nor false"),
        ("# memory = 1\nmemory = 'lots'", 2, "'lots' is not a size such as 4GiB"),
        ("memory = 5.5", 1, "5.5 is not a size"),
        ("memory = true", 1, "True is not a size"),
        ("memory = '100MiB'", 1, "100 MiB is below the least, 512 MiB"),
        ("disk = '1MiB'", 1, "1 MiB is below the least, 1 GiB"),
        ("disk = '99999999999999TiB'", 1, "is more than any disk or memory has"),
        (f"disk = 1{'0' * 400}", 1, "is more than any disk or memory has"),
        ("cpus = 0", 1, "0 is not a whole number above 0"),
        ("cpus = -1", 1, "-1 is not a whole number above 0"),
        ("cpus = 2.0", 1, "2.0 is not a whole number above 0"),
        ("cpus = true", 1, "True is not a whole number above 0"),
        ("cpus = [1]", 1, "[1] is not a whole number above 0"),
        ("accelerator = 'warp'", 1, "'warp' is none of auto, kvm, hvf, whpx, tcg"),
        ("image = 1", 1, "1 is not a text"),
        ("cpus = 1\nengine = 7", 2, "7 is not a table"),
        ("cpus = 1\ncpus = 2", 2, "not valid TOML"),
        ("cpus = 1\n\nmemory = ", 3, "not valid TOML"),
        ("cpus = 'a", 1, "not valid TOML"),
        ("cpus = 1\nmemory = '''x", 2, "not valid TOML"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(text: str, line: int, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, HERE)
    assert str(caught.value).startswith(f"config.toml:{line}: ")
    assert said in str(caught.value)
    assert caught.value.hint
    assert "\n" not in str(caught.value)


@given(st.lists(st.sampled_from(["", "# cpus = x", "  # memory", "\t"]), max_size=6))
def test_the_line_is_right_wherever_the_key_is(before: list[str]) -> None:
    text = "\n".join([*before, "cpus = 0"])
    with pytest.raises(ConfigError, match=rf"config\.toml:{len(before) + 1}: cpus"):
        parse(text, HERE)


def test_a_byte_order_mark_and_carriage_returns_are_no_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(b"\xef\xbb\xbfcpus = 2\r\n# kept\r\n")
    assert read_values(path) == {"cpus": 2}
    edit(path, {"memory": "1GiB"})
    assert read_values(path) == {"cpus": 2, "memory": GIB}
    assert b"# kept" in path.read_bytes()


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_values(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        read_values(path)


def test_editing_keeps_comments_and_order(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("# mine\ndisk = '2GiB'  # small\n\ncpus = 2\n[engine]\n# theirs\nipv6 = true\n")
    edit(path, {"cpus": "3", "memory": "1GiB", "engine.debug": "true"})
    text = path.read_text()
    assert text.index("# mine") < text.index("disk = '2GiB'  # small") < text.index("cpus = 3")
    assert "# theirs\nipv6 = true" in text
    assert read_values(path) == {
        "disk": 2 * GIB,
        "cpus": 3,
        "memory": GIB,
        "engine": {"ipv6": True, "debug": True},
    }


def test_unsetting_returns_to_the_default(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    edit(path, {"cpus": "3", "endpoint.default_socket": "true", "engine.mtu": "1400"})
    edit(path, {"cpus": None, "endpoint.default_socket": None, "engine.mtu": None})
    assert read_values(path).get("cpus") is None
    assert not read_values(path).get("engine")
    edit(path, {"memory": None, "engine.absent": None})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cpuz": "3"}, "unknown key cpuz; did you mean cpus?"),
        ({"cpuz": None}, "unknown key cpuz; did you mean cpus?"),
        ({"endpoint": "3"}, "unknown key endpoint"),
        ({"cpus.x": "3"}, "unknown key cpus.x"),
        ({"": "3"}, "unknown key"),
        ({"engine": "3"}, "engine: '3' is not a table"),
        ({"cpus": "many"}, "cpus: 'many' is not a whole number"),
        ({"memory": "1"}, "memory: 1 B is below the least"),
        ({"cpus": "2", "memory": "?"}, "memory: '?' is not a size"),
    ],
)
def test_a_wrong_edit_changes_nothing(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("cpus = 1\n")
    with pytest.raises(UsageError) as caught:
        edit(path, changes)
    assert said in str(caught.value)
    assert path.read_text() == "cpus = 1\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_malformed_file_is_not_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("cpus = \n")
    with pytest.raises(ConfigError, match=r"config\.toml:1: "):
        edit(path, {"cpus": "2"})
    assert path.read_text() == "cpus = \n"


_VALUES = st.fixed_dictionaries(
    {},
    optional={
        "cpus": st.integers(1, 10**6).map(str),
        "memory": st.integers(1, 4096).map(lambda n: f"{n}GiB"),
        "disk": st.integers(1, 4096).map(lambda n: f"{n} G"),
        "accelerator": st.sampled_from(["auto", "kvm", "hvf", "whpx", "tcg"]),
        "image": st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20),
        "endpoint.default_socket": st.sampled_from(["true", "false"]),
        "engine.log-level": st.sampled_from(["debug", "a b", "", "1.5.2"]),
    },
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=_VALUES, second=_VALUES)
def test_what_is_edited_is_what_is_read(
    first: dict[str, str], second: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "config.toml"
    path.unlink(missing_ok=True)
    edit(path, first)
    edit(path, second)
    found = read_values(path)
    engine = found.pop("engine", {})
    for key, raw in (first | second).items():
        if key.startswith("engine."):
            assert engine == {"log-level": raw}
        else:
            assert found.pop(key) == SETTINGS[key].parse(raw)
    assert not found


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"cpus": 9}, "cpus = 9 is more than the 8 of this computer"),
        ({"memory": 17 * GIB}, "memory = 17 GiB is more than the 16 GiB of this computer"),
        ({"accelerator": "hvf"}, "accelerator = hvf does not exist on linux"),
        ({"disk": 101 * GIB}, "disk = 101 GiB is more than the 100 GiB"),
    ],
)
def test_what_the_host_has_not_is_refused(
    values: dict[str, Any], said: str, host: Platform
) -> None:
    problem = host_problem(build(values, host), host, disk_total=100 * GIB)
    assert problem is not None
    assert said in problem.message
    assert [problem.key] == list(values)
    assert problem.hint


def test_what_a_file_asks_for_beyond_the_host_is_named_with_its_line(
    tmp_path: Path, host: Platform
) -> None:
    path = tmp_path / "config.toml"
    path.write_text("# mine\ncpus = 2\nmemory = '17GiB'\n")
    with pytest.raises(ConfigError) as caught:
        load_for(path, host, disk_total=100 * GIB)
    assert str(caught.value).startswith(f"{path}:3: memory = 17 GiB is more than the 16 GiB")
    assert caught.value.exit_status == 1
    path.unlink()
    # A default that does not fit has no line.
    with pytest.raises(ConfigError) as caught:
        load_for(path, host, disk_total=10 * GIB)
    assert str(caught.value).startswith(f"{path}: disk = 64 GiB is more than the 10 GiB")
    assert load_for(path, host, disk_total=100 * GIB).disk_bytes == 64 * GIB


def test_what_the_host_has_to_the_last_is_fine(host: Platform) -> None:
    values = {"cpus": 8, "memory": 16 * GIB, "disk": 100 * GIB, "accelerator": "kvm"}
    assert host_problem(build(values, host), host, disk_total=100 * GIB) is None


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1", 1),
        ("1b", 1),
        ("1k", 1 << 10),
        ("1KB", 1 << 10),
        ("1 KiB", 1 << 10),
        (" 4GiB ", 4 << 30),
        ("4g", 4 << 30),
        ("1.5G", 3 << 29),
        ("64 TiB", 64 << 40),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_a_size_of_many_digits_is_one() -> None:
    assert parse_size("9" * 400 + "T") > 10**411


@pytest.mark.parametrize(
    "text", ["", " ", "GiB", "-1G", "1,5G", "1e3", "0x10", "1GG", "nan", "inf"]
)
def test_no_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@given(st.one_of(st.text(), st.from_regex(r"\d+(\.\d+)?\s*[kmgtKMGT]?(i?[bB])?", fullmatch=True)))
def test_any_text_is_a_size_or_a_value_error(text: str) -> None:
    try:
        assert parse_size(text) >= 0
    except ValueError:
        pass


@given(st.integers(0, 1 << 62))
def test_a_shown_size_is_close_and_reads_back(size: int) -> None:
    shown = format_size(size)
    assert re.fullmatch(r"\d+(\.\d)? ([KMGT]i)?B", shown)
    assert abs(parse_size(shown) - size) <= max(0.05 * size, 0)


@given(st.integers(1, 1023), st.sampled_from([0, 1, 2, 3, 4]))
def test_a_whole_size_reads_back_exactly(number: int, power: int) -> None:
    size = number * 1024**power
    assert parse_size(format_size(size)) == size
