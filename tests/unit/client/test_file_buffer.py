"""A buffer file gives back what it promised, whatever ended the program or the machine; other files are left alone."""

from __future__ import annotations

import errno
import os
import pathlib
import random
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from mpserverd.client import file_buffer
from mpserverd.client.errors import BufferFileError, BufferFullError
from mpserverd.client.file_buffer import FileBuffer
from mpserverd.client.file_format import BLOCK_BYTES, RING_AT, SLOTS_AT, Geometry
from tests.unit.client.power_cut import Disk, Watched

SIZE = 16
CAPACITY = 640
SEEDS = 200
ROOT = pathlib.Path(__file__).resolve().parents[3]


def packet(place: int, size: int = SIZE) -> bytes:
    return (place.to_bytes(8, "little") * (size // 8 + 1))[:size]


def packets(first: int, count: int, size: int = SIZE) -> memoryview:
    return memoryview(b"".join(packet(place, size) for place in range(first, first + count)))


def append(buffer: FileBuffer, count: int) -> None:
    """The next packets; each says its place."""
    buffer.append(packets(buffer.end_place, count, buffer.packet_size))


def content(buffer: FileBuffer) -> bytes:
    at, end, found = buffer.base_place * buffer.packet_size, buffer.end_place * buffer.packet_size, b""
    while at < end:
        found += bytes(buffer.view(at, end - at))
        at = buffer.base_place * buffer.packet_size + len(found)
    return found


def held(buffer: FileBuffer) -> tuple[int, int]:
    """The places that are held, whose content is checked."""
    assert content(buffer) == bytes(packets(buffer.base_place, buffer.held, buffer.packet_size))
    return buffer.base_place, buffer.end_place


def opened(path: pathlib.Path, packet_size: int = SIZE, client_id: str = "press-7") -> FileBuffer:
    return FileBuffer(path, client_id, packet_size, CAPACITY * SIZE)


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "buffer"


@pytest.fixture
def disk(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk(path)
    monkeypatch.setattr(file_buffer, "flush_to_disk", disk.flush)
    return disk


def watched(disk: Disk, is_synced: bool = False) -> Watched:
    return Watched.on(disk, "press-7", SIZE, CAPACITY * SIZE, is_synced)


# -- the program's death


def test_what_was_appended_is_there_again_after_a_death_at_any_place_of_the_ring(disk: Disk) -> None:
    chance = random.Random(7)
    buffer = watched(disk)
    buffer.begin_epoch(5, 0, 1000)
    for _ in range(200):
        append(buffer, chance.randrange(1, buffer.room + 1) if buffer.room else 0)
        buffer.acknowledge(1000 + chance.randint(buffer.base_place, buffer.end_place))
        expected = held(buffer)
        buffer.die()
        buffer = watched(disk)
        base, end = held(buffer)
        assert (buffer.epoch, buffer.shift, end) == (5, 1000, expected[1])
        assert base <= expected[0]
        buffer.go_on(1000 + expected[0])
    buffer.close()


def test_a_file_that_was_closed_goes_on_in_another_object(path: pathlib.Path) -> None:
    buffer = opened(path)
    append(buffer, 10)
    buffer.close()
    buffer.close()
    with pytest.raises(BufferFileError, match="is closed"):
        append(buffer, 1)
    again = opened(path)
    assert held(again) == (0, 10)
    assert again.epoch is None
    again.close()


# -- the machine's death


def after_a_cut_that_took_the_newest(disk: Disk) -> Watched:
    """100 packets were acknowledged or sent; the file has lost those from 90 on."""
    buffer = watched(disk)
    buffer.begin_epoch(5, 0, 0)
    append(buffer, 90)
    buffer.sync()
    durable = disk.durable
    append(buffer, 10)
    buffer.die()
    disk.path.write_bytes(durable)
    disk.flush(0)
    return watched(disk)


@pytest.mark.parametrize("starts", [1, 2, 3])
def test_new_packets_survive_any_number_of_starts_before_the_first_ok(disk: Disk, starts: int) -> None:
    """The server has packets 90 to 99; what the program hands over after the power cut are others."""
    buffer = after_a_cut_that_took_the_newest(disk)
    append(buffer, 5)
    for _ in range(starts):
        buffer.die()
        buffer = watched(disk)
    assert buffer.go_on(100) == 10
    assert (buffer.base, buffer.end, held(buffer)) == (100, 105, (90, 95))
    buffer.close()


def test_a_power_cut_after_the_ok_changes_no_index(disk: Disk) -> None:
    """Before the first packet goes out, the file's indices are on the disk: only then may packets be sent."""
    buffer = after_a_cut_that_took_the_newest(disk)
    append(buffer, 5)
    buffer.sync()
    assert buffer.is_settled
    buffer.go_on(100)
    assert not buffer.is_settled
    buffer.settle()
    assert buffer.is_settled
    buffer.die()
    disk.path.write_bytes(disk.durable)
    buffer = watched(disk)
    assert (buffer.shift, held(buffer)[1]) == (10, 95)
    assert buffer.go_on(102) == 0
    assert (buffer.base, buffer.end) == (102, 105)
    buffer.close()


def test_what_was_sent_after_an_ok_that_left_nothing_out_is_not_doubtful_any_more(disk: Disk) -> None:
    buffer = after_a_cut_that_took_the_newest(disk)
    append(buffer, 5)
    assert buffer.go_on(90) == 0
    buffer.settle()
    buffer.die()
    disk.path.write_bytes(disk.durable)
    buffer = watched(disk)
    assert buffer.go_on(95) == 0  # the server has got all five, and no foreign ones
    assert buffer.held == 0
    buffer.close()


def test_a_power_cut_takes_nothing_that_was_synced(disk: Disk) -> None:
    """Any of the blocks written since the last sync may be on the disk, in any of their versions."""
    for seed in range(SEEDS):
        chance = random.Random(seed)
        size = chance.choice([300, 700, 1500])
        disk.path.unlink(missing_ok=True)
        buffer = Watched.on(disk, "press-7", size, size * chance.choice([20, 70, 130]), is_synced=True)
        buffer.begin_epoch(5, 0, 0)
        buffer.settle()
        synced = 0
        for _ in range(chance.randrange(5, 40)):
            wanted = min(buffer.room, chance.randrange(1, 30))
            if wanted and chance.random() < 0.6:
                append(buffer, wanted)
                if chance.random() < 0.4:
                    buffer.sync()
                    synced = buffer.end_place
            else:
                buffer.acknowledge(chance.randint(buffer.base_place, buffer.end_place))
        base, end = held(buffer)
        buffer.die()
        disk.cut(chance)
        buffer = Watched.on(disk, "press-7", size, size, is_synced=True)
        found_base, found_end = held(buffer)
        if base < synced:
            assert found_base <= base, f"seed {seed}"
        assert synced <= found_end <= end or base >= synced, f"seed {seed}"
        buffer.die()


def test_without_sync_a_power_cut_leaves_whole_packets_in_order(disk: Disk) -> None:
    """``held`` compares the content; what is missing may be anything that was not acknowledged."""
    for seed in range(SEEDS // 2):
        chance = random.Random(seed)
        disk.path.unlink(missing_ok=True)
        buffer = Watched.on(disk, "press-7", 700, 700 * 70)
        buffer.begin_epoch(5, 0, 0)
        buffer.settle()
        for _ in range(chance.randrange(5, 40)):
            append(buffer, min(buffer.room, chance.randrange(1, 30)))
            buffer.acknowledge(chance.randint(buffer.base_place, buffer.end_place))
        end = buffer.end_place
        buffer.die()
        disk.cut(chance)
        buffer = Watched.on(disk, "press-7", 700, 700 * 70)
        assert held(buffer)[1] <= end, f"seed {seed}"
        buffer.die()


# -- what is not our file


def test_a_file_is_of_one_client_at_a_time(path: pathlib.Path) -> None:
    buffer = opened(path)
    with pytest.raises(BufferFileError, match="in use by another client"):
        opened(path)
    program = (
        "import sys; from mpserverd.client.file_buffer import FileBuffer; FileBuffer(sys.argv[1], 'press-7', 16, 99)"
    )
    other = subprocess.run([sys.executable, "-c", program, path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "in use by another client" in other.stderr
    buffer.close()
    opened(path).close()


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda whole: b"#!/bin/sh\n" + whole[10:], "this is no buffer file"),
        (lambda whole: b"x", "this is no buffer file"),
        (lambda whole: whole[:8] + b"\x01" + whole[9:], "layout version 1, this program knows 2"),
        (lambda whole: whole[:16] + b"\xff" + whole[17:], "its header is damaged"),
        (lambda whole: whole[:BLOCK_BYTES] + bytes(2 * BLOCK_BYTES) + whole[RING_AT:], "no readable record"),
        (lambda whole: whole[: SLOTS_AT[0]], "no readable record"),
    ],
)
def test_what_is_no_buffer_file_is_refused_and_left_alone(
    path: pathlib.Path, spoil: Callable[[bytes], bytes], text: str
) -> None:
    opened(path).close()
    path.write_bytes(spoil(path.read_bytes()))
    before = path.read_bytes()
    with pytest.raises(BufferFileError, match=text):
        opened(path)
    assert path.read_bytes() == before


def test_a_file_of_another_client_or_packet_size_is_refused(path: pathlib.Path) -> None:
    opened(path).close()
    with pytest.raises(
        BufferFileError, match="belongs to client press-7 with packets of 16 bytes, not to press-7 with 32"
    ):
        opened(path, packet_size=32)
    with pytest.raises(BufferFileError, match="belongs to client press-7"):
        opened(path, client_id="press-8")


def test_a_file_that_was_cut_short_ends_where_it_was_cut(path: pathlib.Path) -> None:
    buffer = opened(path)
    append(buffer, 300)
    buffer.close()
    os.truncate(path, RING_AT + 100 * SIZE)
    again = opened(path)
    assert held(again) == (0, 100)
    append(again, 7)
    assert held(again) == (0, 107)
    again.close()


def test_a_torn_record_is_passed_over_for_the_one_before(path: pathlib.Path) -> None:
    buffer = opened(path)
    append(buffer, 5)
    append(buffer, 5)
    newest = SLOTS_AT[buffer._sequence % 2]
    os.close(buffer._descriptor)
    with path.open("r+b") as file:
        file.seek(newest + 100)
        file.write(b"torn")
    again = opened(path)
    assert held(again) == (0, 5)
    again.close()


def test_a_file_that_was_never_finished_is_made_again(path: pathlib.Path) -> None:
    path.write_bytes(bytes(20_000))
    buffer = opened(path)
    append(buffer, 3)
    assert held(buffer) == (0, 3)
    buffer.close()
    assert path.stat().st_size == Geometry.fitting(SIZE, CAPACITY * SIZE, "press-7").file_bytes


# -- the disk


def refuse(number: int) -> Callable[..., None]:
    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return refused


def test_a_disk_without_room_leaves_no_part_of_a_file(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", refuse(errno.ENOSPC))
    with pytest.raises(BufferFileError, match="cannot be made, it needs 22528 bytes: No space left"):
        opened(path)
    assert path.stat().st_size == 0
    monkeypatch.undo()
    opened(path).close()


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_disk_that_allocates_nothing_is_written_instead(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", refuse(number))
    buffer = opened(path)
    append(buffer, 3)
    buffer.close()
    assert path.stat().st_blocks * 512 >= RING_AT + CAPACITY * SIZE


def test_a_disk_that_fails_ends_the_taking_of_packets_and_not_the_sending(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = opened(path)
    append(buffer, 10)
    monkeypatch.setattr(os, "write", refuse(errno.EIO))
    for _ in range(2):
        with pytest.raises(BufferFileError, match="cannot be written: Input/output error"):
            append(buffer, 1)
    assert held(buffer) == (0, 10)
    buffer.begin_epoch(5, 0, 0)
    buffer.settle()
    assert buffer.is_settled
    buffer.acknowledge(4)
    assert held(buffer) == (4, 10)
    monkeypatch.undo()
    with pytest.raises(BufferFileError, match="cannot be written"):
        append(buffer, 1)  # what an error left in the file is not known
    buffer.close()


def test_a_sync_that_fails_is_told_and_never_tried_again(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = watched(disk)
    append(buffer, 10)
    monkeypatch.setattr(file_buffer, "flush_to_disk", refuse(errno.EIO))
    with pytest.raises(BufferFileError):
        buffer.sync()
    monkeypatch.setattr(file_buffer, "flush_to_disk", disk.flush)
    flushes = disk.flushes
    with pytest.raises(BufferFileError):
        buffer.sync()
    assert disk.flushes == flushes
    buffer.close()


def test_packets_appended_while_a_sync_runs_are_not_called_synced(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = watched(disk)
    append(buffer, 10)
    entered, may_end = threading.Event(), threading.Event()

    def slow(descriptor: int) -> None:
        entered.set()
        assert may_end.wait(30)

    monkeypatch.setattr(file_buffer, "flush_to_disk", slow)
    thread = threading.Thread(target=buffer.sync)
    thread.start()
    assert entered.wait(30)
    append(buffer, 5)
    may_end.set()
    thread.join()
    assert buffer._durable.end_place == 10
    assert buffer._durable.end_crc == buffer._crc_of(0, 10)
    buffer.close()


def test_a_full_ring_takes_nothing_more_and_goes_around_when_the_oldest_are_gone(path: pathlib.Path) -> None:
    buffer = opened(path)
    append(buffer, CAPACITY)
    with pytest.raises(BufferFullError):
        append(buffer, 1)
    assert held(buffer) == (0, CAPACITY)
    buffer.begin_epoch(5, 0, 0)
    buffer.acknowledge(CAPACITY // 2)
    append(buffer, CAPACITY // 2)
    assert held(buffer) == (CAPACITY // 2, CAPACITY // 2 * 3)
    assert buffer.drop_oldest(10) >= 10
    append(buffer, 10)
    buffer.close()
