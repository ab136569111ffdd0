"""What ``verify`` looks at besides the content of segments: the pages of the catalog, what directories say about
themselves, the time index against the durable offset, and files that no row explains.

It looks at what a start of the daemon looks at, so that a spool that passes is one that the daemon starts on. Beside a
running daemon everything moves; the order of the looks is what keeps false alarms out, and is said where it matters.
"""

from __future__ import annotations

import os
import re
import sqlite3
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from mpserverd.errors import SpoolError
from mpserverd.limits import SEGMENT_BYTES_MAX
from mpserverd.streams.catalog_file import CATALOG_FILE, STREAMS_DIRECTORY, ask
from mpserverd.streams.catalog_view import StreamSnapshot, stream_by_id
from mpserverd.streams.sidecar import (
    IDENTITY_FILE,
    RETIRED_FILE,
    Identity,
    holes_name,
    is_lost_and_found,
    read_holes,
    read_identity,
)
from mpserverd.streams.times import read_index

_GOING_S, _LOOK_S = 2.0, 0.05
SEGMENT_FILE = re.compile(r"(\d{20})\.(seg|idx|holes)")
_EARLY_FILE = re.compile(r"\d{20}\.new")


def has_a_meaning(name: str) -> bool:
    """Whether a file of that name, in the directory of a stream, needs no row that explains it."""
    return name in (IDENTITY_FILE, RETIRED_FILE) or name.endswith(".aside") or bool(_EARLY_FILE.fullmatch(name))


def unreadable(path: Path, error: OSError) -> str:
    """The finding. Raises SpoolError where the caller only has no permission."""
    if isinstance(error, PermissionError):
        raise SpoolError(f"no permission to read {path}; run as root or as a member of the spool's group") from None
    return f"{path} cannot be read: {error.strerror}"


# -- the spool


def check_catalog_pages(spool: Path) -> Iterator[str]:
    """SQLite finds what a query of single rows never meets. Raises DamageError, SpoolError."""

    def question(connection: sqlite3.Connection) -> str:
        return str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])

    fault = ask(spool, question)
    if fault != "ok":
        yield f"the catalog {spool / CATALOG_FILE} is damaged: {' '.join(fault.split())}"


def list_directories(spool: Path) -> list[str]:
    """What lies where streams do; none where that cannot be read, which the streams will say."""
    try:
        return sorted(os.listdir(spool / STREAMS_DIRECTORY))
    except OSError:
        return []


def check_directories(spool: Path, names: Collection[str]) -> Iterator[str]:
    """``names`` are from before this call: a row is committed before its directory is made, so whatever was there then
    and is in no row now is nobody's, or on its way out. Retention takes the identity away with the row, and the rest
    right after: what has none gets a moment."""
    known = {name for (name,) in ask(spool, lambda catalog: catalog.execute("SELECT directory FROM stream").fetchall())}
    paths = [spool / STREAMS_DIRECTORY / name for name in names if name not in known and not name.endswith(".aside")]
    paths = [path for path in paths if not is_lost_and_found(str(path))]
    until_s = time.monotonic() + _GOING_S
    while (left := [path for path in paths if _is_left(path)]) and time.monotonic() < until_s:
        if all((path / IDENTITY_FILE).exists() for path in left):
            break
        time.sleep(_LOOK_S)
    yield from (f"{path} belongs to no stream of the catalog" for path in left)


def _is_left(path: Path) -> bool:
    return os.path.lexists(path) and not (path / RETIRED_FILE).exists()


# -- the directory of a stream


def check_directory(spool: Path, snapshot: StreamSnapshot) -> list[str]:
    """All but the content of segments. The snapshot is older than what is read here."""
    path = spool / STREAMS_DIRECTORY / snapshot.row.directory
    try:
        names = sorted(os.listdir(path))
    except FileNotFoundError:
        return []  # its segments will be missed; without any it is made anew
    except OSError as error:
        return [unreadable(path, error)]
    return [
        *_check_names(path, names, snapshot),
        *_check_identity(path, snapshot),
        *_check_holes(path, snapshot),
        *_check_age(spool, path, names, snapshot),
    ]


