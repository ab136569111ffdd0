"""Content and plan of a chaos run: made of the seed alone, and fair."""

from __future__ import annotations

import collections
import pathlib

import numpy as np
import pytest

from mpserverd.config.load import load
from mpserverd.load.chaos_content import PIECE_BYTES_MAX, Content, sequence_bytes
from mpserverd.load.chaos_plan import (
    PACKET_SIZES,
    WARM_UP_S,
    ChaosOptions,
    FaultKind,
    Habit,
    config_text,
    plan_clients,
    plan_daemon,
    plan_faults,
)

# -- content


@pytest.mark.parametrize("size", PACKET_SIZES)
def test_every_piece_is_a_part_of_one_and_the_same_stream(size: int) -> None:
    content = Content(1, 2, 3, size)
    whole = content.piece(0, 100_000).tobytes()
    for first, end in ((0, 0), (0, 1), (1, size), (size - 1, size + 1), (70_001, 99_999)):
        assert content.piece(first, end).tobytes() == whole[first:end]


@pytest.mark.parametrize("size", PACKET_SIZES)
def test_each_packet_carries_its_number_first(size: int) -> None:
    content, width = Content(1, 2, 3, size), sequence_bytes(size)
    far = 70_000
    packet = content.piece(far * size, (far + 1) * size).tobytes()
    assert int.from_bytes(packet[:width], "little") == far
    assert content.numbers_of(np.frombuffer(packet, np.uint8).reshape(1, size)).tolist() == [far]


def test_a_number_that_no_stream_has_is_still_a_number() -> None:
    rows = np.full((1, 16), 255, np.uint8)
    assert Content(1, 0, 0, 16).numbers_of(rows)[0] == np.iinfo(np.int64).max


def test_two_streams_have_nothing_in_common() -> None:
    """But for the numbers."""
    pieces = {
        Content(seed, client, number, 24).piece(0, 2400).reshape(-1, 24)[:, 8:].tobytes()
        for seed, client, number in ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2))
    }
    assert len(pieces) == 4


def test_a_packet_occurs_once_in_a_stream() -> None:
    rows = Content(5, 0, 0, 7).packets(np.arange(100_000))
    assert len({row.tobytes() for row in rows}) == 100_000


@pytest.mark.parametrize(("first", "end"), [(-1, 0), (5, 4), (0, PIECE_BYTES_MAX + 1)])
def test_a_piece_that_makes_no_sense_is_refused(first: int, end: int) -> None:
    with pytest.raises(ValueError, match="bytes"):
        Content(1, 0, 0, 16).piece(first, end)


def test_packets_without_room_for_a_number_are_refused() -> None:
    with pytest.raises(ValueError, match="no room"):
        Content(1, 0, 0, 3)


# -- plan


def test_the_same_seed_makes_the_same_plan_and_another_one_another() -> None:
    def everything(seed: int) -> object:
        options = ChaosOptions(seed=seed, clients=20)
        return plan_clients(options), plan_faults(options, list(FaultKind)), plan_daemon(options)

    assert everything(7) == everything(7) != everything(8)


def test_every_habit_and_every_size_is_as_frequent_as_any_other() -> None:
    clients = plan_clients(ChaosOptions(clients=20))
    assert set(collections.Counter(client.habit for client in clients).values()) == {20 // len(Habit)}
    assert set(collections.Counter(client.packet_size for client in clients).values()) == {20 // len(PACKET_SIZES)}
    assert len({client.address for client in plan_clients(ChaosOptions(clients=1000))}) == 1000


def test_clients_have_the_habits_that_are_asked_for_only() -> None:
    clients = plan_clients(ChaosOptions(clients=9, habits=(Habit.TORN, Habit.STEADY)))
    assert {client.habit for client in clients} == {Habit.TORN, Habit.STEADY}


def test_faults_come_in_order_within_the_duration_and_every_kind_alike() -> None:
    kinds = [FaultKind.WORKER, FaultKind.STORER, FaultKind.STOP]
    faults = plan_faults(ChaosOptions(duration_s=10.0, faults=300), kinds)
    moments = [fault.at_s for fault in faults]
    assert moments == sorted(moments) and moments[0] >= WARM_UP_S and moments[-1] <= 10.0
    assert collections.Counter(fault.kind for fault in faults) == dict.fromkeys(kinds, 100)


def test_without_kinds_nothing_happens() -> None:
    assert plan_faults(ChaosOptions(), []) == []


@pytest.mark.parametrize("seed", range(12))
def test_the_daemon_takes_the_configuration_of_every_seed(seed: int, tmp_path: pathlib.Path) -> None:
    options = ChaosOptions(seed=seed, clients=1 + 100 * seed)
    clients = plan_clients(options)
    path = tmp_path / "mpserverd.toml"
    path.write_text(config_text(plan_daemon(options), clients, tmp_path, workers=3))
    config = load(path)
    assert {client.id for client in config.clients} == {client.name for client in clients if client.named}
    assert {listener.packet_size for listener in config.listeners} == {client.packet_size for client in clients}
