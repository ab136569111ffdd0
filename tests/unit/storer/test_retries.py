"""A cycle that is tried again goes on in the files that it had begun, however long new ones are by then."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator

import pytest

from mpserverd.arena.state import Str
from mpserverd.storer.repair import repair
from mpserverd.streams.catalog_view import all_streams
from mpserverd.streams.verify import verify_streams
from tests.unit.storer.conftest import RigMaker
from tests.unit.storer.rig import Client, Rig, break_file

MIB = 1 << 20


@contextlib.contextmanager
def locked_catalog(rig: Rig) -> Iterator[None]:
    rig.desk.catalog._connection.execute("PRAGMA busy_timeout = 0")
    stranger = sqlite3.connect(rig.spool / "catalog.sqlite", isolation_level=None)
    stranger.execute("BEGIN IMMEDIATE")
    yield
    stranger.execute("ROLLBACK")
    stranger.close()


@contextlib.contextmanager
def failing_file(rig: Rig) -> Iterator[None]:
    """The present segment, which is set aside; those that are begun after it are fine."""
    break_file(rig, rig.clients[0])
    yield


@contextlib.contextmanager
def little_space(rig: Rig) -> Iterator[None]:
    """Enough for one segment more, and for the beginning of another."""
    space = rig.desk.space
    real = space.measure
    space.measure = lambda: None  # type: ignore[method-assign]
    space.min_free_bytes, space.free_bytes = 1, 3 * MIB // 2
    yield
    space.measure = real  # type: ignore[method-assign]
    space.min_free_bytes = 0
    space.measure()


def fails_on_a_narrow_grid(rig: Rig, client: Client, fault: contextlib.AbstractContextManager[None]) -> list[str]:
    """The cycle begins files of 1 MiB. Then the others leave, and segments have 4 MiB again. Returns what it began."""
    assert rig.desk.fitting_segment_bytes() == MIB
    durable = client.word(Str.DURABLE)
    client.send(3 * MIB)
    with fault:
        rig.step()
    assert client.word(Str.DURABLE) == durable
    begun = rig.files(f"{client.name}/*.seg")[1:]
    for other in rig.clients:
        if other is not client:
            other.leave()
    rig.store.see_off(max(rig.now_s, rig.store.failures.catalog_retry_s))
    assert rig.desk.fitting_segment_bytes() == 4 * MIB
    rig.store._early.prepare(4 * MIB)
    return begun


@pytest.mark.parametrize("fault", [locked_catalog, failing_file, little_space])
@pytest.mark.parametrize("seconds", [0, 3])
def test_a_retry_on_a_wider_grid_leaves_no_second_file_with_the_same_bytes(
    make_rig: RigMaker, fault: type[contextlib.AbstractContextManager[None]], seconds: int
) -> None:
    """Repair without the catalog finds what was acknowledged, whether or not the time index says how far that is."""
    rig = make_rig(chunks=256, chunk_bytes=64 << 10, segment_bytes=4 * MIB, max_bytes=16 * MIB)
    for number in range(4):
        rig.fresh(f"peer-{number}").send(960_000)
    rig.steps(2)
    client = rig.clients[0]
    begun = fails_on_a_narrow_grid(rig, client, fault(rig))
    assert len(begun) > 1
    client.send(512 << 10)
    rig.steps(8)
    for _ in range(seconds):
        rig.now_s += 3
        client.send(64 << 10)
        rig.steps(2)
    assert client.word(Str.DURABLE) == client.sent
    rig.assert_stored(client)
    listed = rig.ask("SELECT first FROM segment JOIN stream ON stream = id WHERE name = 'peer-0' ORDER BY first")
    assert rig.files("peer-0/*.seg") == [f"peer-0/{first:020d}.seg" for (first,) in listed]
    assert all(check.fine for check in verify_streams(rig.spool, all_streams(rig.spool, all_epochs=True), 1))
    rig.store.close()
    for path in rig.spool.glob("catalog.sqlite*"):
        path.unlink()
    repair(str(rig.spool))
    rig.assert_stored(client)
    assert not rig.ask("SELECT * FROM hole")
    rig.store = rig.open()
