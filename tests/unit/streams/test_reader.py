"""Reading packets: what comes, as what, and what happens when something goes away meanwhile."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spool_writer import SAMPLE16, SpoolWriter, noise, samples

import mpserverd
from mpserverd.errors import DamageError, SpoolError, StreamNotFoundError
from mpserverd.streams import Batch, Hole, RetiredError, Stream, open_stream


def joined(items: Iterable[Batch | Hole]) -> bytes:
    return b"".join(item.packets.tobytes() for item in items if isinstance(item, Batch))


def open_segments(path: Path) -> int:
    """Descriptors of this process that lead to segment files below ``path``; a mapping holds one."""
    links = (os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink())
    return sum(link.startswith(f"{path}/streams/") for link in links)


@contextlib.contextmanager
def running(work: Callable[[], None]) -> Iterator[None]:
    """A thread that has ended when the block has."""
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        thread.join(60)


def seen(stream: Stream, start: int | None = None, stop: int | None = None) -> tuple[dict[int, bytes], list[Hole]]:
    """Packets by index, and holes, from packets()."""
    packets: dict[int, bytes] = {}
    holes: list[Hole] = []
    for item in stream.packets(start, stop, batch_packets=5):
        if isinstance(item, Hole):
            holes.append(item)
        else:
            assert len(item) <= 5
            packets.update((item.index + at, bytes(packet.tobytes())) for at, packet in enumerate(item.packets))
    return packets, holes


@pytest.mark.parametrize("packet_size", [1, 7, 16, 24, 1500])
def test_packets_that_straddle_segments_come_whole(spool: SpoolWriter, packet_size: int) -> None:
    content = noise(packet_size * 40)
    spool.add("a", content, packet_size=packet_size, cuts=[3, 4, 5, 1000, 4096, 4097])
    with open_stream("a", spool=spool.path) as stream:
        assert joined(stream.packets()) == content
        assert joined(stream.packets(3, 17)) == content[3 * packet_size : 17 * packet_size]
        assert b"".join(stream.read_bytes()) == content
        assert b"".join(stream.read_bytes(5, 1001, chunk_bytes=7)) == content[5:1001]


def test_a_batch_is_a_read_only_view_and_not_a_copy(spool: SpoolWriter) -> None:
    spool.add("a", noise(1600))
    with open_stream("a", spool=spool.path) as stream:
        (batch,) = stream.packets()
        assert isinstance(batch, Batch)
        assert not batch.packets.flags.owndata
        assert not batch.packets.flags.writeable


def test_arrays_outlive_the_stream_the_file_and_the_directory(spool: SpoolWriter) -> None:
    content = noise(1600)
    number = spool.add("a", content)
    with open_stream("a", spool=spool.path) as stream:
        (batch,) = stream.packets()
    for path in spool.segment_paths(number):
        path.unlink()
    assert batch.packets.tobytes() == content


def test_descriptors_stay_few_however_many_segments_are_read(spool: SpoolWriter) -> None:
    spool.add("a", noise(1600), cuts=range(16, 1600, 16))
    with open_stream("a", spool=spool.path) as stream:
        counts = [open_segments(spool.path) for _ in stream.packets()]
        assert max(counts) <= 6
    assert open_segments(spool.path) == 0


def test_fields_of_a_layout_are_fields_of_the_array(spool: SpoolWriter) -> None:
    spool.add("a", samples(100), layout=SAMPLE16)
    with open_stream("a", spool=spool.path) as stream:
        assert stream.layout.sequence == "sequence"
        (batch,) = stream.packets(10, 20)
        assert isinstance(batch, Batch)
        assert batch.packets["sequence"].tolist() == list(range(10, 20))


def test_holes_come_in_their_place_and_can_be_left_out(spool: SpoolWriter) -> None:
    content = noise(160)
    spool.add("a", content, cuts=[40], holes=[(32, 48, "dropped"), (96, 128, "lost")])
    with open_stream("a", spool=spool.path) as stream:
        assert list(stream.holes) == [Hole(32, 48, "dropped"), Hole(96, 128, "lost")]
        assert (stream.first_index, stream.end_index, stream.count) == (0, 10, 7)
        assert stream.held_bytes == stream.durable_bytes == 112
        kinds = [item.kind if isinstance(item, Hole) else len(item) for item in stream.packets()]
        assert kinds == [2, "dropped", 3, "lost", 2]
        assert joined(stream.packets(holes=False)) == content[:32] + content[48:96] + content[128:]
        assert b"".join(stream.read_bytes()) == content[:32] + content[48:96] + content[128:]


def test_a_packet_that_a_hole_touches_belongs_to_the_hole(spool: SpoolWriter) -> None:
    content = noise(70)
    spool.add("a", content, packet_size=7, holes=[(15, 16, "lost"), (18, 22, "dropped")])
    with open_stream("a", spool=spool.path) as stream:
        packets, holes = seen(stream)
        assert sorted(packets) == [0, 1, 4, 5, 6, 7, 8, 9]
        assert holes == [Hole(14, 21, "lost"), Hole(21, 28, "dropped")]


def test_a_hole_that_no_segment_holds_is_a_hole(spool: SpoolWriter) -> None:
    number = spool.add("a", noise(160), cuts=[48, 96], holes=[(48, 96, "lost")])
    spool.segment_paths(number)[1].unlink()
    spool.catalog.execute("DELETE FROM segment WHERE first = 48")
    with open_stream("a", spool=spool.path) as stream:
        assert stream.count == 7
        assert sorted(seen(stream)[0]) == [0, 1, 2, 6, 7, 8, 9]


def test_nothing_behind_the_durable_offset_is_read(spool: SpoolWriter) -> None:
    content = noise(100)
    number = spool.add("a", content)
    spool.set_row(number, durable=50)
    with open_stream("a", spool=spool.path) as stream:
        assert joined(stream.packets()) == content[:48]
        assert b"".join(stream.read_bytes(0, 100)) == content[:50]


def test_a_stream_with_nothing_in_it_is_empty(spool: SpoolWriter) -> None:
    spool.add("a", b"")
    with open_stream("a", spool=spool.path) as stream:
        assert (stream.first_index, stream.end_index, stream.count, list(stream.packets())) == (0, 0, 0, [])
        assert list(stream.read_bytes()) == []


def test_segments_after_retention_begin_anywhere(spool: SpoolWriter) -> None:
    content = noise(700)
    spool.add("a", content, packet_size=7, cuts=[333, 500], first_offset=100)
    with open_stream("a", spool=spool.path) as stream:
        assert (stream.first_offset, stream.first_index, stream.end_index) == (100, 15, 100)
        packets, holes = seen(stream, 0)
        assert holes == [Hole(0, 105, "retired")]
        assert packets == {at: content[7 * at : 7 * at + 7] for at in range(15, 100)}


def test_retention_before_the_first_packet_is_told_as_a_hole(spool: SpoolWriter) -> None:
    content = noise(160)
    number = spool.add("a", content, cuts=[48, 96])
    with open_stream("a", spool=spool.path) as stream:
        spool.retire(number, 48)
        packets, holes = seen(stream)
        assert holes == [Hole(0, 48, "retired")]
        assert packets == {at: content[16 * at : 16 * at + 16] for at in range(3, 10)}
        assert stream.first_offset == 48


def test_retention_that_overtakes_a_reader_is_told_as_a_hole(spool: SpoolWriter) -> None:
    content = noise(160)
    number = spool.add("a", content, cuts=[40, 50, 100])
    with open_stream("a", spool=spool.path) as stream:
        items = stream.packets(batch_packets=1)
        first = next(items)
        spool.retire(number, 100)
        rest = list(items)
    assert isinstance(first, Batch)
    hole = next(item for item in rest if isinstance(item, Hole))
    assert (hole.kind, hole.end) == ("retired", 112)
    assert joined([first, *rest]) == content[: hole.first] + content[112:]


def test_raw_bytes_that_retention_took_are_an_error_with_the_new_start(spool: SpoolWriter) -> None:
    number = spool.add("a", noise(160), cuts=[48])
    with open_stream("a", spool=spool.path) as stream:
        spool.retire(number, 48)
        with pytest.raises(RetiredError) as caught:
            list(stream.read_bytes())
    assert caught.value.first_offset == 48


def test_a_refresh_between_two_batches_changes_nothing_that_is_still_there(spool: SpoolWriter) -> None:
    content = noise(160)
    number = spool.add("a", content, cuts=[48])
    with open_stream("a", spool=spool.path) as stream:
        items = stream.packets(batch_packets=4)
        first = next(items)
        spool.roll(number, noise(16, seed=2))
        assert stream.refresh()
        assert joined([first, *items]) == content


def test_missing_and_short_files_are_damage(spool: SpoolWriter) -> None:
    gone = spool.add("gone", noise(160), cuts=[48])
    short = spool.add("short", noise(160), cuts=[48])
    spool.segment_paths(gone)[0].unlink()
    with spool.segment_paths(short)[1].open("r+b") as file:
        file.truncate(20)
    with open_stream("gone", spool=spool.path) as stream, pytest.raises(DamageError, match="is missing"):
        list(stream.packets())
    with open_stream("short", spool=spool.path) as stream, pytest.raises(DamageError, match="has 20 bytes"):
        list(stream.packets())


def test_a_segment_that_was_set_aside_stays_readable_up_to_its_end(spool: SpoolWriter) -> None:
    content = noise(400)
    number = spool.add("a", content, cuts=[100], states={0: "aside"})
    spool.catalog.execute("UPDATE segment SET end = 100 WHERE first = 0")
    aside = spool.segment_paths(number)[0]
    aside.write_bytes(content[:100] + b"what a failed write left behind")
    with open_stream("a", spool=spool.path) as stream:
        assert joined(stream.packets()) == content


def test_of_overlapping_segments_the_later_one_counts(spool: SpoolWriter) -> None:
    content = noise(400)
    number = spool.add("a", content, cuts=[96], states={0: "aside"})
    spool.catalog.execute("UPDATE segment SET end = 120 WHERE first = 0")
    spool.segment_paths(number)[0].write_bytes(content[:96] + bytes(24))
    with open_stream("a", spool=spool.path) as stream:
        assert joined(stream.packets()) == content


def test_epochs_of_one_name_are_streams_of_their_own(spool: SpoolWriter) -> None:
    old, new = noise(160), noise(320, seed=2)
    spool.add("a", old, epoch="1" * 16)
    spool.add("a", new, epoch="2" * 16)
    with open_stream("a", spool=spool.path) as stream:
        assert (stream.epoch, joined(stream.packets())) == ("2" * 16, new)
    for name, epoch in (("a", "1" * 16), (f"a@{'1' * 16}", None)):
        with open_stream(name, spool=spool.path, epoch=epoch) as stream:
            assert joined(stream.packets()) == old
            assert stream.row.full_name == f"a@{'1' * 16}"


def test_an_unknown_stream_names_the_nearest_one(spool: SpoolWriter) -> None:
    spool.add("press-7", b"")
    with pytest.raises(StreamNotFoundError, match="nearest is press-7"):
        open_stream("pres-7", spool=spool.path)
    with pytest.raises(StreamNotFoundError, match="has no epoch"):
        open_stream("press-7", spool=spool.path, epoch="f" * 16)


def test_a_deleted_stream_says_so_at_the_next_refresh(spool: SpoolWriter) -> None:
    spool.add("a", noise(16))
    with open_stream("a", spool=spool.path) as stream:
        spool.catalog.execute("DELETE FROM stream")
        with pytest.raises(StreamNotFoundError, match="was deleted"):
            stream.refresh()


def test_a_layout_of_a_later_version_is_named(spool: SpoolWriter) -> None:
    spool.add("a", noise(16), layout={"name": "x", "size": 16, "fields": {"a": "complex4096"}})
    with pytest.raises(DamageError, match="makes no sense"):
        open_stream("a", spool=spool.path)


def test_indexes_that_make_no_sense_are_refused(spool: SpoolWriter) -> None:
    spool.add("a", noise(160))
    with open_stream("a", spool=spool.path) as stream:
        for start, batch_packets in ((-1, 1), (0, 0)):
            with pytest.raises(ValueError, match="are needed"):
                list(stream.packets(start, batch_packets=batch_packets))
        assert list(stream.packets(20, 30)) == []
        assert list(stream.packets(5, 3)) == []


def test_refresh_shows_what_became_durable(spool: SpoolWriter) -> None:
    content = noise(160)
    number = spool.add("a", content)
    with open_stream("a", spool=spool.path) as stream:
        assert joined(stream.packets()) == content
        assert not stream.refresh()
        more = noise(4096, seed=2)
        spool.append(number, more)
        assert joined(stream.packets()) == content
        assert stream.refresh()
        assert joined(stream.packets()) == content + more


def test_follow_waits_for_packets_and_gives_each_once(spool: SpoolWriter) -> None:
    number = spool.add("a", noise(160))
    parts = [noise(48, seed=2), noise(8, seed=3), noise(24, seed=4)]
    script = iter(parts)
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) % 2:
            for part in script:
                (spool.append if len(part) != 24 else spool.roll)(number, part)
                return

    with open_stream("a", spool=spool.path) as stream:
        items = list(stream.follow(wait=wait, timeout_s=2.0))
    assert joined(items) == b"".join(parts)
    assert [item.index for item in items if isinstance(item, Batch)] == [10, 13, 14]
    assert all(0.05 <= seconds <= 1.0 for seconds in waits)


def test_follow_begins_where_it_is_told_and_shows_holes(spool: SpoolWriter) -> None:
    spool.add("a", noise(160), holes=[(32, 48, "dropped")])
    with open_stream("a", spool=spool.path) as stream:
        items = list(stream.follow(0, timeout_s=0, wait=lambda _: None))
    assert [item.kind if isinstance(item, Hole) else len(item) for item in items] == [2, "dropped", 7]


def test_importing_the_package_is_cheap_and_offers_the_reader() -> None:
    assert mpserverd.open_stream is open_stream
    with pytest.raises(AttributeError, match="no attribute"):
        mpserverd.nonsense  # noqa: B018


def test_permission_and_absence_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(SpoolError, match="there is no spool at"):
        open_stream("a", spool=tmp_path / "nowhere")


@pytest.mark.parametrize("seed", range(5))
def test_a_follower_beside_a_writer_and_retention_sees_each_packet_once_or_its_hole(
    spool: SpoolWriter, seed: int
) -> None:
    choice, size, done = random.Random(seed), 7, threading.Event()
    content = noise(size * 6000, seed)
    number = spool.add("a", content[: size * 10], packet_size=size)
    spool.catalog.execute("PRAGMA synchronous = OFF")

    def write() -> None:
        at, firsts = size * 10, [0]
        try:
            while at < len(content):
                part = content[at : at + choice.randint(1, 400)]
                if choice.random() < 0.3:
                    firsts.append(at)
                    spool.roll(number, part)
                else:
                    spool.append(number, part)
                at += len(part)
                if len(firsts) > 3 and choice.random() < 0.5:
                    firsts.pop(0)
                    spool.retire(number, firsts[0])
        finally:
            done.set()

    at = 0
    with open_stream("a", spool=spool.path) as stream, running(write):
        for item in stream.follow(0, batch_packets=50, wait=lambda _: done.wait(0.001), timeout_s=60):
            if isinstance(item, Hole):
                assert (item.kind, item.first) == ("retired", at * size)
                at = item.end // size
            else:
                assert item.index == at
                assert item.packets.tobytes() == content[at * size : item.end_index * size]
                at = item.end_index
            if at == 6000:
                break
    assert at == 6000


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, list[int], list[tuple[int, int, str]], int]:
    """Packet size, bytes, cuts, holes (whole packets, sorted, apart) and the first offset of a stream."""
    size = draw(st.integers(1, 40))
    count = draw(st.integers(0, 60))
    length = size * count
    cuts = sorted(draw(st.sets(st.integers(1, max(1, length)), max_size=12)))
    edges = sorted(draw(st.sets(st.integers(0, count), max_size=8)))
    pairs = zip(edges[::2], edges[1::2], strict=False)
    holes = [(a * size, b * size, draw(st.sampled_from(["dropped", "lost"]))) for a, b in pairs]
    first = draw(st.sampled_from([0, *(cut for cut in cuts if cut < length)]))
    return size, length, cuts, holes, first


@settings(max_examples=150, deadline=None)
@given(shape=shapes(), start=st.integers(0, 70), stop=st.integers(0, 70), data=st.data())
def test_any_cut_of_any_stream_reads_as_what_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int, list[int], list[tuple[int, int, str]], int],
    start: int,
    stop: int,
    data: st.DataObject,
) -> None:
    size, length, cuts, holes, first = shape
    content = noise(length)
    with SpoolWriter(tmp_path_factory.mktemp("spool")) as spool:
        spool.add("a", content, packet_size=size, cuts=cuts, holes=holes, first_offset=first)
        missing = {at for a, b, _ in holes for at in range(a // size, b // size)}
        missing.update(range(-(-first // size)))
        reference = {at: content[at * size : at * size + size] for at in range(length // size) if at not in missing}
        with open_stream("a", spool=spool.path) as stream:
            packets, found = seen(stream)
            assert packets == reference
            assert stream.count == len(reference)
            part, _ = seen(stream, start, stop)
            assert part == {at: packet for at, packet in reference.items() if start <= at < stop}
            covered = {at for hole in found for at in hole.indexes(size)}
            assert covered == missing - set(range(stream.first_index))
            low = data.draw(st.integers(0, length))
            high = data.draw(st.integers(0, length))
            keep = np.ones(length, np.bool_)
            keep[:first] = False
            for a, b, _ in holes:
                keep[a:b] = False
            expected = bytes(np.frombuffer(content, np.uint8)[low:high][keep[low:high]])
            assert b"".join(stream.read_bytes(low, high, chunk_bytes=17)) == expected


def test_a_refreshed_stream_knows_what_a_fresh_one_knows(spool: SpoolWriter) -> None:
    number = spool.add("a", noise(160), cuts=[48, 96], holes=[(16, 32, "lost"), (112, 128, "dropped")])
    with open_stream("a", spool=spool.path) as stream:
        spool.append(number, noise(32))
        spool.catalog.execute("INSERT INTO hole VALUES (?, 160, 176, 'dropped')", (number,))
        stream.refresh()
        spool.roll(number, noise(48))
        spool.retire(number, 48)
        spool.catalog.execute("DELETE FROM hole WHERE end <= 48")
        stream.refresh()
        with open_stream("a", spool=spool.path) as fresh:
            assert stream.snapshot == fresh.snapshot
            assert stream.count == fresh.count == 10
