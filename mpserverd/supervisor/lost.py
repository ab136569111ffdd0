"""Ends a connection whose socket is gone while its row was not: what had come from it is kept.

Nobody reads such a stream any more and nobody can ask the kernel; so the last published POSITION counts, rounded down
to whole packets. Bytes that were read in the very instant of the death, and not published, die with the socket: they
are in no account. The packets are offered unchecked.
"""

from __future__ import annotations

from mpserverd.arena.chunks import Arena
from mpserverd.arena.state import CloseReason, Con, ConnectionState, StateTable, Str
from mpserverd.arena.window import LeasePool, StreamWindow


def finish_without_socket(state: StateTable, arena: Arena, row: int, reason: CloseReason = CloseReason.FAILED) -> bool:
    """Do what the worker does at the end of a connection (row ENDED); no worker may live that has it. A REASON in the
    row, of a worker that died over the end or of an earlier call, stays.

    False when it has to be tried again after a commit, because packets were dropped and the hole is not passed yet.
    """
    connection = state.connections[row]
    stream_row = int(connection[Con.STREAM])
    stream = state.streams[stream_row]
    lease = state.next_lease()
    window = StreamWindow(state, LeasePool(arena, state, lease), stream_row)
    position = int(stream[Str.POSITION])
    window.adopt(position)
    partial = position % window.packet_size
    window.offer(position - partial, closing=True)
    if window.offered != position - partial:
        return False
    if not connection[Con.REASON]:  # else that much is done, and POSITION may be rounded down already
        consumed = position - int(connection[Con.OFFSET_AT_ATTACH]) + int(connection[Con.HANDSHAKE_BYTES])
        connection[Con.SOCKET_BYTES] = consumed
        stream[Str.SOCKET] = int(connection[Con.SOCKET_AT_ATTACH]) + consumed
        stream[Str.HANDSHAKE] = connection[Con.HANDSHAKE_AT_ATTACH] + connection[Con.HANDSHAKE_BYTES]
        stream[Str.TRUNCATED] = int(connection[Con.TRUNCATED_AT_ATTACH]) + partial
        connection[Con.REASON] = reason
    window.close(position - partial)
    arena.table.revoke(lease)
    state.words[state.connection_base(row) + Con.STATE] = ConnectionState.ENDED
    return True
