"""The catalog of a backup: taken in one consistent state, narrowed, and brought up to date for single streams.

Rows are copied whole, whatever columns they have, so that nothing of the catalog is known here but its keys. It is
written as an ordinary database without a log beside it, in a place of its own until the files it speaks of are there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mpserverd.streams.catalog_file import CATALOG_FILE, ask

STAGING_DIRECTORY = ".new"
"""Within the backup; the new catalog has its usual name in it, so that readers of spools work on it."""
_KEYS = {"stream": "id", "segment": "stream", "hole": "stream"}
"""Tables that have rows of a stream, and the column that says of which."""


def take(spool: Path, directory: Path) -> Path:
    """Copy the whole catalog as it is at one moment. Raises SpoolError and its kind.

    SQLite's backup runs in one step within a read transaction: in several, every commit of the storer would start it
    again. Writers are not held up by it.
    """
    staging = directory / STAGING_DIRECTORY
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(mode=0o750)
    path = staging / CATALOG_FILE

    def copy(source: sqlite3.Connection) -> None:
        with contextlib.closing(sqlite3.connect(path)) as target:
            source.backup(target)

    ask(spool, copy)
    with opened(path) as catalog:
        catalog.execute("PRAGMA journal_mode = DELETE")
        catalog.execute("UPDATE stream SET connected = 0")
    return path


@contextlib.contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """The new catalog, for changes; each statement is a transaction."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        yield connection


def keep_only(path: Path, streams: Iterable[int]) -> None:
    """Remove every stream but these."""
    with opened(path) as catalog:
        catalog.execute("BEGIN")
        kept = set(streams)
        others = [number for (number,) in catalog.execute("SELECT id FROM stream") if number not in kept]
        for number in others:
            _remove(catalog, number)
        catalog.execute("COMMIT")


def retake(spool: Path, path: Path, stream: int) -> bool:
    """Replace a stream's rows by what the live catalog says now. False when the stream is gone there, and so here."""

    def rows(source: sqlite3.Connection) -> dict[str, tuple[list[str], list[Sequence[Any]]]]:
        found = {}
        for table, key in _KEYS.items():
            cursor = source.execute(f"SELECT * FROM {table} WHERE {key} = ?", (stream,))
            found[table] = ([column[0] for column in cursor.description], cursor.fetchall())
        return found

    fresh = ask(spool, rows)
    with opened(path) as catalog:
        catalog.execute("BEGIN")
        _remove(catalog, stream)
        for table, (columns, values) in fresh.items():
            marks = ", ".join("?" * len(columns))
            catalog.executemany(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})", values)
        catalog.execute("UPDATE stream SET connected = 0 WHERE id = ?", (stream,))
        catalog.execute("COMMIT")
    return bool(fresh["stream"][1])


def _remove(catalog: sqlite3.Connection, stream: int) -> None:
    for table, key in _KEYS.items():
        catalog.execute(f"DELETE FROM {table} WHERE {key} = ?", (stream,))


def finish(path: Path) -> None:
    """Make it durable where readers look for it."""
    final = path.parent.parent / CATALOG_FILE
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    for left in (Path(f"{final}-wal"), Path(f"{final}-shm")):  # of somebody who opened the older one for writing
        left.unlink(missing_ok=True)
    os.replace(path, final)
    path.parent.rmdir()
