"""What a reload can change."""

from __future__ import annotations

import pytest

from mpserverd.config.load import loads
from mpserverd.config.options import OPTIONS
from mpserverd.config.words import Applies
from mpserverd.errors import ConfigError
from mpserverd.supervisor.settings import FIXED, effective

BASE = """
[server]
max_clients = 10
[layout.sample]
size = 16
fields = {{ sequence = "<u8", time = "<u8" }}
[[listener]]
name = "raw"
address = "127.0.0.1:8888"
{listener}
"""


def config(listener: str = "", more: str = "", *overrides: str) -> object:
    return loads(BASE.format(listener=listener) + more, overrides)


def test_the_same_configuration_needs_nothing() -> None:
    assert effective(config(), config(), 10) == (config(), [])


def test_fixed_keys_stay_and_are_named() -> None:
    new = config("", "", "spool.path=/elsewhere", "buffers.bytes=33554432", "server.workers=7")
    result, kept = effective(config(), new, 10)
    assert kept == ["buffers.bytes", "spool.path"]
    assert result.spool.path == config().spool.path
    assert result.server.workers == 7


def test_more_clients_than_the_tables_hold_need_a_restart() -> None:
    result, kept = effective(config(), config("", "", "server.max_clients=50"), 20)
    assert result.server.max_clients == 20
    assert kept == ["server.max_clients (the tables hold 20)"]


def test_a_layout_that_changed_keeps_its_meaning_for_live_streams() -> None:
    old = config('layout = "sample"')
    new = loads(
        """
        [layout.sample]
        size = 8
        fields = { sequence = "<u8" }
        [[listener]]
        name = "raw"
        address = "127.0.0.1:8888"
        layout = "sample"
        """
    )
    result, kept = effective(old, new, 10)
    assert kept == ["layout.sample"]
    assert result.layouts["sample"].size == 16
    assert result.listeners[0].packet_size == 16


def test_a_layout_that_is_gone_is_kept_for_connections_that_still_have_it() -> None:
    result, _ = effective(config('layout = "sample"'), loads(""), 10)
    assert "sample" in result.layouts


def test_fixed_keys_are_those_that_apply_at_the_start() -> None:
    fixed = {f"{section}.{key}" for section, keys in FIXED.items() for key in keys}
    options = {option.key for option in OPTIONS if option.applies is Applies.START and option.section != "layout"}
    assert fixed == options


def test_what_stays_must_go_together_with_what_changes() -> None:
    """Each file is fine by itself; the old memory with the new number of workers is not."""
    new = config("", "", "buffers.bytes=134217728", "server.workers=64", "server.max_clients=500")
    with pytest.raises(ConfigError) as error:
        effective(config(), new, 1000)
    first, last = error.value.faults
    assert "buffers.bytes = 67108864: too little" in first
    assert last == "a restart takes over buffers.bytes too"
