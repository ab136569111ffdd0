"""Opening a spool: its directories, catalog and file system, with an error that says what to do where that fails."""

from __future__ import annotations

import os
import sqlite3

from mpserverd.arena.chunks import Arena
from mpserverd.arena.launch import Launch
from mpserverd.arena.state import StateTable
from mpserverd.config.schema import SpoolConfig, Sync
from mpserverd.errors import StartError
from mpserverd.net.fdlimit import raise_descriptor_limit
from mpserverd.storer import filesystem
from mpserverd.storer.catalog import Catalog
from mpserverd.storer.live import STREAMS_DIRECTORY, Counters, Desk, OpenFiles
from mpserverd.storer.segment_file import DIRECTORY_MODE
from mpserverd.storer.space import Space
from mpserverd.storer.trust import require_catalog

OTHER_DESCRIPTORS = 256
"""Shared memory, channel, doorbells, catalog, index files and directories that are open for a moment."""


def open_desk(launch: Launch, state: StateTable, arena: Arena) -> Desk:
    """Raises StartError or LayoutError."""
    spool = launch.config.spool
    _make_directories(spool.path)
    streams = os.path.join(spool.path, STREAMS_DIRECTORY)  # it may be on another disk than the catalog
    space = Space(streams, spool.min_free_bytes, ballast_in=spool.path)
    require_catalog(spool.path, streams)
    catalog = _open_catalog(spool, space)
    found = filesystem.probe(streams)
    counters = Counters(state, launch.slot)
    counters.set("direct", int(found.direct))
    return Desk(
        state=state,
        arena=arena,
        config=launch.config,
        listeners=dict(launch.listeners),
        catalog=catalog,
        filesystem=found,
        space=space,
        counters=counters,
        files=OpenFiles(max(8, raise_descriptor_limit() - OTHER_DESCRIPTORS)),
        root=os.open(streams, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC),
    )


def _open_catalog(spool: SpoolConfig, space: Space) -> Catalog:
    """Raises StartError. On a full disk the ballast is given up for it: what makes room must be committed."""
    durable = spool.sync is Sync.DURABLE
    try:
        return Catalog(spool.path, durable=durable)
    except StartError as error:
        why = error.__cause__
        if not (isinstance(why, sqlite3.Error) and space.is_reason_of(why) and space.drop_ballast()):
            raise
    return Catalog(spool.path, durable=durable)


def _make_directories(path: str) -> None:
    """The spool's directory and the one of the streams, their names durable."""
    streams = os.path.join(path, STREAMS_DIRECTORY)
    try:
        if not os.path.isdir(path):
            os.makedirs(path, DIRECTORY_MODE)
            filesystem.sync_directory(os.path.dirname(os.path.abspath(path)))
        if not os.path.isdir(streams):
            os.mkdir(streams, DIRECTORY_MODE)
            filesystem.sync_directory(path)
        if not os.access(streams, os.W_OK | os.X_OK) or not os.access(path, os.W_OK | os.X_OK):
            raise StartError(
                f"no permission to write to the spool {path}; give it to user {os.geteuid()}, or change [spool] path"
            )
    except OSError as error:
        raise StartError(
            f"cannot make the spool {path}: {error.strerror}; create it for user {os.geteuid()}, or change [spool] path"
        ) from error
