"""The end of a connection, with kill -9 between any two lines of it: not a byte is stored that was not sent there."""

from __future__ import annotations

import itertools
import pathlib

import pytest

from mpserverd.arena.state import CloseReason, Con, ConnectionState, Str
from mpserverd.arena.window import StreamWindow
from mpserverd.net.channel import Kind, Message
from mpserverd.supervisor.lost import finish_without_socket
from mpserverd.worker.connection import Connection
from mpserverd.worker.main import Worker
from tests.unit.worker.worker_rig import PACKET, WorkerRig, killed_at

CONTENT = bytes(range(2, 98))
FIRST = 40
"""Two packets and a half."""
ENDING = {
    function.__code__
    for function in (
        Worker._finish,
        Connection.finish,
        Connection.publish_end,
        Connection.check_and_offer,
        StreamWindow.offer,
        StreamWindow.close,
    )
}
KICK = Message(Kind.KICK, reason=CloseReason.KICKED)


def test_a_worker_that_dies_anywhere_in_an_end_leaves_whole_packets_and_true_counts(tmp_path: pathlib.Path) -> None:
    """The client sends on; a successor finishes what was decided, and reads on where nothing was."""
    for point in itertools.count(1):
        home = tmp_path / str(point)
        home.mkdir()
        rig = WorkerRig(home)
        rig.send(CONTENT[:FIRST])
        worker = rig.worker()
        rig.read(worker)
        died = killed_at(point, ENDING, lambda: rig.obey(worker, KICK))  # noqa: B023
        rig.send(CONTENT[FIRST:])
        if not rig.is_over:
            successor = rig.worker()
            rig.read(successor)
            rig.obey(successor, KICK)
        assert rig.is_over
        stored, truncated = rig.stored(), rig.word(Str.TRUNCATED)
        assert stored == CONTENT[: len(stored)], f"killed at line {point}"
        assert len(stored) % PACKET == 0
        assert rig.row(Con.SOCKET_BYTES) == len(stored) + truncated == rig.word(Str.SOCKET)
        assert CloseReason(rig.row(Con.REASON)) is CloseReason.KICKED
        assert rig.closed(CloseReason.KICKED) >= 1
        rig.close()
        if not died:
            assert point > len(ENDING)
            return


def test_an_end_without_a_socket_can_be_repeated_wherever_it_was_cut_short(tmp_path: pathlib.Path) -> None:
    where = {finish_without_socket.__code__, StreamWindow.close.__code__}
    for point in itertools.count(1):
        home = tmp_path / str(point)
        home.mkdir()
        rig = WorkerRig(home)
        rig.send(CONTENT[:FIRST])
        rig.read(rig.worker())
        died = killed_at(point, where, lambda: finish_without_socket(rig.state, rig.arena, 0))  # noqa: B023
        assert rig.is_over or finish_without_socket(rig.state, rig.arena, 0)
        assert rig.row(Con.STATE) == ConnectionState.ENDED
        assert CloseReason(rig.row(Con.REASON)) is CloseReason.FAILED
        assert rig.stored() == CONTENT[:32], f"killed at line {point}"
        assert (rig.word(Str.TRUNCATED), rig.row(Con.SOCKET_BYTES)) == (8, FIRST)
        rig.close()
        if not died:
            return


@pytest.mark.parametrize("point", range(1, 6))
def test_a_connection_that_lost_its_socket_over_its_end_keeps_the_worker_s_account(
    tmp_path: pathlib.Path, point: int
) -> None:
    """Killed in ``close``; then the descriptor does not come back either."""
    rig = WorkerRig(tmp_path)
    rig.send(CONTENT[:FIRST])
    worker = rig.worker()
    rig.read(worker)
    assert killed_at(
        point, {StreamWindow.close.__code__, Connection.publish_end.__code__}, lambda: rig.obey(worker, KICK)
    )
    assert finish_without_socket(rig.state, rig.arena, 0)
    assert rig.stored() == CONTENT[:32]
    assert (rig.word(Str.TRUNCATED), rig.row(Con.SOCKET_BYTES), rig.word(Str.SOCKET)) == (8, FIRST, FIRST)
    assert CloseReason(rig.row(Con.REASON)) is CloseReason.KICKED
    rig.close()
