"""Holds the files of a spool against its catalog, without changing either.

For each stream: the segments cover everything from the first offset to the durable one, but for the holes that the
catalog lists; each file is there, long enough, readable, and, once sealed, has the checksum of its content. What has no
checksum yet (the segment being written, one that was set aside) is read but cannot be compared, and is reported as
such. What lies around the content is ``verify_spool.py``'s. Works beside a running daemon: what retention took away
meanwhile is no finding.

It repairs nothing, and says nothing about accounts; that is ``mpserverctl ledger``.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from mpserverd.errors import DamageError
from mpserverd.streams.catalog_file import STREAMS_DIRECTORY
from mpserverd.streams.catalog_view import Segment, StreamSnapshot, stream_by_id
from mpserverd.streams.extents import Extent, split_at_holes
from mpserverd.streams.verify_spool import check_directory, check_index, unreadable

READ_BYTES = 1 << 20
AHEAD_SEGMENTS_PER_JOB = 4
STATES = ("open", "sealed", "aside")


@dataclass
class SegmentCheck:
    """What one file said. ``absent``: no file, which retention may explain. ``other``: not what was sealed."""

    segment: Segment
    findings: list[str] = field(default_factory=list)
    checked_bytes: int = 0
    unchecked_bytes: int = 0
    absent: bool = False
    other: bool = False


@dataclass
class StreamCheck:
    """What was found about one stream. ``checked_bytes`` were compared with a checksum, ``unchecked_bytes`` only
    read. ``other_content``: segments that are not what was sealed."""

    name: str
    epoch: str
    segments: int = 0
    checked_bytes: int = 0
    unchecked_bytes: int = 0
    holes: int = 0
    hole_bytes: int = 0
    other_content: int = 0
    retired_meanwhile: bool = False
    findings: list[str] = field(default_factory=list)

    @property
    def fine(self) -> bool:
        return not self.findings

    def as_json(self) -> dict[str, Any]:
        return {"fine": self.fine, **self.__dict__}


def verify_streams(spool: Path, snapshots: Sequence[StreamSnapshot], jobs: int) -> Iterator[StreamCheck]:
    """Check streams in order, reading ``jobs`` files at a time."""
    waiting: deque[tuple[StreamSnapshot, Future[list[str]], list[Future[SegmentCheck]]]] = deque()
    with ThreadPoolExecutor(max_workers=jobs, thread_name_prefix="verify") as pool:
        try:
            for snapshot in snapshots:
                directory = spool / STREAMS_DIRECTORY / snapshot.row.directory
                durable = snapshot.row.durable
                around = pool.submit(check_directory, spool, snapshot)
                checks = [pool.submit(check_segment, directory, segment, durable) for segment in snapshot.segments]
                waiting.append((snapshot, around, checks))
                while sum(1 + len(futures) for _, _, futures in waiting) > AHEAD_SEGMENTS_PER_JOB * jobs:
                    yield _finish(spool, *waiting.popleft())
            while waiting:
                yield _finish(spool, *waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def repair_step(checks: Sequence[StreamCheck]) -> str:
    """What to do when something is wrong. What has other content than it should is only looked for when asked."""
    command = "mpserverctl repair --checksums" if any(check.other_content for check in checks) else "mpserverctl repair"
    return f"stop the daemon and run {command}"


def _finish(
    spool: Path, snapshot: StreamSnapshot, around: Future[list[str]], futures: list[Future[SegmentCheck]]
) -> StreamCheck:
    row = snapshot.row
    holes = [hole for hole in snapshot.holes if hole.end > row.first_offset]
    found = StreamCheck(row.full_name, row.epoch, len(snapshot.segments), holes=len(holes))
    found.hole_bytes = sum(hole.end - hole.first for hole in holes)
    found.findings.extend(check_catalog(snapshot))
    found.findings.extend(around.result())
    checks = [future.result() for future in futures]
    absent = [check.segment for check in checks if check.absent]
    retired = _retired(spool, snapshot, absent) if absent else set()
    for check in checks:
        found.checked_bytes += check.checked_bytes
        found.unchecked_bytes += check.unchecked_bytes
        found.other_content += check.other
        if check.absent and check.segment.first in retired:
            found.retired_meanwhile = True
        else:
            found.findings.extend(check.findings)
    return found


def _retired(spool: Path, snapshot: StreamSnapshot, absent: list[Segment]) -> set[int]:
    """Which of these segments the catalog no longer lists."""
    now = stream_by_id(spool, snapshot.row.id)
    if now is None:
        return {segment.first for segment in absent}
    kept = {segment.first for segment in now.segments}
    return {segment.first for segment in absent if segment.first not in kept}


def check_catalog(snapshot: StreamSnapshot) -> Iterator[str]:
    """What is wrong with the rows themselves: order, states, and offsets that no segment covers."""
    row = snapshot.row
    try:
        row.layout  # noqa: B018 - is made when it is asked for
    except DamageError as error:
        yield str(error)
    if row.first_offset > row.durable:
        yield f"first offset {row.first_offset} is behind durable offset {row.durable}"
    at = row.first_offset
    for segment in snapshot.segments:
        end = row.durable if segment.end is None else segment.end
        if segment.state not in STATES:
            yield f"segment {segment.first} has the unknown state {segment.state!r}"
        if segment.end is None and segment is not snapshot.segments[-1]:
            yield f"segment {segment.first} has no end, but others follow it"
        if end < segment.first and segment.end is not None:
            yield f"segment {segment.first} ends at {end}, before it begins"
        if segment.first > at:
            yield from _uncovered(snapshot, at, min(segment.first, row.durable))
        at = max(at, end)
    if at < row.durable:
        yield from _uncovered(snapshot, at, row.durable)
    yield from _overlaps(snapshot)


def _uncovered(snapshot: StreamSnapshot, first: int, end: int) -> Iterator[str]:
    for item in split_at_holes(first, end, snapshot.holes):
        if isinstance(item, Extent):
            yield f"no segment holds offsets {item.first} to {item.end}, and no hole explains it"


def _overlaps(snapshot: StreamSnapshot) -> Iterator[str]:
    for before, after in pairwise(snapshot.segments):
        if before.end is not None and before.end > after.first and before.state != "aside":
            yield f"segments {before.first} and {after.first} both hold offsets {after.first} to {before.end}"
    for hole, following in pairwise(snapshot.holes):
        if hole.end > following.first:
            yield f"holes at {hole.first} and {following.first} overlap"


def check_segment(directory: Path, segment: Segment, durable: int) -> SegmentCheck:
    """Read one file to the end of its content."""
    check = SegmentCheck(segment)
    end = durable if segment.end is None else min(segment.end, durable)
    length = max(0, end - segment.first)
    path = directory / segment.file_name
    try:
        with path.open("rb", buffering=0) as file:
            found = os.fstat(file.fileno()).st_size
            if found < length:
                check.findings.append(f"{path} has {found} bytes, {length} are durable")
            digest = _digest(file.fileno(), min(found, length))
    except FileNotFoundError:
        check.absent = True
        check.findings.append(f"{path} is missing; it holds offsets {segment.first} to {end}")
        return check
    except OSError as error:
        check.findings.append(unreadable(path, error))
        return check
    if segment.state == "sealed" and segment.sha256:
        check.checked_bytes = length
        if digest != segment.sha256 and found >= length:
            check.other = True
            check.findings.append(f"{path} has other content than when it was sealed (sha256 {digest[:16]}…)")
    else:
        check.unchecked_bytes = length
    check.findings.extend(check_index(directory / segment.index_name, segment.first))
    return check


def _digest(descriptor: int, length: int) -> str:
    """Hash the first ``length`` bytes. What was read for this alone does not stay in memory."""
    digest, buffer, at = hashlib.sha256(), bytearray(READ_BYTES), 0
    view = memoryview(buffer)
    while at < length:
        got = os.preadv(descriptor, [view[: min(READ_BYTES, length - at)]], at)
        if got == 0:
            break
        digest.update(view[:got])
        at += got
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return digest.hexdigest()
