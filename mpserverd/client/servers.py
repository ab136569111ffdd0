"""Which server a client tries next, and when. Pure: times are seconds of one monotonic clock and come in as arguments.

Rules: servers are tried in turn, but one that worked is tried once more first. A failure makes the pause before the
next attempt longer, and each pause is shortened at random; a server that said ``retry=`` is not asked earlier, while
others may be.
"""

from __future__ import annotations

import zlib

from mpserverd.client.pacing import NS_PER_S, Backoff
from mpserverd.protocol import mps

PORT = 8889


def parse_server(text: str | tuple[str, int]) -> tuple[str, int]:
    """``host``, ``host:port``, ``[v6]:port`` or a pair. Raises ValueError."""
    if not isinstance(text, str):
        host, port = text
        word = str(port)
    elif text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ValueError(f"server {text!r} is not [address]:port")
        word = rest[1:] or str(PORT)
    elif text.count(":") > 1:
        host, word = text, str(PORT)
    else:
        host, _, word = text.partition(":")
        word = word or str(PORT)
    if not host or not word.isascii() or not word.isdigit() or not 1 <= int(word) <= 65535:
        raise ValueError(f"server {text!r} is not host:port with a port of 1 to 65535")
    return host, int(word)


class Servers:
    """A ring of addresses with the earliest time of each."""

    def __init__(self, addresses: list[tuple[str, int]], backoff_s: tuple[float, float], seed: int) -> None:
        """``backoff_s`` is the first and the longest pause."""
        if not addresses:
            raise ValueError("no server is named")
        first_s, max_s = backoff_s
        if not 0 < first_s <= max_s <= mps.RETRY_S_MAX:
            raise ValueError(f"backoff_s is (first, longest) with 0 < first <= longest <= {mps.RETRY_S_MAX}")
        self._addresses = addresses
        self._not_before = [0.0] * len(addresses)
        self._backoff = Backoff(int(first_s * NS_PER_S), int(max_s * NS_PER_S), seed)
        self._pause_until = 0.0
        self._current = -1
        self._stays = False

    @property
    def key(self) -> int:
        """Names the server that was tried last; never 0, and the same in every program that uses this address."""
        host, port = self._addresses[self._current]
        return zlib.crc32(f"{host}:{port}".encode()) | 1 << 32

    @property
    def are_several(self) -> bool:
        return len(self._addresses) > 1

    def choose(self) -> tuple[tuple[str, int], float]:
        """The server to try next and when: of those that may be asked soonest the first behind the last one, or the
        last one itself if it is to be tried again. Then say ``trying``."""
        count, first = len(self._addresses), 0 if self._stays else 1
        order = [(self._current + step) % count for step in range(first, first + count)]
        self._next = min(order, key=lambda number: max(self._not_before[number], self._pause_until))
        return self._addresses[self._next], max(self._not_before[self._next], self._pause_until)

    def trying(self) -> None:
        """The chosen one is tried now."""
        self._current, self._stays = self._next, False

    def failed(self, now: float, retry_s: float | None = None, all_of_them: bool = False) -> None:
        """The attempt or the connection ended. ``retry_s`` is what the server asked for."""
        self._pause_until = now + self._backoff.next_ns() / NS_PER_S
        if retry_s is None:
            return
        for number in range(len(self._addresses)):
            if all_of_them or number == self._current:
                self._not_before[number] = max(self._not_before[number], now + retry_s)

    def worked(self) -> None:
        """Something was acknowledged: the next pause is short again, and this server is the next one too."""
        self._backoff.reset()
        self._stays = True

    def again(self) -> None:
        """It did not fail: this server is the next one too, after the pause."""
        self._stays = True

    def at_once(self, now: float) -> None:
        """This server is to be asked something else, now."""
        self._stays, self._pause_until = True, now
