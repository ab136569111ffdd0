"""Packet layouts: types, round trip, and every way to get one wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpserverd.protocol.layout import PacketLayout

SAMPLE = PacketLayout("sample16", 16, (("sequence", "<u8"), ("time", "<u8")), sequence="sequence", time="time")
CODES = ["?", "i1", "<i2", ">i4", "<i8", "u1", ">u2", "<u4", ">u8", "<f2", ">f4", "<f8", "S5", "V3"]


@dataclass
class Table:
    """What the configuration holds."""

    name: str = "press"
    size: int = 7
    fields: dict[str, str] = field(default_factory=lambda: {"state": "u1", "number": ">u4"})
    sequence: str | None = "number"
    time: str | None = None


def test_fields_are_packed_in_order_and_the_rest_of_the_packet_has_no_name() -> None:
    layout = PacketLayout.from_config(Table())
    assert layout.dtype.itemsize == 7
    assert layout.dtype.names == ("state", "number")
    assert (layout.sequence_offset, layout.sequence_dtype) == (1, np.dtype(">u4"))
    assert np.frombuffer(b"\x01\x00\x00\x00\x05zz", layout.dtype)["number"][0] == 5


def test_opaque_packets_are_blocks_of_bytes() -> None:
    layout = PacketLayout.opaque(24)
    assert layout.is_opaque
    assert layout.dtype == np.dtype("V24")
    assert PacketLayout.from_json(layout.to_json()) == layout


def test_the_time_has_a_type_and_a_place() -> None:
    assert (SAMPLE.time_offset, SAMPLE.time_dtype) == (8, np.dtype("<u8"))
    with pytest.raises(ValueError, match="no such field"):
        PacketLayout.opaque(8).time_dtype  # noqa: B018


def test_the_json_in_the_catalog_has_the_documented_keys() -> None:
    assert json.loads(SAMPLE.to_json()) == {
        "name": "sample16",
        "size": 16,
        "fields": {"sequence": "<u8", "time": "<u8"},
        "sequence": "sequence",
        "time": "time",
    }


@given(st.lists(st.sampled_from(CODES), min_size=1, max_size=20), st.integers(0, 9), st.data())
def test_any_layout_survives_its_json(codes: list[str], rest: int, data: st.DataObject) -> None:
    fields = tuple((f"f{at}", code) for at, code in enumerate(codes))
    integers = [name for name, code in fields if np.dtype(code).kind in "iu"]
    sequence = data.draw(st.sampled_from([None, *integers]))
    layout = PacketLayout("x", sum(np.dtype(code).itemsize for code in codes) + rest, fields, sequence)
    again = PacketLayout.from_json(layout.to_json())
    assert again == layout
    assert again.dtype == layout.dtype
    assert again.dtype.itemsize == layout.size


@pytest.mark.parametrize(
    ("size", "fields", "roles", "message"),
    [
        (0, {}, {}, "from 1 to 65536"),
        (65_537, {}, {}, "from 1 to 65536"),
        (True, {}, {}, "from 1 to 65536"),
        (8, {"a": "<u8", "b": "u1"}, {}, "take 9 bytes, size is 8"),
        (8, {"a": "O"}, {}, "not a plain number"),
        (8, {"a": "u4,u4"}, {}, "not a plain number"),
        (8, {"a": "(2,)u4"}, {}, "not a plain number"),
        (8, {"a": "U2"}, {}, "not a plain number"),
        (8, {"a": "M8[ns]"}, {}, "not a plain number"),
        (16, {"a": "g"}, {}, "not a plain number"),
        (8, {"a": "S0"}, {}, "not a plain number"),
        (8, {"a": "banana"}, {}, "not a numpy type code"),
        (8, {"a": 8}, {}, "is not text"),
        (8, {"": "u1"}, {}, "printable characters"),
        (8, {"a\n": "u1"}, {}, "printable characters"),
        (8, {"a": "<f8"}, {"sequence": "a"}, "must be an integer"),
        (8, {"a": "<u4"}, {"time": "a"}, "must have 8 bytes"),
        (8, {"a": "<u4"}, {"sequence": "b"}, "not there"),
        (8, {}, {"sequence": "b"}, "not there"),
        (2000, {f"f{at}": "u1" for at in range(257)}, {}, "at most 256"),
    ],
)
def test_a_layout_that_makes_no_sense_says_why(size: int, fields: dict, roles: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PacketLayout("x", size, tuple(fields.items()), **roles)


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"'a'.*'b'"):
        PacketLayout("x", 8, (("a", "O"), ("b", "banana")))


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"name": "x", "size": 8, "fields": 3}'])
def test_what_is_no_layout_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        PacketLayout.from_json(text)