def _check_names(path: Path, names: Collection[str], snapshot: StreamSnapshot) -> Iterator[str]:
    """Behind the durable offset lies what was begun and not committed, before the first one what retention gave up:
    neither is a fault, and segments that are made after the snapshot begin there."""
    row, listed = snapshot.row, {segment.first for segment in snapshot.segments}
    for name in names:
        if has_a_meaning(name):
            continue
        found = SEGMENT_FILE.fullmatch(name)
        first = int(found[1]) if found else -1
        if first in listed or 0 <= first < row.first_offset or first >= row.durable:
            continue
        yield f"{path / name} is no file of this stream by the catalog"


def _check_identity(path: Path, snapshot: StreamSnapshot) -> Iterator[str]:
    """It is durable before the first segment is committed. An older version wrote none."""
    if not snapshot.segments:
        return
    try:
        identity = _read_identity(path)
    except ValueError as error:
        yield f"{path / IDENTITY_FILE} makes no sense: {error}"
        return
    except OSError as error:
        yield unreadable(path / IDENTITY_FILE, error)
        return
    row = snapshot.row
    if identity is not None and (identity.epoch, identity.name, identity.packet_size) != (
        row.epoch,
        row.name,
        row.packet_size,
    ):
        says = f"says stream {identity.name}, epoch {identity.epoch}, packets of {identity.packet_size} bytes"
        yield f"{path / IDENTITY_FILE} {says}; by the catalog it is {row.name}, {row.epoch}, {row.packet_size}"


def _read_identity(path: Path) -> Identity | None:
    """Twice, if need be: the daemon may be writing it anew. Raises ValueError, OSError."""
    try:
        return read_identity(path)
    except ValueError:
        return read_identity(path)


def _check_holes(path: Path, snapshot: StreamSnapshot) -> Iterator[str]:
    for segment in snapshot.segments:
        try:
            read_holes(path, segment.first)
        except ValueError as error:
            yield f"{path / holes_name(segment.first)} makes no sense: {error}"
        except OSError as error:
            yield unreadable(path / holes_name(segment.first), error)


def check_index(path: Path, first: int) -> Iterator[str]:
    """The time index has rising offsets from ``first`` on, where its segment begins.

    Its end may be ahead of the catalog: it is written before the commit, and a storer that is killed between the two
    leaves it so. Readers pass over such entries.
    """
    try:
        offsets = read_index(path, None)["offset"]
    except OSError as error:
        yield unreadable(path, error)
        return
    if not len(offsets):
        return
    if (offsets[1:] < offsets[:-1]).any():
        yield f"{path} goes back"
    if int(offsets.min()) < first:
        yield f"{path} begins at {int(offsets.min())}, before its segment"
    if int(offsets.max()) > first + SEGMENT_BYTES_MAX:
        yield f"{path} names offset {int(offsets.max())}, which no segment that begins at {first} holds"


def _check_age(spool: Path, path: Path, names: Collection[str], snapshot: StreamSnapshot) -> Iterator[str]:
    """A pair of the time index is written before its commit, and no second one before that is done: two pairs ahead of
    a row that is asked for afterwards prove that the row is old."""
    newest = max((segment.first for segment in snapshot.segments), default=0)
    offsets: set[int] = set()
    for name in names:
        found = SEGMENT_FILE.fullmatch(name)
        if found is None or found[2] != "idx" or int(found[1]) < newest:
            continue
        if not any(check_index(path / name, int(found[1]))):
            offsets.update(read_index(path / name, None)["offset"].tolist())
    if len(_behind(offsets, snapshot.row.durable)) < 2:
        return
    now = stream_by_id(spool, snapshot.row.id)
    if _may_lack_commits(spool):
        return
    if now is not None and len(proofs := _behind(offsets, now.row.durable)) > 1:
        yield f"its time index was durable to at least {proofs[-2]}, the catalog says {now.row.durable} and is too old"


def _may_lack_commits(spool: Path) -> bool:
    """With [spool] sync = "none" a power cut takes commits, too, and the daemon starts all the same."""
    question = "SELECT 1 FROM meta WHERE key = 'sync' AND value = 'none'"
    return ask(spool, lambda catalog: catalog.execute(question).fetchone()) is not None


def _behind(offsets: Collection[int], durable: int) -> list[int]:
    return sorted(offset for offset in offsets if offset > durable)
