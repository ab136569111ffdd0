"""The option table is the only place for defaults, bounds and help, and everything that repeats it is held to it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from mpserverd.config import schema
from mpserverd.config.load import load, loads
from mpserverd.config.options import OPTIONS, SECTIONS, Missing, Option, of_section
from mpserverd.config.show import manual_row
from mpserverd.config.words import Applies

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = ROOT / "etc" / "mpserverd.toml"
MANUAL = ROOT / "docs" / "configuration.md"

CLASSES: dict[str, Any] = {
    "server": schema.ServerConfig,
    "buffers": schema.BuffersConfig,
    "listener": schema.ListenerConfig,
    "client": schema.ClientConfig,
    "layout": schema.LayoutConfig,
    "spool": schema.SpoolConfig,
    "log": schema.LogConfig,
}

every_option = pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.key)


def test_keys_are_unique() -> None:
    assert len({option.key for option in OPTIONS}) == len(OPTIONS)


@pytest.mark.parametrize("section", SECTIONS)
def test_settings_have_a_field_for_each_option_and_no_other(section: str) -> None:
    fields = [
        field.name for field in dataclasses.fields(CLASSES[section]) if (section, field.name) != ("layout", "name")
    ]
    assert sorted(fields) == sorted(of_section(section))


@every_option
def test_default_is_within_its_own_bounds(option: Option) -> None:
    if isinstance(option.default, Missing):
        return
    written = list(option.default) if isinstance(option.default, tuple) else option.default
    assert option.kind.parse(written) == option.default


@every_option
def test_row_has_help_that_is_a_sentence(option: Option) -> None:
    assert option.help.endswith(".")
    assert len(option.help) <= 120
    assert option.kind.wants()
    assert (option.default is Missing.DERIVED) == bool(option.default_text)


@every_option
def test_unit_is_in_the_name(option: Option) -> None:
    if option.unit == "s":
        assert re.search(r"_s(_max)?$", option.name)
    if option.unit == "bytes":
        assert "bytes" in option.name or option.name in ("packet_size", "size")


def test_keys_that_wait_for_a_restart_are_those_that_the_supervisor_keeps() -> None:
    from mpserverd.supervisor.settings import FIXED  # noqa: PLC0415  (the package of another process)

    kept = {f"{section}.{name}" for section, names in FIXED.items() for name in names}
    waiting = {option.key for option in OPTIONS if option.applies is Applies.START and option.section != "layout"}
    assert kept == waiting


# The manual


def test_manual_has_the_rows_of_the_table_in_its_order() -> None:
    rows = [line for line in MANUAL.read_text().splitlines() if line.startswith("| `")]
    assert rows == [manual_row(option) for option in OPTIONS]


def test_manual_has_a_heading_for_each_section() -> None:
    headings = re.findall(r"^## `(.+)`$", MANUAL.read_text(), re.MULTILINE)
    assert headings == [shape.value.format(name=section) for section, shape in SECTIONS.items()]


def test_example_faults_of_the_manual_are_what_is_printed() -> None:
    text = MANUAL.read_text()
    with pytest.raises(Exception, match="did you mean") as refused:
        loads("[server]\nwokers = 8", ["spool.segment_bytes=1000000"], name="/etc/mpserverd/mpserverd.toml")
    for fault in str(refused.value).splitlines():
        assert fault in text


# The shipped file


def uncommented() -> str:
    """The shipped file with its examples in force: settings that are comments have no space after the #."""
    return re.sub(r"^#(?=[a-z\[])", "", SHIPPED.read_text(), flags=re.MULTILINE)


def test_shipped_file_loads() -> None:
    config = load(SHIPPED)
    assert config.server.max_clients == 1000


def test_shipped_file_explains_every_option() -> None:
    section, written = "", set()
    for line in uncommented().splitlines():
        if heading := re.match(r"\[+([a-z]+)", line):
            section = heading[1]
        elif key := re.match(r"([a-z_]+) =", line):
            written.add(f"{section}.{key[1]}")
    assert written == {option.key for option in OPTIONS}


def test_examples_of_the_shipped_file_load() -> None:
    text = re.sub(r"^packet_size = .*$", "", uncommented(), flags=re.MULTILINE)
    config = loads(text)
    assert config.clients[0].id == "press-7"
    assert config.listeners[0].layout == "sample16"


def test_shipped_file_admits_private_networks_only() -> None:
    for listener in load(SHIPPED).listeners:
        assert listener.allow
        assert all(network.is_private or network.is_link_local for network in listener.allow)


def test_shipped_file_marks_what_needs_a_restart() -> None:
    """The comment above each such key says so."""
    section, comment = "", ""
    for line in uncommented().splitlines():
        if heading := re.match(r"\[+([a-z]+)", line):
            section = heading[1]
        elif line.startswith("#"):
            comment += line
        elif not line:
            comment = ""
        elif (key := re.match(r"([a-z_]+) =", line)) and section != "layout":
            assert ("(restart)" in comment) == (of_section(section)[key[1]].applies is Applies.START), key[1]


def test_sums_in_the_shipped_file_are_right() -> None:
    config, text = load(SHIPPED), SHIPPED.read_text().replace("\n# ", " ")
    client_bytes_per_s = 10_050 * 16
    all_bytes_per_s = client_bytes_per_s * config.server.max_clients
    chunks = 2 * config.server.max_clients + 8 * config.server.workers
    assert f"{client_bytes_per_s:,} bytes/s a client, {all_bytes_per_s / 1e6:.0f} MB/s" in text
    assert f"= {3 * config.server.max_clients + 1024:,} for LimitNOFILE" in text
    assert f"= {chunks * config.buffers.chunk_bytes / (1 << 20):.0f} MiB" in text
    assert f"are {config.buffers.bytes / all_bytes_per_s:.1f} s" in text
    assert f"are {config.spool.segment_bytes // client_bytes_per_s} s of a client" in text
    assert f"take {config.server.max_clients * config.spool.segment_bytes / (1 << 30):.1f} GiB" in text
    assert f"are {config.spool.max_bytes / all_bytes_per_s / 60:.0f} minutes" in text
    assert f"or {config.spool.max_bytes / client_bytes_per_s / 10 / 3600:.0f} hours of 10" in text
    assert f"are {config.spool.min_free_bytes / all_bytes_per_s:.0f} s at full" in text
    assert f"hold {config.listeners[0].receive_buffer_bytes / client_bytes_per_s:.1f} s" in text
