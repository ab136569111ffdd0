"""The storer's parts put together, so that a process can run them in a loop and a test can step through them."""

from __future__ import annotations

import os
import sqlite3

import numpy as np

from mpserverd.arena.state import Str, StreamState
from mpserverd.config.schema import Sync
from mpserverd.storer.accounts import GoneBlock
from mpserverd.storer.cycle import Cycle
from mpserverd.storer.failures import Failures
from mpserverd.storer.leaving import Leaving
from mpserverd.storer.live import Desk
from mpserverd.storer.opening import Opening
from mpserverd.storer.recovery import Recovery


class Store:
    """``recover`` first; then ``open_streams``, ``cycle``, ``see_off`` and ``tick`` in any order."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._gone = GoneBlock(desk.state)
        self._opening = Opening(desk, self._gone)
        self.failures = Failures(desk)
        self.cycle = Cycle(desk, self._opening, self.failures)
        self._leaving = Leaving(desk, self._gone, self.failures, sync_wanted=desk.spool.sync is Sync.DURABLE)

    def recover(self) -> None:
        """Raises StartError, or sqlite3.Error when the catalog cannot be written."""
        Recovery(self._desk, self._opening, self._gone).run()
        self._desk.space.make_ballast()

    def open_streams(self) -> None:
        """Answer the rows that are OPENING."""
        rows = np.flatnonzero(self._desk.state.streams[:, Str.STATE] == StreamState.OPENING).tolist()
        if rows:
            try:
                self._opening.open_rows(rows)
            except sqlite3.Error as error:
                self.failures.catalog_failed(error)

    def see_off(self) -> int:
        """Finish the streams that are DRAINING and have nothing left to write. Returns how many rows were freed."""
        rows = self._leaving.draining()
        return self._leaving.finish(rows) if rows else 0

    def put_everything_away(self) -> bool:
        """The daemon stops: every file is cut and every stream said to be disconnected. False: try again."""
        try:
            streams = [stream for stream in self._desk.streams.values() if stream.catalog_id]
            self._leaving.put_away(streams)
            self._leaving.forget_released()
        except sqlite3.Error as error:
            self.failures.catalog_failed(error)
            return False
        return True

    def tick(self, now_s: float) -> None:
        """Once a second."""
        self.failures.end_full()

    def close(self) -> None:
        desk = self._desk
        for stream in desk.streams.values():
            for file in (stream.segment, stream.early):
                if file is not None:
                    file.close()
        desk.catalog.close()
        os.close(desk.root)
