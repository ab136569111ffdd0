"""What is printed loads again to the same settings."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpserverd.config.load import loads
from mpserverd.config.options import OPTIONS
from mpserverd.config.schema import Config
from mpserverd.config.show import as_dict, as_toml, default_toml, listing, toml_value

RICH = """
[server]
cpu_affinity = [0, 2]
[[listener]]
name = "a"
layout = "sample"
allow = ["10.0.0.0/8", "::1"]
[[listener]]
name = "b"
address = "[::1]:0"
packet_size = 7
[[client]]
id = "press"
address = "10.0.0.7"
max_spool_bytes = "1 GiB"
[layout.sample]
size = 16
fields = { sequence = "<u8", time = "<u8" }
time = "time"
[log]
target = ["file", "stderr"]
file = '/var/log/a "quoted" \\ name'
"""


@pytest.mark.parametrize("text", ["", RICH], ids=["defaults", "rich"])
def test_toml_of_settings_loads_to_the_same_settings(text: str) -> None:
    config = loads(text)
    assert loads(as_toml(config)) == config


def test_dictionary_is_json_with_all_defaults() -> None:
    shown = json.loads(json.dumps(as_dict(loads(RICH))))
    assert shown["server"]["cpu_affinity"] == [0, 2]
    assert shown["listener"][0]["allow"] == ["10.0.0.0/8", "::1"]
    assert shown["listener"][1]["on_full"] == "drop-oldest"
    assert "packet_size" not in shown["listener"][0]
    assert shown["client"] == [{"id": "press", "address": "10.0.0.7", "max_spool_bytes": 1 << 30}]
    assert shown["layout"]["sample"]["fields"] == {"sequence": "<u8", "time": "<u8"}


def test_default_file_loads_to_the_defaults() -> None:
    assert loads(default_toml()) == Config()


def test_listing_names_every_option() -> None:
    lines = listing().splitlines()
    assert [line.split("  (")[0] for line in lines if line and not line.startswith(" ")] == [o.key for o in OPTIONS]
    assert max(len(line) for line in lines) <= 120


@given(st.text())
def test_any_text_survives_as_a_toml_string(text: str) -> None:
    import tomli  # noqa: PLC0415

    assert tomli.loads(f"a = {toml_value(text)}")["a"] == text
