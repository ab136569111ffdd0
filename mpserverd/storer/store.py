"""The storer's parts put together, so that a process can run them in a loop and a test can step through them."""

from __future__ import annotations

import logging
import os
import sqlite3
import time

import numpy as np

from mpserverd.arena.counters import NEVER_S
from mpserverd.arena.state import Str, StreamState
from mpserverd.config.schema import Sync
from mpserverd.errors import StartError
from mpserverd.storer.accounts import GoneBlock
from mpserverd.storer.background import Background
from mpserverd.storer.catalog import todo
from mpserverd.storer.cycle import Cycle
from mpserverd.storer.early import Early
from mpserverd.storer.failures import Failures
from mpserverd.storer.filling import Filling, Look
from mpserverd.storer.last_life import CLOSED_KEY
from mpserverd.storer.leaving import Leaving
from mpserverd.storer.live import Desk
from mpserverd.storer.opening import Opening
from mpserverd.storer.recovery import Recovery
from mpserverd.storer.retention import Retention
from mpserverd.storer.segment_file import segment_name

logger = logging.getLogger(__name__)

BUSY_BYTES_PER_S = 64 << 20
"""While so much is written, no checksums are made."""
SUMS_AHEAD = 64
BALLAST_INTERVAL_S = 10.0
UNLINK_AT_STOP_S = 2.0
"""A daemon that stops removes retired files for so long; the rest is its successor's."""


