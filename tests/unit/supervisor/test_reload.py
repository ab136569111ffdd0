"""What a reload refuses before it changes anything."""

from __future__ import annotations

import dataclasses

import pytest

from mpserverd.errors import StartError
from mpserverd.supervisor.accepting import Accepting
from mpserverd.supervisor.children import Children
from mpserverd.supervisor.connections import Connections
from mpserverd.supervisor.core import WORKER_SLOTS, Core
from mpserverd.supervisor.reload import Reload


def test_more_fresh_workers_than_there_are_places_refuse_the_reload_and_not_those_after_it(core: Core) -> None:
    """Old ones have half of the places, one that hangs in the kernel another."""
    children = Children(core, {})
    connections = Connections(core, children)
    server = dataclasses.replace(core.config.server, workers=4)
    config = dataclasses.replace(core.config, server=server, listeners=())
    reload = Reload(core, children, connections, Accepting(core, connections), lambda: config)
    for _ in range(WORKER_SLOTS - 3):
        children.add_worker(0)
    before = core.config
    for _ in range(2):
        with pytest.raises(StartError, match="4 fresh workers find no place: 125 of 128 are taken"):
            reload.request()
    assert core.config is before
    assert not reload.under_way
    assert len(children.workers()) == WORKER_SLOTS - 3


def test_children_get_the_log_level_that_was_set(core: Core) -> None:
    assert core.config_for_children() is core.config
    core.log_level = "error"
    assert core.config_for_children().log.level == "error"
    assert core.config.log.level == "info"
