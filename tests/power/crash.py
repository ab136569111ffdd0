"""What is left of a disk when its power is cut: a pure function of the log of everything that was done to it.

The model is the weakest that POSIX and a disk with a cache allow. What fsync or fdatasync of a file returned for is
there; names are there once their directory was synced. Of everything later, any part may be there: each change is
kept or dropped by itself, so a later one may be there without an earlier one, and a write is torn between any two
sectors. A rename is there as a whole or not at all.

The same model serves for a whole file system and, with a single file as the disk below ext4 or xfs, for a device.
"""

from __future__ import annotations

import enum
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

SECTOR_BYTES = 512


class Kind(enum.Enum):
    """What was done. ``node`` is the file; for names it is the directory that has them."""

    WRITE = "write"
    SIZE = "size"
    ALLOCATE = "allocate"
    PUNCH = "punch"
    LINK = "link"
    UNLINK = "unlink"
    RENAME = "rename"
    SYNC = "sync"


class Change(NamedTuple):
    """``at_ns``: monotonic time before it was answered. ``child``: the file that a name stands for."""

    at_ns: int
    kind: Kind
    node: int
    offset: int = 0
    length: int = 0
    data: bytes = b""
    name: str = ""
    new_name: str = ""
    child: int = 0


class Fate(enum.Enum):
    """What becomes of changes that no sync covers."""

    ALL_KEPT = "all kept"
    ALL_LOST = "all lost"
    SOME_LOST = "some lost"
    SOME_TORN = "some lost, some torn"


def surviving(log: Sequence[Change], position: int, fate: Fate, random_numbers: random.Random) -> Iterator[Change]:
    """The changes of ``log[:position]`` that the disk has after a cut there, in order."""
    settled_below: dict[int, int] = {}
    for index in range(position):
        if log[index].kind is Kind.SYNC:
            settled_below[log[index].node] = index
    kept_share = random_numbers.choice((0.1, 0.5, 0.9))
    for index in range(position):
        change = log[index]
        if change.kind is Kind.SYNC:
            continue
        if index < settled_below.get(change.node, -1) or fate is Fate.ALL_KEPT:
            yield change
        elif fate is not Fate.ALL_LOST and random_numbers.random() < kept_share:
            if fate is Fate.SOME_TORN and change.kind is Kind.WRITE and random_numbers.random() < 0.5:
                yield from _torn(change, random_numbers)
            else:
                yield change


def unsettled(log: Sequence[Change], position: int) -> int:
    """How many changes of ``log[:position]`` no sync covers."""
    since: dict[int, int] = {}
    for change in log[:position]:
        since[change.node] = 0 if change.kind is Kind.SYNC else since.get(change.node, 0) + 1
    return sum(since.values())


def _torn(change: Change, random_numbers: random.Random) -> Iterator[Change]:
    """Some sectors of a write: a beginning, an end, or any of them."""
    first, end = change.offset, change.offset + len(change.data)
    edges = [first, *range(first - first % SECTOR_BYTES + SECTOR_BYTES, end, SECTOR_BYTES), end]
    sectors = list(itertools.pairwise(edges))
    cut = random_numbers.randrange(len(sectors) + 1)
    match random_numbers.randrange(3):
        case 0:
            sectors = sectors[:cut]
        case 1:
            sectors = sectors[cut:]
        case _:
            sectors = [sector for sector in sectors if random_numbers.random() < 0.5]
    for start, stop in sectors:
        yield change._replace(offset=start, data=change.data[start - first : stop - first])
