"""Opens the catalog of a spool for reading, whether or not somebody writes to it.

Rules: nothing is written, not even a ``-wal`` or ``-shm`` beside it (a reader that is not the daemon's user must
leave no files of its own in a stopped spool). A connection lives for one snapshot, so no transaction stays open and a
replaced catalog is seen by the next one. Three cases:

* no ``-wal``, or an empty one: no process has the catalog open, because SQLite makes it with the first access. It is
  read as an immutable file; if a ``-wal`` or a change shows up meanwhile, what was read is thrown away and read
  again.
* a ``-wal``: read through it, as SQLite does with ``mode=ro``.
* a ``-wal`` that cannot be shared (``-shm`` is gone and the directory is read-only, as on a mounted backup): both
  files are copied to a temporary directory and read there.

It does not know what the tables mean; that is ``catalog_view.py``.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from mpserverd.errors import DamageError, LayoutError, SpoolError
from mpserverd.streams.sidecar import is_stream_directory

CATALOG_FILE = "catalog.sqlite"
STREAMS_DIRECTORY = "streams"
LAYOUT_VERSION = "1"
NEXT_STEP = "stop the daemon and run mpserverctl repair"
BUSY_TIMEOUT_S = 2.0
"""How long SQLite itself waits for a lock."""
ATTEMPTS_MAX = 20
ATTEMPT_PAUSE_S = 0.05

T = TypeVar("T")
Question = Callable[[sqlite3.Connection], T]


class _ChangedMeanwhileError(Exception):
    """The catalog was taken for an untouched file, and somebody touched it."""

    def __str__(self) -> str:
        return "it kept changing"


def ask(spool: Path, question: Question[T]) -> T:
    """The answer of ``question(connection)``, from one consistent state of the catalog.

    The question must fetch all it needs. Raises SpoolError (none there, no permission, always locked), LayoutError (a
    catalog of another version) and DamageError (not a catalog at all).
    """
    catalog = spool / CATALOG_FILE
    last: Exception | None = None
    for attempt in range(ATTEMPTS_MAX):
        if attempt:
            time.sleep(ATTEMPT_PAUSE_S)
        _require(spool, catalog)
        try:
            return _ask_once(catalog, question)
        except _ChangedMeanwhileError as error:
            last = error
        except sqlite3.OperationalError as error:
            if not _passes_by_itself(error):
                raise _explained(catalog, error) from error
            last = error
        except sqlite3.DatabaseError as error:
            raise _explained(catalog, error) from error
    waited_s = ATTEMPTS_MAX * ATTEMPT_PAUSE_S
    raise SpoolError(f"{catalog} could not be read for {waited_s:.0f} s ({last}); try again") from last


def _require(spool: Path, catalog: Path) -> None:
    try:
        os.stat(spool)
        with catalog.open("rb"):
            pass
    except FileNotFoundError:
        if found := _a_stream(spool):
            raise DamageError(f"{catalog} is missing, but there are streams, such as {found}; {NEXT_STEP}") from None
        if spool.is_dir():
            raise SpoolError(f"{spool} is not a spool: there is no {CATALOG_FILE} in it") from None
        raise SpoolError(f"there is no spool at {spool}; name one with --spool PATH") from None
    except NotADirectoryError:
        raise SpoolError(f"{spool} is not a directory; name a spool with --spool PATH") from None
    except PermissionError:
        raise SpoolError(f"no permission to read {catalog}; run as root or as a member of the spool's group") from None
    except OSError as error:
        raise SpoolError(f"cannot read {catalog}: {error.strerror}") from error


def _a_stream(spool: Path) -> str:
    try:
        return next((str(path) for path in (spool / STREAMS_DIRECTORY).iterdir() if is_stream_directory(str(path))), "")
    except OSError:
        return ""


def _ask_once(catalog: Path, question: Question[T]) -> T:
    if _wal_bytes(catalog) == 0:
        before = _fingerprint(catalog)
        try:
            answer = _ask_connection(_uri(catalog, "immutable=1"), question)
        except sqlite3.DatabaseError:
            if _wal_bytes(catalog) or _fingerprint(catalog) != before:
                raise _ChangedMeanwhileError from None
            raise
        if _wal_bytes(catalog) or _fingerprint(catalog) != before:
            raise _ChangedMeanwhileError
        return answer
    try:
        return _ask_connection(_uri(catalog, "mode=ro"), question)
    except sqlite3.OperationalError:
        if Path(f"{catalog}-shm").exists() or os.access(catalog.parent, os.W_OK):
            raise
    with _copied(catalog) as copy:
        return _ask_connection(_uri(copy, "mode=rw"), question)


def _ask_connection(uri: str, question: Question[T]) -> T:
    connection = sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None)
    try:
        connection.execute("BEGIN")
        _require_version(connection)
        return question(connection)
    finally:
        connection.close()


def _require_version(connection: sqlite3.Connection) -> None:
    row = connection.execute("SELECT value FROM meta WHERE key = 'layout_version'").fetchone()
    found = None if row is None else str(row[0])
    if found != LAYOUT_VERSION:
        raise LayoutError(
            f"this spool has layout version {found or 'unknown'}, this program reads {LAYOUT_VERSION}; "
            "use the version of mpserverd that wrote it"
        )


@contextmanager
def _copied(catalog: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mpserverd-") as directory:
        copy = Path(directory) / CATALOG_FILE
        shutil.copyfile(catalog, copy)
        shutil.copyfile(f"{catalog}-wal", f"{copy}-wal")
        yield copy


def _uri(catalog: Path, option: str) -> str:
    return f"file:{quote(str(catalog.absolute()))}?{option}"


def _wal_bytes(catalog: Path) -> int:
    try:
        return os.stat(f"{catalog}-wal").st_size
    except FileNotFoundError:
        return 0


def _fingerprint(catalog: Path) -> tuple[int, int, int]:
    try:
        found = catalog.stat()
    except FileNotFoundError:
        raise _ChangedMeanwhileError from None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _passes_by_itself(error: sqlite3.OperationalError) -> bool:
    """Locks, a recovery by somebody else, and a ``-shm`` that is just being made or removed."""
    primary = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return primary in {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_READONLY,
    }


def _explained(catalog: Path, error: sqlite3.DatabaseError) -> SpoolError:
    text = str(error)
    if text.startswith(("no such table", "no such column")):
        return DamageError(f"{catalog} is not a catalog of mpserverd ({text}); {NEXT_STEP}")
    return DamageError(f"{catalog} cannot be read: {text}; {NEXT_STEP}")
