"""What lies in the directory of a stream, as far as it can be read without a catalog. Nothing is changed.

A file that cannot be read or makes no sense is a fault in words, and counts as not there; but one that only this caller
may not read ends the work.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mpserverd.storer.index_tail import read_tail
from mpserverd.storer.tails import in_one_piece, last_written
from mpserverd.streams.sidecar import IDENTITY_FILE, HoleRow, Identity, holes_name, read_holes, read_identity
from mpserverd.streams.verify_spool import SEGMENT_FILE, check_index, has_a_meaning, unreadable

_SEG = ".seg"


@dataclass(frozen=True)
class SegmentOnDisk:
    first: int
    size: int
    mtime_ns: int


@dataclass
class Scanned:
    """``index`` are the last offsets of each time index that makes sense, by segment."""

    name: str
    path: str
    identity: Identity | None = None
    faults: list[str] = field(default_factory=list)
    aside: list[str] = field(default_factory=list)
    """Names of files that make no sense and are to be set aside."""
    segments: list[SegmentOnDisk] = field(default_factory=list)
    holes: list[HoleRow] = field(default_factory=list)
    index: dict[int, list[int]] = field(default_factory=dict)
    beside: set[int] = field(default_factory=set)
    """First offsets of segments, there or not, that have files beside them."""

    def offsets(self) -> list[int]:
        """All that the time indexes name, rising, each once."""
        return sorted({offset for offsets in self.index.values() for offset in offsets})


def scan(path: str) -> Scanned:
    """Raises OSError when the directory cannot be read, SpoolError when the caller lacks a permission."""
    found = Scanned(os.path.basename(path), path)
    try:
        found.identity = read_identity(Path(path))
    except ValueError as error:
        found.faults.append(f"stream.json makes no sense: {error}")
        found.aside.append("stream.json")
    except OSError as error:
        found.faults.append(unreadable(Path(path, IDENTITY_FILE), error))
    names = sorted(os.listdir(path))
    kinds = {name: match for name in names if (match := SEGMENT_FILE.fullmatch(name))}
    for name, match in sorted(kinds.items(), key=lambda item: item[1][2] != "seg"):
        _ADD[match[2]](found, name, int(match[1]))
    strangers = [name for name in names if name not in kinds and not has_a_meaning(name)]
    found.faults += [f"{name} is of no kind that belongs here: set aside" for name in strangers]
    found.aside += strangers
    return found


def _add_segment(found: Scanned, name: str, first: int) -> None:
    path = os.path.join(found.path, name)
    try:
        there = os.stat(path)
        if not os.path.isfile(path):
            found.faults.append(f"{name} is no file")
            found.aside.append(name)
            return
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        found.faults.append(unreadable(Path(path), error))
        found.aside.append(name)
        return
    found.segments.append(SegmentOnDisk(first, there.st_size, there.st_mtime_ns))


def _add_index(found: Scanned, name: str, first: int) -> None:
    found.beside.add(first)
    faults = list(check_index(Path(found.path, name), first))
    if faults:
        found.faults.append(f"{name} makes no sense: the times of its packets are not known")
        found.aside.append(name)
    else:
        found.index[first] = read_tail(found.path, first)


def _add_holes(found: Scanned, name: str, first: int) -> None:
    found.beside.add(first)
    try:
        found.holes = merged([*found.holes, *read_holes(Path(found.path), first)])
    except ValueError as error:
        found.faults.append(f"{name} makes no sense: {error}; what was a hole there reads as zeros")
        found.aside.append(holes_name(first))
    except OSError as error:
        found.faults.append(unreadable(Path(found.path, name), error))
        found.aside.append(name)


_ADD = {"seg": _add_segment, "idx": _add_index, "holes": _add_holes}


def merged(holes: Sequence[HoleRow]) -> list[HoleRow]:
    """In order, none overlapping another: what an earlier one has is taken out of the next."""
    result: list[HoleRow] = []
    for first, end, kind in sorted(set(holes), key=lambda hole: (hole[0], -hole[1])):
        start = max(first, result[-1][1]) if result else first
        if start < end:
            result.append((start, end, kind))
    return result


# -- how far the data go


def whole_data_end(found: Scanned, proven: int, holes: Sequence[HoleRow]) -> int:
    """Where the data that begin at ``proven`` end, over as many segments as join; holes need no data."""
    at = proven
    while True:
        hole = next((end for first, end, _ in holes if first <= at < end), None)
        if hole is not None:
            at = hole
            continue
        here = [segment for segment in found.segments if segment.first <= at]
        if not here:
            return at
        segment = here[-1]
        later = [other.first for other in found.segments if other.first > at]
        stop = min([segment.first + segment.size, *later])
        if stop <= at:
            return at
        reached = _piece(found, segment.first, at, stop, holes)
        if reached < stop or not later or stop != later[0]:
            return reached
        at = reached


def _piece(found: Scanned, base: int, first: int, end: int, holes: Sequence[HoleRow]) -> int:
    zeros = [(max(a, base) - base, b - base) for a, b, _ in holes if b > first and a < end]
    descriptor = _open(found, base)
    try:
        return base + in_one_piece(descriptor, first - base, end - base, zeros)
    finally:
        os.close(descriptor)


def written_end(found: Scanned, first: int, end: int) -> int:
    """One past the last byte of [first, end) that is not zero; ``first`` when there is none."""
    for number, segment in reversed(list(enumerate(found.segments))):
        limit = found.segments[number + 1].first if number + 1 < len(found.segments) else end
        start, stop = max(first, segment.first), min(end, limit, segment.first + segment.size)
        if start >= stop:
            continue
        descriptor = _open(found, segment.first)
        try:
            at = segment.first + last_written(descriptor, start - segment.first, stop - segment.first)
        finally:
            os.close(descriptor)
        if at > start:
            return at
    return first


def _open(found: Scanned, first: int) -> int:
    return os.open(os.path.join(found.path, f"{first:020d}{_SEG}"), os.O_RDONLY | os.O_CLOEXEC)
