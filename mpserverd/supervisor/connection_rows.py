"""Rows of connections: taken from the free ones, filled in, read back after another supervisor, and given back.

Who may write a row's STATE is in arena/state.py; what is written here belongs to the supervisor.
"""

from __future__ import annotations

import numpy as np

from mpserverd.arena.state import Con, ConnectionFlag, ConnectionState, StateTable
from mpserverd.supervisor.connection import Connection
from mpserverd.supervisor.naming import join_address, split_address


class ConnectionRows:
    """Supervisor's side of the connection table. Rows are ints."""

    def __init__(self, state: StateTable) -> None:
        self._state = state
        self._free = list(range(state.connection_count - 1, -1, -1))

    @property
    def free_count(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """A free row. Raises IndexError: look at ``free_count`` first."""
        return self._free.pop()

    def give_back(self, row: int) -> None:
        self.set_state(row, ConnectionState.FREE)
        self._free.append(row)

    def fill(self, connection: Connection) -> None:
        """For one that was just accepted."""
        words = self._state.connections[connection.row]
        words[:] = 0
        words[Con.COOKIE] = connection.cookie
        words[Con.LISTENER] = connection.listener
        words[Con.PEER_HIGH], words[Con.PEER_LOW] = split_address(connection.address)
        words[Con.PEER_PORT] = connection.port
        words[Con.ACCEPTED_UNIX_NS] = connection.accepted_unix_ns
        words[Con.ACCEPTED_MONO_NS] = connection.accepted_ns
        self.set_state(connection.row, ConnectionState.ACCEPTED)

    def take_up(self, fds: dict[int, int]) -> list[Connection]:
        """The rows that an earlier supervisor left, with their descriptors out of ``fds``, -1 where there is none."""
        taken = np.flatnonzero(self._state.connections[:, Con.STATE] != ConnectionState.FREE).tolist()
        rows_taken = set(taken)
        self._free = [row for row in self._free if row not in rows_taken]
        return [self._read(row, fds) for row in taken]

    def _read(self, row: int, fds: dict[int, int]) -> Connection:
        words = self._state.connections[row].tolist()
        return Connection(
            row,
            fds.pop(words[Con.COOKIE], -1),
            words[Con.COOKIE],
            join_address(words[Con.PEER_HIGH], words[Con.PEER_LOW]),
            words[Con.PEER_PORT],
            words[Con.LISTENER],
            words[Con.ACCEPTED_UNIX_NS],
            words[Con.ACCEPTED_MONO_NS],
        )

    def state_of(self, row: int) -> ConnectionState:
        return ConnectionState(int(self._state.connections[row, Con.STATE]))

    def set_state(self, row: int, state: ConnectionState) -> None:
        self._state.words[self._state.connection_base(row) + Con.STATE] = state

    def in_state(self, rows: list[int], state: ConnectionState) -> list[int]:
        """Those of ``rows`` that are in that state."""
        index = np.array(rows, np.intp)
        found: list[int] = index[self._state.connections[index, Con.STATE] == state].tolist()
        return found

    def count_adoption(self, row: int) -> None:
        self._state.words[self._state.connection_base(row) + Con.ADOPTIONS] += 1

    def flags_of(self, row: int) -> ConnectionFlag:
        return ConnectionFlag(int(self._state.connections[row, Con.FLAGS]))

    def flag(self, row: int, flag: ConnectionFlag, *, on: bool) -> None:
        at = self._state.connection_base(row) + Con.FLAGS
        present = self._state.words[at]
        self._state.words[at] = present | flag if on else present & ~flag
