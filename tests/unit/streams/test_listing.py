"""The list of streams: which ones, and what it says about each."""

from __future__ import annotations

import json

from spool_writer import SAMPLE16, SpoolWriter, noise

from mpserverd.streams import list_streams

DOCUMENTED = {
    "name",
    "epoch",
    "packet_size",
    "first_offset",
    "stored_bytes",
    "durable_bytes",
    "connected",
    "created",
}


def test_a_stream_is_described_by_the_documented_fields(spool: SpoolWriter) -> None:
    spool.add("a", noise(160), holes=[(32, 48, "dropped")], layout=SAMPLE16, connected=True)
    (info,) = list_streams(spool.path)
    shown = json.loads(json.dumps(info.as_json()))
    assert shown.keys() >= DOCUMENTED
    assert shown["created"] == "2023-11-14T22:13:20Z"
    assert (shown["stored_bytes"], shown["durable_bytes"], shown["connected"]) == (144, 144, True)
    assert (shown["holes"], shown["hole_bytes"], shown["layout"]) == (1, 16, "sample16")


def test_held_bytes_are_what_retention_and_holes_left(spool: SpoolWriter) -> None:
    spool.add("a", noise(160), cuts=[48], holes=[(32, 64, "lost")], first_offset=48)
    (info,) = list_streams(spool.path)
    assert (info.first_offset, info.durable_bytes, info.held_bytes) == (48, 128, 96)


def test_only_the_youngest_epoch_is_listed_unless_all_are_wanted(spool: SpoolWriter) -> None:
    spool.add("b", b"", epoch="3" * 16)
    spool.add("a", b"", epoch="2" * 16)
    spool.add("a", b"", epoch="1" * 16)
    assert [(info.name, info.epoch[0], info.current) for info in list_streams(spool.path)] == [
        ("a", "1", True),
        ("b", "3", True),
    ]
    assert [info.epoch[0] for info in list_streams(spool.path, all_epochs=True)] == ["2", "1", "3"]


def test_a_pattern_chooses_by_name(spool: SpoolWriter) -> None:
    for name in ("press-1", "press-2", "oven-1"):
        spool.add(name, b"")
    assert [info.name for info in list_streams(spool.path, pattern="press-*")] == ["press-1", "press-2"]
    assert [info.name for info in list_streams(spool.path, pattern="*-1")] == ["oven-1", "press-1"]


def test_a_layout_nobody_understands_does_not_hide_the_stream(spool: SpoolWriter) -> None:
    spool.add("a", b"", layout={"later": 1})
    assert [info.layout for info in list_streams(spool.path)] == ["unknown"]