class Store:
    """``recover`` first; then ``open_streams``, ``cycle``, ``see_off`` and ``tick`` in any order."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._gone = GoneBlock(desk.state)
        self._opening = Opening(desk, self._gone)
        self.failures = Failures(desk)
        self.cycle = Cycle(desk, self._opening, self.failures)
        self.retention = Retention(desk, self._gone, self.failures)
        self.background = Background()
        self._early = Early(desk)
        self._leaving = Leaving(
            desk, self._gone, self.failures, self.retention, sync_wanted=desk.spool.sync is Sync.DURABLE
        )
        self._filling = Filling()
        self._next_ballast_s = 0.0
        self._written_bytes = 0
        self._unlinked_bytes = 0
        self._ticked_s = 0.0

    def recover(self) -> None:
        """Raises StartError. On a full disk the ballast is given up for it."""
        try:
            Recovery(self._desk, self._opening, self._gone).run()
        except sqlite3.Error as error:
            if self._desk.space.is_reason_of(error) and self._desk.space.drop_ballast():
                self.recover()
                return
            raise StartError(f"cannot use the catalog {self._desk.catalog.path}: {error}; {todo(error)}") from error
        self._desk.space.make_ballast()
        self._weigh_limits()

    def _weigh_limits(self) -> None:
        """Segments that are being written cannot be retired: with all clients there, they may be too many."""
        desk, clients = self._desk, self._desk.config.server.max_clients
        least = clients * desk.fitting_segment_bytes(clients)
        if 0 < desk.spool.max_bytes < least:
            desk.note(
                logger,
                logging.WARNING,
                "max_bytes is not kept with all clients connected",
                max_bytes=desk.spool.max_bytes,
                max_clients=clients,
                bytes=least,
                next="raise [spool] max_bytes, or lower [server] max_clients",
            )

    def open_streams(self, now_s: float) -> int:
        """Answer the rows that are OPENING. Returns how many there were; they wait while the catalog fails."""
        if now_s < self.failures.catalog_retry_s:
            return 0
        rows = np.flatnonzero(self._desk.state.streams[:, Str.STATE] == StreamState.OPENING).tolist()
        if rows:
            try:
                self._opening.open_rows(rows)
            except sqlite3.Error as error:
                self.failures.catalog_failed(error)
        return len(rows)

    def see_off(self, now_s: float) -> int:
        """Finish the streams that are DRAINING and have nothing left to write. Returns how many rows were freed."""
        return self._leaving.finish(self._leaving.draining(), now_s)

    @property
    def more(self) -> bool:
        """Something was left undone only because there was enough to do."""
        return self.cycle.more or self._leaving.more

    def put_everything_away(self) -> bool:
        """The daemon stops: every file is cut and every stream said to be disconnected. False: try again."""
        self.retention.apply(time.monotonic(), time.time_ns())  # the last second's
        try:
            streams = [stream for stream in self._desk.streams.values() if stream.catalog_id]
            self._leaving.put_away(streams)
            self._leaving.forget_released()
            with self._desk.catalog.transaction():
                self._desk.catalog.set_meta([(CLOSED_KEY, "1")])
        except sqlite3.Error as error:
            self.failures.catalog_failed(error)
            return False
        self.background.finish(self._desk.to_unlink, time.monotonic() + UNLINK_AT_STOP_S)
        return True

    # -- once a second

    def tick(self, now_s: float) -> None:
        """Everything that is neither a cycle nor urgent."""
        desk = self._desk
        self._note_unlinked()
        desk.space.look()
        self._note_look(now_s)
        if self.retention.apply(now_s, time.time_ns()) or desk.space.leaving_bytes:
            self.failures.room_was_made()
        elif not desk.space.short_bytes:
            self.failures.try_again()
        if missing := self.retention.out_of_reach_bytes:
            self.failures.refused(f"{missing} bytes more than all finished segments hold must stay free")
        self.failures.begin_full()
        desk.space.refused_bytes = 0
        while desk.to_unlink:
            self.background.unlink(*desk.to_unlink.popleft())
        self.failures.end_full()
        written, self._written_bytes = self.cycle.written_bytes - self._written_bytes, self.cycle.written_bytes
        if written:
            self._early.prepare(self.cycle.segment_bytes)
        self._make_sums(written, max(now_s - self._ticked_s, 0.001))
        self._ticked_s = now_s
        try:
            self._leaving.forget_released()
        except sqlite3.Error as error:
            self.failures.catalog_failed(error)
        if now_s >= self._next_ballast_s and not self.failures.is_full:
            self._next_ballast_s = now_s + BALLAST_INTERVAL_S
            desk.space.make_ballast()
        self._gauge()

    def _note_unlinked(self) -> None:
        """What is gone counts as free from now on, not twice."""
        unlinked = self.background.unlinked_bytes
        self._desk.space.leaving_bytes -= unlinked - self._unlinked_bytes
        self._unlinked_bytes = unlinked

    def _note_look(self, now_s: float) -> None:
        """Before anything is given up: what is free and what the segments take must belong together."""
        retention, space = self.retention, self._desk.space
        content = retention.content_bytes()
        free = space.free_bytes + space.leaving_bytes
        self._filling.note(Look(now_s, content, retention.spool_bytes(), free, content + retention.retired_bytes))

    def _gauge(self) -> None:
        desk, retention = self._desk, self.retention
        may_grow = retention.may_grow_bytes(self._filling.stored_per_s)
        retirable = desk.resting_bytes if desk.space.min_free_bytes else 0
        until_s = self._filling.time_to_full_s(desk.space.kept_bytes, may_grow, retirable)
        desk.counters.set("spool_bytes", retention.spool_bytes())
        desk.counters.set("free_bytes", desk.space.free_bytes)
        desk.counters.set("time_to_full_s", NEVER_S if until_s is None else round(until_s))

    def _make_sums(self, written_bytes: int, seconds: float) -> None:
        desk, background = self._desk, self.background
        background.busy = written_bytes > BUSY_BYTES_PER_S * seconds
        try:
            if background.sums:
                done = [background.sums.popleft() for _ in range(len(background.sums))]
                with desk.catalog.transaction():
                    desk.catalog.set_sums(done)
            if desk.unsummed and not background.busy and not background.has_sums_to_make and not background.sums:
                most = SUMS_AHEAD + len(background.unreadable)
                found = desk.catalog.unsummed(most)
                desk.unsummed = len(found) == most
                for sealed in found:
                    if (sealed[0], sealed[2]) not in background.unreadable:
                        background.add(os.path.join(desk.path_of(sealed[1]), segment_name(sealed[2])), sealed)
        except sqlite3.Error as error:
            self.failures.catalog_failed(error)

    def close(self) -> None:
        """Give up descriptors; the files stay as they are."""
        desk = self._desk
        self.background.close()
        self.cycle.close()
        for stream in desk.streams.values():
            for file in (stream.segment, stream.early):
                if file is not None:
                    file.close()
        desk.catalog.close()
        os.close(desk.root)
