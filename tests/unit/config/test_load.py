"""Files, conf.d and --set: what is read, in which order, and what is said when it cannot be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpserverd import limits
from mpserverd.config.load import load, loads, override_value
from mpserverd.config.schema import Config
from mpserverd.errors import ConfigError


def faults(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        load(path, overrides)
    return refused.value.faults


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "main.toml"
    path.write_text("")
    return path


def add_conf_d(file: Path, name: str, text: str) -> Path:
    directory = file.parent / "conf.d"
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text(text)
    return path


def test_missing_file_is_named_with_the_way_out(tmp_path: Path) -> None:
    (fault,) = faults(tmp_path / "none.toml")
    assert fault == f"{tmp_path}/none.toml: no such file; name another one with --config"


def test_directory_instead_of_a_file_is_said(tmp_path: Path) -> None:
    assert faults(tmp_path) == [f"{tmp_path}: a directory; name the file in it"]


def test_fifo_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert faults(tmp_path / "fifo") == [f"{tmp_path}/fifo: not a regular file"]


def test_file_that_cannot_be_read_says_why() -> None:
    """Address 0 of a process is never mapped, so the kernel answers EIO, to root too."""
    assert faults(Path("/proc/self/mem")) == ["/proc/self/mem: cannot be read: Input/output error"]


def test_file_of_other_bytes_names_the_first_wrong_one(file: Path) -> None:
    file.write_bytes(b"[log]\n# \xff\n")
    assert faults(file) == [f"{file}: not UTF-8 text: byte 8 is 0xff"]


def test_file_beyond_the_bound_is_refused(file: Path) -> None:
    with open(file, "wb") as out:
        out.truncate(limits.CONFIG_FILE_BYTES_MAX + 1)
    assert "longer than" in faults(file)[0]


def test_syntax_error_names_file_and_line(file: Path) -> None:
    file.write_text("[server]\nworkers = = 3\n")
    (fault,) = faults(file)
    assert fault.startswith(f"{file}: not valid TOML: ")
    assert "line 2" in fault


def test_deep_nesting_is_a_fault_and_no_crash(file: Path) -> None:
    for text in ("x = " + "[" * 100_000, "x = " + "[" * 17 + "]" * 17, "a." * 5_000 + "a = 1"):
        file.write_text(text)
        assert faults(file) == [f"{file}: nested too deeply; at most 16 levels"]


@pytest.mark.parametrize("key", ["server.workers", "server.stop_timeout_s", "spool.max_bytes", "spool.path", "x.y"])
def test_number_of_thousands_of_digits_is_a_fault_with_its_file(file: Path, key: str) -> None:
    section, _, name = key.partition(".")
    file.write_text(f"[{section}]\n{name} = {'9' * 5_000}\n")
    assert faults(file)[0] == f"{file}: not valid TOML: a number with too many digits"
    file.write_text(f"[{section}]\n{name} = 0x{'f' * 20_000}\n")
    (fault,) = faults(file)
    assert fault.startswith(f"{file}: {section}") and len(fault) < 300


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        (f"server.workers={'9' * 5_000}", 'server.workers = "999'),
        (f"server.workers=0x{'f' * 5_000}", "server.workers = 0xfff"),
        (f"server.cpu_affinity=[0x{'f' * 5_000}]", "entry 0 (0xfff"),
        (f"server.workers={'[' * 100_000}", 'server.workers = "[[['),
        (f"server.workers={'[' * 20}{']' * 20}", "nested too deeply"),
        ("a." * 100_000 + "a=1", "nested too deeply"),
        (f"listener.{'9' * 5_000}.name=x", "is no number from 0 to 0"),
        ("server.user=\udcff", "server.user"),
        ("se\nrver.a=1", "unknown section"),
        ("se\nrver.a.1.x=1", "1 is no number from 0 to 0"),
        ("server.1\n2.x.y=1", "unknown key"),
        ("listener.a\nb.x=1", "not a list of tables"),
    ],
)
def test_override_of_any_size_and_shape_is_one_line(override: str, fault: str) -> None:
    with pytest.raises(ConfigError) as refused:
        loads("", [override])
    (line,) = refused.value.faults
    assert fault in line and "\n" not in line and len(line) < 400


def test_override_that_is_refused_begins_no_table() -> None:
    with pytest.raises(ConfigError) as refused:
        loads("", ["listener.7.address=127.0.0.1:1", "layout.x.3.y=1"])
    assert refused.value.faults == [
        "--set listener.7.address: 7 is no number from 0 to 0, which would append",
        "--set layout.x.3.y: 3 is no number from 0 to 0, which would append",
    ]


def test_conf_d_merges_tables_and_the_later_name_wins(file: Path) -> None:
    file.write_text("[server]\nworkers = 2\nbacklog = 7\n")
    add_conf_d(file, "20.toml", "[server]\nworkers = 5\n")
    add_conf_d(file, "10.toml", "[server]\nworkers = 3\nmax_clients = 20\n")
    add_conf_d(file, "30.toml.bak", "not toml at all")
    config = load(file)
    assert (config.server.workers, config.server.backlog, config.server.max_clients) == (5, 7, 20)
    assert load(file, conf_d=False).server.workers == 2


def test_conf_d_appends_listeners_and_replaces_lists(file: Path) -> None:
    file.write_text('[[listener]]\nname = "a"\n[log]\ntarget = ["stderr"]\n')
    add_conf_d(file, "1.toml", '[[listener]]\nname = "b"\naddress = "127.0.0.1:1"\n[log]\ntarget = ["file"]\n')
    config = load(file)
    assert [listener.name for listener in config.listeners] == ["a", "b"]
    assert config.log.target == ("file",)


def test_each_fault_names_the_file_that_it_is_in(file: Path) -> None:
    file.write_text('[server]\nworkers = 0\n[[listener]]\nname = "a"\n')
    extra = add_conf_d(file, "1.toml", '[server]\nbacklog = 0\n[[listener]]\nname = "b"\naddress = "x"\n')
    found = faults(file, "server.nice=99")
    assert [(fault.split(": ")[0], fault.split(": ")[1].split(" = ")[0]) for fault in found] == [
        (str(file), "server.workers"),
        (str(extra), "server.backlog"),
        ("--set", "server.nice"),
        (str(extra), "listener.1.address"),
    ]


def test_faults_of_several_files_come_together(file: Path) -> None:
    file.write_text("broken")
    extra = add_conf_d(file, "1.toml", "[server]\nworkers = 0\n")
    found = faults(file)
    assert found[0].startswith(f"{file}: not valid TOML")
    assert found[1].startswith(f"{extra}: server.workers")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2", 2),
        ("0.5", 0.5),
        ("true", True),
        ('["a"]', ["a"]),
        ("/x", "/x"),
        ("none", "none"),
        ("64 MiB", "64 MiB"),
        ("127.0.0.1:0", "127.0.0.1:0"),
        ('"2"', "2"),
        ("", ""),
        ("1\nother = 2", "1\nother = 2"),
    ],
)
def test_override_is_toml_or_else_text(text: str, value: object) -> None:
    assert override_value(text) == value


@given(st.text())
def test_no_override_makes_the_parser_fail_in_an_unknown_way(text: str) -> None:
    override_value(text)


def test_override_wins_over_everything(file: Path) -> None:
    file.write_text("[server]\nworkers = 2\n")
    add_conf_d(file, "1.toml", "[server]\nworkers = 3\n")
    assert load(file, ["server.workers=5", "spool.path=/x", "server.workers=6"]).server.workers == 6


def test_override_reaches_into_the_default_listener() -> None:
    config = loads("", ["listener.0.address=127.0.0.1:0", "listener.0.on_full=block"])
    assert [(listener.name, listener.address) for listener in config.listeners] == [("raw", "127.0.0.1:0")]


def test_override_appends_a_listener() -> None:
    config = loads('[[listener]]\nname="a"', ["listener.1.name=b", "listener.1.address=127.0.0.1:0"])
    assert [listener.name for listener in config.listeners] == ["a", "b"]


def test_override_makes_a_layout() -> None:
    config = loads("", ["layout.a.size=1", 'layout.a.fields={x="u1"}', "listener.0.layout=a"])
    assert config.listeners[0].packet_size == 1


@pytest.mark.parametrize("override", ["workers", "server=", "=3", ".workers=3", "server.=3", "", "x=1"])
def test_override_without_key_or_value_says_the_form(override: str) -> None:
    with pytest.raises(ConfigError, match=r"write KEY=VALUE, such as server.workers=2"):
        loads("", [override])


@pytest.mark.parametrize("override", ["listener.2.name=x", "listener.x.name=x", "listener.-1.name=x"])
def test_override_beyond_the_list_is_a_fault(override: str) -> None:
    with pytest.raises(ConfigError, match="is no number from 0 to 1"):
        loads("[[listener]]", [override])


def test_override_inside_a_plain_value_is_a_fault() -> None:
    with pytest.raises(ConfigError, match=r"server\.workers is no table"):
        loads("[server]\nworkers = 3", ["server.workers.x=3"])


def test_equals_sign_in_a_value_is_kept() -> None:
    assert loads("", ["log.file=/a=b"]).log.file == "/a=b"


@given(st.text(max_size=200))
def test_any_text_gives_settings_or_faults(text: str) -> None:
    try:
        assert isinstance(loads(text), Config)
    except ConfigError as error:
        assert all("\n" not in fault for fault in error.faults)
