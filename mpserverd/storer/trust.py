"""Whether the catalog may be believed before anything is changed on its word. If not, the start ends and names repair.

A catalog that is missing or empty beside streams that are there, or that lacks commits which the files prove (its log
was lost, or somebody brought back an older one), would have acknowledged packets written over. Nothing is changed here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from mpserverd.arena.state import Str, StreamFlag
from mpserverd.errors import StartError
from mpserverd.storer.catalog import CATALOG_FILE, StreamRecord
from mpserverd.storer.index_tail import ahead, read_tail
from mpserverd.storer.live import Desk
from mpserverd.streams.sidecar import is_stream_directory, read_identity

NEXT_STEP = "stop the daemon and run mpserverctl repair; nothing was changed"


def require_catalog(spool: str, streams: str) -> None:
    """Raises StartError where there are streams and no catalog that could know them."""
    path = os.path.join(spool, CATALOG_FILE)
    try:
        if os.stat(path).st_size:
            return
        fault = "is empty"
    except FileNotFoundError:
        fault = "is missing"
    except OSError:
        return  # opening it will say why
    found = _a_stream(streams)
    if found:
        raise StartError(f"the catalog {path} {fault}, but there are streams, such as {found}; {NEXT_STEP}")


def _a_stream(streams: str) -> str:
    try:
        with os.scandir(streams) as entries:
            return next((e.path for e in entries if not e.name.endswith(".aside") and is_stream_directory(e.path)), "")
    except OSError:
        return ""


def require_current(desk: Desk, records: Mapping[int, StreamRecord], firsts: Mapping[int, set[int]]) -> None:
    """Raises StartError when files or memory prove that commits are missing in the catalog."""
    proofs = [*_rows_ahead(desk, records), *_files_ahead(desk, records, firsts), *_unknown_streams(desk, records)]
    if proofs:
        more = f", and {len(proofs) - 1} more like it" if len(proofs) > 1 else ""
        raise StartError(f"the catalog {desk.catalog.path} is older than the files: {proofs[0]}{more}; {NEXT_STEP}")


def _rows_ahead(desk: Desk, records: Mapping[int, StreamRecord]) -> Iterable[str]:
    """A position is published after its commit."""
    by_epoch = {record.epoch: record for record in records.values()}
    for row in desk.live_rows().tolist():
        words = desk.state.streams[row].tolist()
        record = by_epoch.get(f"{words[Str.EPOCH]:016x}")
        if record is not None and words[Str.FLAGS] & StreamFlag.STORE and words[Str.DURABLE] > record.durable:
            yield f"stream {record.name} was durable to {words[Str.DURABLE]}, it says {record.durable}"


def _files_ahead(desk: Desk, records: Mapping[int, StreamRecord], firsts: Mapping[int, set[int]]) -> Iterable[str]:
    """Of a stream in the table the memory knows better; its files were looked at when it was opened."""
    live = {f"{int(desk.state.streams[row, Str.EPOCH]):016x}" for row in desk.live_rows().tolist()}
    for record in records.values():
        if record.epoch in live or not (record.named or record.connected):
            continue  # a made-up name is never continued
        directory = desk.path_of(record.directory)
        wanted = _segments_from(directory, record.durable) | {max(firsts.get(record.id, {0}))}
        offsets = [offset for first in wanted for offset in read_tail(directory, first)]
        found = ahead(offsets, record.durable)
        if len(found) > 1:
            yield f"stream {record.name} was durable to at least {found[-2]} by its index, it says {record.durable}"


def _segments_from(directory: str, first: int) -> set[int]:
    try:
        names = os.listdir(directory)
    except OSError:
        return set()
    stems = [name.removesuffix(".idx") for name in names if name.endswith(".idx")]
    return {int(stem) for stem in stems if stem.isdecimal() and int(stem) >= first}


def _unknown_streams(desk: Desk, records: Mapping[int, StreamRecord]) -> Iterable[str]:
    """A stream's row is committed before its directory is made, and goes after its identity."""
    known = {record.directory for record in records.values()}
    epochs = {record.epoch for record in records.values()}
    with os.scandir(desk.streams_path) as entries:
        strangers = [entry.path for entry in entries if entry.name not in known and not entry.name.endswith(".aside")]
    for path in strangers:
        try:
            identity = read_identity(Path(path))
        except (ValueError, OSError):
            continue
        if identity is None or identity.epoch in epochs:
            continue
        offsets = {offset for first in _segments_from(path, 0) for offset in read_tail(path, first)}
        if len(offsets) > 1:
            yield f"it does not know the stream in {path} (or somebody put that there: then move it away)"
