"""What one supervisor writes down, the next one reads, also one of another version."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from mpserverd.config.schema import Config, LayoutConfig, ListenerConfig
from mpserverd.supervisor.remembered import HALF_BYTES, Remembered, known_listeners, listener_facts

LAYOUT = LayoutConfig("sample", 16, {"sequence": "<u8", "time": "<u8"}, "sequence", "time")


@pytest.fixture
def remembered() -> Iterator[Remembered]:
    made = Remembered.create()
    yield made
    os.close(made.fd)


def test_nothing_was_written_yet(remembered: Remembered) -> None:
    assert remembered.read() == {}


def test_the_last_word_counts(remembered: Remembered) -> None:
    for number in range(5):
        remembered.write({"number": number, "text": "x" * (5 - number)})
        assert Remembered(remembered.fd).read()["number"] == number


def test_what_does_not_fit_changes_nothing(remembered: Remembered) -> None:
    remembered.write({"number": 1})
    remembered.write({"text": "x" * HALF_BYTES})
    assert remembered.read() == {"number": 1}


def test_listeners_come_back_with_their_numbers_and_layouts() -> None:
    config = Config(layouts={"sample": LAYOUT})
    listeners = {3: ListenerConfig(name="old", layout="sample"), 7: ListenerConfig(name="new", packet_size=48)}
    known, layouts = known_listeners(listener_facts(config, listeners, 8))
    assert known == listeners
    assert layouts.layouts == {"sample": LAYOUT}


def test_keys_of_another_version_are_left_out_or_have_their_default() -> None:
    known, _ = known_listeners({"listeners": {"1": {"name": "raw", "packet_size": 24, "from_the_future": 5}}})
    assert known == {1: ListenerConfig(name="raw", packet_size=24)}
