"""Chunks leased to workers."""

from __future__ import annotations

import os

import pytest

from mpserverd.arena.chunks import FREE
from mpserverd.arena.counters import Role, column
from mpserverd.arena.state import FIRST_WORKER_SLOT, SUPERVISOR_SLOT, Head
from mpserverd.supervisor.child import Child
from mpserverd.supervisor.core import Core
from mpserverd.supervisor.leases import ASKED_LATELY_S, Leases
from mpserverd.supervisor.policy import RestartPolicy


def worker(index: int) -> Child:
    child = Child(Role.WORKER, index, FIRST_WORKER_SLOT + index, RestartPolicy(1.0))
    child.lease = 10 + index
    return child


def counted(core: Core, name: str) -> int:
    return int(core.state.slots[SUPERVISOR_SLOT, column(Role.SUPERVISOR, name)])


def rung(core: Core, child: Child) -> bool:
    try:
        return os.eventfd_read(core.bells.of_slot(child.slot)) > 0
    except BlockingIOError:
        return False


def test_a_worker_gets_chunks_and_is_rung(core: Core) -> None:
    one = worker(0)
    Leases(core).need(one, 8, now_s=0.0)
    assert len(core.arena.table.leased_to(one.lease)) == 8
    assert rung(core, one)
    assert counted(core, "chunks_leased") == 8


def test_workers_that_ask_at_once_share_and_later_ones_do_not_count(core: Core) -> None:
    leases, one, two, three = Leases(core), worker(0), worker(1), worker(2)
    leases.need(one, 1000, now_s=0.0)
    leases.need(two, 1000, now_s=0.1)
    assert [len(core.arena.table.leased_to(each.lease)) for each in (one, two)] == [32, 8]
    leases.need(three, 1000, now_s=0.2 + ASKED_LATELY_S)
    assert len(core.arena.table.leased_to(three.lease)) == 12


def test_with_nothing_free_the_storer_is_asked_to_ring_and_the_wish_is_kept(core: Core) -> None:
    leases, one, hungry = Leases(core), worker(0), worker(1)
    core.arena.table.lease(one.lease, core.arena.count)
    leases.need(hungry, 5, now_s=0.0)
    assert core.state.words[Head.STARVING] == 1
    assert counted(core, "starved") == 1
    assert not rung(core, hungry)
    leases.retry()
    assert core.state.words[Head.STARVING] == 1
    core.arena.table.words[:4] = FREE
    leases.retry()
    assert core.state.words[Head.STARVING] == 0
    assert len(core.arena.table.leased_to(hungry.lease)) == 2
    assert rung(core, hungry)


@pytest.mark.parametrize("waits", [False, True])
def test_what_a_dead_worker_had_is_free_for_who_waits(core: Core, waits: bool) -> None:
    leases, dead, hungry = Leases(core), worker(0), worker(1)
    core.arena.table.lease(dead.lease, core.arena.count)
    if waits:
        leases.need(hungry, 4, now_s=0.0)
    leases.revoke(dead)
    assert len(core.arena.table.leased_to(dead.lease)) == 0
    assert core.arena.table.free_count() == core.arena.count - (4 if waits else 0)
    assert core.state.words[Head.STARVING] == 0
