"""Which connections were cut while they were accepted: the one thing that a death of the supervisor may cost. Pure.

Between ``accept`` and the supervisor's first note of a connection lie some 20 us; a supervisor that is killed there
takes that connection with it, before a byte of it was read. Nothing else is excused. So a connection is called *cut at
its accept* only when all of this is true:

* the peer ended it within a second of a kill of the supervisor, or its client reset it before such a kill;
* no other connection is blamed on the same kill: the supervisor accepts one at a time;
* the daemon never knew it: no line of its log names its address and port, as there is one for each row that ever was;
* nothing of it is stored. That is for the comparison to say, which expects nothing of it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

from mpserverd.load.chaos_sent import RESET, SentConnection, SentStream

NOTICED_NS_MAX = 1_000_000_000
"""So late after the kill a client on a loaded machine may see the reset."""
QUEUED_NS_MAX = 10_000_000_000
"""So long what a client sent and reset may have waited to be accepted."""
_PEER = re.compile(r"\bpeer=\"?([0-9.]+:[0-9]+)")


def peers_in(log: Iterable[str]) -> set[str]:
    """Every address and port that the daemon's log names."""
    return {match for line in log for match in _PEER.findall(line)}


def judge(streams: Sequence[SentStream], kills_ns: Iterable[int], known_peers: set[str]) -> list[SentStream]:
    """The same streams with their ``skipped`` filled in; each kill (monotonic ns) explains one connection at most."""
    kills = sorted(kills_ns)
    suspects = [
        (connection, number, place)
        for number, stream in enumerate(streams)
        for place, connection in enumerate(stream.connections)
        if connection.is_broken or connection.how == RESET
        if f"{stream.address}:{connection.port}" not in known_peers
    ]
    skipped: dict[int, list[int]] = {}
    for connection, number, place in sorted(suspects, key=lambda suspect: suspect[0].closed_ns):
        kill_ns = next((kill_ns for kill_ns in kills if _explains(kill_ns, connection)), None)
        if kill_ns is not None:
            kills.remove(kill_ns)
            skipped.setdefault(number, []).append(place)
    return [
        dataclasses.replace(stream, skipped=tuple(sorted(skipped[number]))) if number in skipped else stream
        for number, stream in enumerate(streams)
    ]


def _explains(kill_ns: int, connection: SentConnection) -> bool:
    if connection.is_broken:
        return connection.opened_ns <= kill_ns <= connection.closed_ns <= kill_ns + NOTICED_NS_MAX
    return connection.opened_ns <= kill_ns <= connection.closed_ns + QUEUED_NS_MAX
