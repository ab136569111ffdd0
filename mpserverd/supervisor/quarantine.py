"""Streams on which workers die, and clients that are not let in again because of one.

A death counts against a stream when its worker had it in hand at that moment (a word of the worker's slot), and when
the worker was not simply killed from outside. It counts as one more only if not a single packet of the stream was
checked since the last one: whatever kills a worker stands at the same place then. Three make a quarantine: the
connection is ended, everything that came from it is stored unchecked, and its client is refused: by id until an
operator releases it, by address for QUARANTINE_S. It is the same with a hello, of which nothing is stored.

Pure: time comes in as an argument. Who is refused is kept over the supervisor's death by whoever calls ``facts``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

DEATHS_MAX = 3
QUIET_S = 60.0
"""A death so long ago is forgotten ..."""
HANGS_REMEMBERED = 3
"""... unless workers hang: each takes the heartbeat's timeout, and its replacement may hang again."""
QUARANTINE_S = 600.0
"""For clients that are known by their address only, which may be another's tomorrow."""
ENTRIES_MAX = 1000


@dataclasses.dataclass(slots=True)
class _Suspicion:
    deaths: int
    checked: int
    at_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """``client`` is an id or an address; ``until_unix_s`` is 0 for one that stays until it is released."""

    client: str
    stream: str
    since_unix_s: float
    until_unix_s: float


class Quarantine:
    """Who is suspected, and who is refused."""

    def __init__(self) -> None:
        self._suspicions: dict[str, _Suspicion] = {}
        self._entries: dict[str, Entry] = {}

    # -- suspicion

    def died(self, suspect: str, checked: int, now_s: float, *, hang_s: float = 0.0) -> bool:
        """A worker died with this stream or hello in hand. True when it is once too often. ``hang_s`` is how long one
        that hangs is waited for."""
        quiet_s = max(QUIET_S, HANGS_REMEMBERED * hang_s)
        self._suspicions = {name: known for name, known in self._suspicions.items() if now_s - known.at_s < quiet_s}
        known = self._suspicions.get(suspect)
        deaths = known.deaths + 1 if known is not None and known.checked == checked else 1
        self._suspicions[suspect] = _Suspicion(deaths, checked, now_s)
        if deaths < DEATHS_MAX:
            return False
        del self._suspicions[suspect]
        return True

    # -- who is refused

    def add(self, client: str, stream: str, now_unix_s: float, *, named: bool) -> Entry:
        entry = Entry(client, stream, now_unix_s, 0.0 if named else now_unix_s + QUARANTINE_S)
        self._entries.pop(client, None)
        self._entries[client] = entry
        while len(self._entries) > ENTRIES_MAX:
            del self._entries[next(iter(self._entries))]
        return entry

    def refuses(self, client: str, now_unix_s: float) -> bool:
        entry = self._entries.get(client)
        return entry is not None and (not entry.until_unix_s or now_unix_s < entry.until_unix_s)

    def entries(self, now_unix_s: float) -> list[Entry]:
        """Those in force, the oldest first."""
        return [entry for entry in self._entries.values() if self.refuses(entry.client, now_unix_s)]

    def release(self, target: str) -> list[str]:
        """Let a client in again: its id, its address, its stream, or ``all``. Returns whom."""
        found = [entry.client for entry in self._entries.values() if target in ("all", entry.client, entry.stream)]
        for client in found:
            del self._entries[client]
        return found

    # -- over the supervisor's death

    def facts(self) -> list[dict[str, Any]]:
        return [dataclasses.asdict(entry) for entry in self._entries.values()]

    def take_up(self, facts: list[dict[str, Any]]) -> None:
        """What ``facts`` of an earlier supervisor said; entries that make no sense here are left out."""
        names = {field.name for field in dataclasses.fields(Entry)}
        for plain in facts:
            if names <= plain.keys():
                self._entries[plain["client"]] = Entry(**{name: plain[name] for name in names})
