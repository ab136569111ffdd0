"""Rows of streams: taken from the free ones, opened fresh or by the storer, and given to drain.

Who may write a row's STATE is in arena/state.py. A row that the storer owns (OPENING, DRAINING) is never touched
here: a stream that nobody waits for any more is opened to its end, and then drained at once. That is the whole of
cancelling.
"""

from __future__ import annotations

import collections
import secrets
import time

import numpy as np

from mpserverd.arena.state import StateTable, Str, StreamFlag, StreamState
from mpserverd.supervisor.hello import GOES_ON, Asked

NO_CONNECTION = (1 << 64) - 1
"""In a stream's CONNECTION word: nobody feeds it."""
_RESCAN_S = 1.0


class StreamRows:
    """Supervisor's side of the stream table. Rows are ints; names are unique among rows that are not FREE."""

    def __init__(self, state: StateTable) -> None:
        self._state = state
        self._free: collections.deque[int] = collections.deque()
        self._scanned_s = 0.0
        self._named: dict[str, int] = {}
        self._opening: set[int] = set()
        self._draining: set[int] = set()
        self._user: dict[int, int] = {}

    # -- asking

    def state_of(self, row: int) -> StreamState:
        return StreamState(int(self._state.streams[row, Str.STATE]))

    def named(self, name: str) -> int | None:
        """The row of a client's stream, in whatever state."""
        return self._named.get(name)

    def user(self, row: int) -> int | None:
        """The connection row that has the stream, or waits for it to open."""
        return self._user.get(row)

    # -- after another supervisor

    def take_up(self) -> None:
        """Learn from the table what an earlier supervisor did; nobody writes to it now. Users are told by ``use``."""
        for row in np.flatnonzero(self._state.streams[:, Str.STATE] != StreamState.FREE).tolist():
            state = self.state_of(row)
            if int(self._state.streams[row, Str.FLAGS]) & StreamFlag.NAMED:
                self._named[self._state.stream_name(row)] = row
            if state is StreamState.OPENING:
                self._opening.add(row)
            elif state is StreamState.DRAINING:
                self._draining.add(row)

    def unused(self) -> list[int]:
        """Rows that are OPEN and that no connection has."""
        rows = np.flatnonzero(self._state.streams[:, Str.STATE] == StreamState.OPEN).tolist()
        return [row for row in rows if row not in self._user]

    # -- taking

    def open_fresh(self, name: str, listener: int, packet_size: int, flags: StreamFlag) -> int | None:
        """A new stream, OPEN at offset 0. None when no row is free."""
        row = self._take()
        if row is not None:
            self._fill(row, name, listener, packet_size, flags)
            self._set_state(row, StreamState.OPEN)
        return row

    def begin_opening(
        self, name: str, listener: int, packet_size: int, flags: StreamFlag, client_index: int, wish: Asked = GOES_ON
    ) -> int | None:
        """Ask the storer for the stream of that name; the caller rings it. None when no row is free.

        ``client_index`` is the client's place in the configuration, -1 for none.
        """
        row = self._take()
        if row is not None:
            if wish.new_epoch:
                flags |= StreamFlag.NEW_EPOCH
            self._fill(row, name, listener, packet_size, flags | StreamFlag.NAMED)
            words = self._state.streams[row]
            words[Str.CLIENT_INDEX] = client_index + 1
            words[Str.ASKED_EPOCH] = wish.asked_epoch
            words[Str.EPOCH] = wish.epoch or words[Str.EPOCH]
            self._named[name] = row
            self._opening.add(row)
            self._set_state(row, StreamState.OPENING)
        return row

    def use(self, row: int, connection: int) -> None:
        """``connection`` has the stream from now on, or waits for it."""
        self._user[row] = connection
        if self.state_of(row) is not StreamState.OPENING:
            self._state.streams[row, Str.CONNECTION] = connection

    def settled(self, row: int) -> None:
        """Its connection knows where it stands; it is not to be told once more that the stream is open."""
        self._opening.discard(row)

    def abandon(self, row: int) -> None:
        """Whoever waited for an OPENING stream went another way."""
        self._user.pop(row, None)

    def drain(self, row: int) -> None:
        """OPEN to DRAINING; the caller rings the storer."""
        self._user.pop(row, None)
        self._opening.discard(row)
        self._state.streams[row, Str.CONNECTION] = NO_CONNECTION
        self._state.streams[row, Str.RATE_MILLI] = 0
        self._draining.add(row)
        self._set_state(row, StreamState.DRAINING)

    def _take(self) -> int | None:
        now_s = time.monotonic()
        if not self._free and now_s - self._scanned_s >= _RESCAN_S:
            self._scanned_s = now_s
            self.sweep()
            known = self._draining.union(self._free)  # what was just swept is free, too
            free = np.flatnonzero(self._state.streams[:, Str.STATE] == StreamState.FREE).tolist()
            self._free.extend(row for row in free if row not in known)
        return self._free.popleft() if self._free else None

    def _fill(self, row: int, name: str, listener: int, packet_size: int, flags: StreamFlag) -> None:
        """A FREE row belongs to the supervisor alone, every word of it."""
        now_ns = time.time_ns()
        words = self._state.streams[row]
        words[:] = 0
        self._state.latency[row] = 0
        self._state.set_stream_name(row, name)
        words[Str.NUMBER] = self._state.next_number(now_ns)
        words[Str.PACKET_SIZE] = packet_size
        words[Str.LISTENER] = listener
        words[Str.CONNECTION] = NO_CONNECTION
        words[Str.FLAGS] = flags
        words[Str.EPOCH] = random_epoch()
        words[Str.CREATED_UNIX_NS] = now_ns

    def _set_state(self, row: int, state: StreamState) -> None:
        self._state.words[self._state.stream_base(row) + Str.STATE] = state

    # -- what the storer did

    def opened(self) -> list[int]:
        """Rows that the storer has opened since the last call, and whose connection is not settled."""
        done = [row for row in self._opening if self.state_of(row) is not StreamState.OPENING]
        self._opening.difference_update(done)
        return done

    def sweep(self) -> int:
        """Take back rows that the storer has freed. Returns how many."""
        freed = [row for row in self._draining if self.state_of(row) is StreamState.FREE]
        for row in freed:
            self._draining.discard(row)
            self._free.append(row)
            name = self._state.stream_name(row)
            if self._named.get(name) == row:
                del self._named[name]
        return len(freed)


def random_epoch() -> int:
    """64 random bits, never 0."""
    return secrets.randbits(64) or 1
