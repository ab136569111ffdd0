"""What becomes of an mps hello: where its client goes on, or why it is refused. Pure.

    the server's stream     epoch= of the hello     answer
    none                    none                    a fresh epoch, from ``first``
    none                    any, first=0            that epoch, from 0: nothing of it was ever acknowledged
    none                    any, else               ERR epoch
    known                   none, or its own        goes on
    known                   another                 ERR epoch
    any, with new=1         not the stream's        a fresh epoch, from 0

    another packet size than the stream's: ERR packet-size. ``first`` beyond the next packet: what lies between is lost.

The storer finds the stream or begins one by ``asked``; ``judge`` then looks at what came of it. It also looks at the
stream of a connection that is to be superseded: who will be refused ends nobody else.
"""

from __future__ import annotations

import dataclasses

from mpserverd.protocol.mps import INDEX_MAX, RETRY_S_MAX, ErrorCode, Hello, HelloError

RIVALS_FORGOTTEN_S = 60.0
"""Two devices share an id when one supersedes the other again within this time."""
RETRY_S_LIMIT = min(64, RETRY_S_MAX)
RIVALS_MAX = 1000
_DOUBLINGS_MAX = RETRY_S_LIMIT.bit_length() - 1


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """What the storer is asked for: ``epoch`` for a stream that is begun (0: a random one), ``asked_epoch`` and
    ``new_epoch`` to judge one that is there."""

    epoch: int = 0
    asked_epoch: int = 0
    new_epoch: bool = False


GOES_ON = Asked()
"""Whatever is there, or a fresh stream."""


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """The stream that the storer has opened; ``position`` is its durable end in bytes."""

    epoch: int
    packet_size: int
    position: int


def asked(hello: Hello) -> Asked:
    """Raises HelloError for offsets that no stream can have."""
    if (hello.first or 0) * hello.packet_size > INDEX_MAX:
        raise HelloError(ErrorCode.FIRST, f"first x packet size is more than {INDEX_MAX}")
    known = hello.epoch or 0
    adopts = hello.first == 0 and not hello.new
    return Asked(epoch=known if adopts else 0, asked_epoch=known, new_epoch=hello.new)


def judge(hello: Hello, found: Found) -> int:
    """The offset at which the client goes on, beyond ``found.position`` if it lost packets. Raises HelloError."""
    if hello.new and hello.epoch != found.epoch:
        return 0
    if found.packet_size != hello.packet_size:
        text = f"the stream has packets of {found.packet_size} bytes, not {hello.packet_size}; new=1 begins anew"
        raise HelloError(ErrorCode.PACKET_SIZE, text)
    if hello.epoch is not None and hello.epoch != found.epoch:
        at = found.position // found.packet_size
        here = f"the stream is in epoch {found.epoch:016x} at packet {at}" if at else "nothing of that epoch is kept"
        raise HelloError(ErrorCode.EPOCH, f"{here}; new=1 begins anew")
    return max(found.position, (hello.first or 0) * hello.packet_size)


class Rivals:
    """Clients that supersede each other again and again: two devices with one id."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, float]] = {}

    def superseded(self, client_id: str, now_s: float) -> int:
        """How long the one that has to go shall stay away, in seconds: doubled each time."""
        count, last_s = self._seen.pop(client_id, (0, now_s))
        count = count + 1 if now_s - last_s < RIVALS_FORGOTTEN_S + 2**count else 1
        self._seen[client_id] = (min(count, _DOUBLINGS_MAX), now_s)
        while len(self._seen) > RIVALS_MAX:
            del self._seen[next(iter(self._seen))]
        return min(1 << (count - 1), RETRY_S_LIMIT)
