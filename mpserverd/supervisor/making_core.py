"""The memory and the limits that a supervisor begins with: fresh, or left by an earlier one."""

from __future__ import annotations

import logging
import time

from mpserverd import log
from mpserverd.arena.chunks import Arena
from mpserverd.arena.state import Head, Phase, StateTable
from mpserverd.config.schema import Config
from mpserverd.errors import LayoutError, StartError
from mpserverd.limits import CHUNKS_PER_CONNECTION
from mpserverd.net.fdlimit import raise_descriptor_limit
from mpserverd.supervisor.core import Core, Doorbells
from mpserverd.supervisor.events import EventRing
from mpserverd.supervisor.fd_store import FdStore
from mpserverd.supervisor.loop import Loop
from mpserverd.supervisor.moving import Moving
from mpserverd.supervisor.resources import (
    SPARE_CONNECTION_ROWS,
    check_memory,
    check_spool,
    fit_clients,
    wanted_geometry,
)
from mpserverd.supervisor.stored_memory import Memory
from mpserverd.supervisor.takeover import Inheritance, discard

logger = logging.getLogger(__name__)


def take_memory(found: Inheritance, config: Config, store: FdStore) -> Memory | None:
    """What waited in the store, of the size that ``config`` asks for if that can be. None when there is nothing to go
    on with. Raises StartError; then everything waits for the next start."""
    if found.memory is None:
        return None
    try:
        wanted = wanted_geometry(config, fit_clients(config, raise_descriptor_limit()).max_clients)
        return Moving(found.memory, wanted, store).settle()
    except LayoutError as error:
        discard(found, store, error)
        return None
    except StartError:
        found.memory.set_left()  # what must be put right is outside; that is no crash
        raise


def make_core(config: Config, memory: Memory | None = None) -> Core:
    """Check the limits and take the memory, unless an earlier supervisor left some. Raises StartError."""
    fit = fit_clients(config, raise_descriptor_limit())
    if fit.why:
        log.event(
            logger,
            logging.WARNING,
            "max_clients lowered",
            message_id=log.MessageId.LIMIT_LOWERED,
            max_clients=fit.max_clients,
            why=fit.why,
        )
    if memory is None:
        check_memory(config)
        check_spool(config)
        size = wanted_geometry(config, fit.max_clients)
        state = StateTable.create(connections=size.connections, streams=size.streams, slots=size.slots)
        arena = Arena.create(size_bytes=config.buffers.bytes, chunk_bytes=size.chunk_bytes)
        clients_max = fit.max_clients
    else:
        state, arena = memory.state, memory.arena
        clients_max = min(state.connection_count - SPARE_CONNECTION_ROWS, arena.count // CHUNKS_PER_CONNECTION)
    state.words[Head.STARTED_UNIX_NS] = time.time_ns()
    state.words[Head.STARTED_MONO_NS] = time.monotonic_ns()
    state.words[Head.PHASE] = Phase.STARTING
    return Core(
        loop=Loop(),
        state=state,
        arena=arena,
        bells=Doorbells.create(),
        events=EventRing(),
        config=config,
        max_clients=min(fit.max_clients, clients_max),
        clients_max=clients_max,
    )
