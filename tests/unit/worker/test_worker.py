"""A worker's turn: events and hints that came too late."""

from __future__ import annotations

import pathlib
import select
from collections.abc import Iterator

import pytest

from mpserverd.arena.state import CloseReason, Con, Str
from mpserverd.net.channel import Kind, Message
from tests.unit.worker.worker_rig import WorkerRig


@pytest.fixture
def rig(tmp_path: pathlib.Path) -> Iterator[WorkerRig]:
    made = WorkerRig(tmp_path)
    yield made
    made.close()


def test_an_event_that_is_older_than_a_pause_reads_nothing(rig: WorkerRig) -> None:
    """Both were in one batch, the message first."""
    worker = rig.worker()
    rig.send(bytes(32))
    rig.obey(worker, Message(Kind.PAUSE))
    rig.handle(worker, select.EPOLLIN)
    assert rig.word(Str.POSITION) == 0
    rig.obey(worker, Message(Kind.RESUME))
    rig.handle(worker, select.EPOLLIN)
    assert rig.word(Str.POSITION) == 32


def test_a_connection_whose_stream_is_gone_is_ended_and_its_client_told(rig: WorkerRig) -> None:
    """It used to stay as it was, unread, until its worker died."""
    rig.state.words[rig.con + Con.STREAM_NUMBER] = 4711
    rig.worker()
    assert rig.is_over
    assert CloseReason(rig.row(Con.REASON)) is CloseReason.FAILED
    assert rig.closed(CloseReason.FAILED) == 1
    assert rig.client.recv(1) == b""
