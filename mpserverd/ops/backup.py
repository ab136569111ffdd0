"""A consistent copy of a spool, live or not: the catalog at one moment, and of every file what that catalog promises.

Order: copy the catalog; then each stream's segments up to the durable offset of that copy, each synced before it gets
its name; then the catalog gets its name; then what it does not speak of is removed. So a copy that is interrupted is
what it was before, and the storer may write and retention unlink meanwhile: a stream whose files went away before they
were copied is taken again from a newer catalog.

A copy that is repeated into the same directory keeps sealed segments whose epoch, size and checksum are those of the
catalog. The result is a spool: every reader works on it, and a daemon may be started on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mpserverd.errors import MpserverdError, SpoolError, UsageError
from mpserverd.ops import backup_catalog
from mpserverd.ops.copying import PART_SUFFIX, copy_file, same_owner, sync_directory
from mpserverd.streams.catalog_file import CATALOG_FILE, STREAMS_DIRECTORY
from mpserverd.streams.catalog_view import Segment, StreamSnapshot, all_streams, find_stream, stream_by_id
from mpserverd.streams.times import index_bytes, iso_utc
from mpserverd.streams.verify import verify_streams

MARKER_FILE = "backup.json"
RETAKES_MAX = 20
"""A stream that is retired faster than it can be copied is given up."""
SPARE_BYTES = 64 << 20
"""What has to stay free on the target, for the catalog and rounding."""

AfterCatalog = Callable[[], None]


@dataclasses.dataclass(slots=True)
class Count:
    """What one copy did. ``retaken``: streams whose files went away meanwhile, and that were copied again."""

    streams: int = 0
    segments: int = 0
    copied_bytes: int = 0
    kept_segments: int = 0
    kept_bytes: int = 0
    removed_files: int = 0
    retaken: int = 0
    gone: int = 0


def backup(
    spool: Path, target: Path, names: Sequence[str], jobs: int = 1, *, after_catalog: AfterCatalog = lambda: None
) -> dict[str, Any]:
    """Copy ``names``, all with none, and verify the copy. The report's ``fine`` says how that ended.

    ``after_catalog`` is called between the catalog and the first file. Raises SpoolError, UsageError, OSError.
    """
    began_unix_ns = time.time_ns()
    with _locked(spool, target):
        _check_marker(spool, target)
        chosen = {find_stream(spool, name).row.id for name in names}
        before = _older(target)
        fresh = backup_catalog.take(spool, target)
        if names:
            backup_catalog.keep_only(fresh, chosen)
        after_catalog()
        copy = _Copy(spool, target, fresh, before)
        if names:
            copy.refuse_to_drop_others()
        copy.run()
        backup_catalog.finish(fresh)
        _write_marker(spool, target, began_unix_ns)
        sync_directory(target)
        copy.remove_strangers()
        checks = list(verify_streams(target, all_streams(target, all_epochs=True), jobs))
    findings = [f"{check.name}: {finding}" for check in checks for finding in check.findings]
    return {
        "schema_version": 1,
        "fine": not findings,
        "output": str(target),
        "spool": str(spool),
        "taken": iso_utc(began_unix_ns),
        **dataclasses.asdict(copy.count),
        "checked_bytes": sum(check.checked_bytes for check in checks),
        "unchecked_bytes": sum(check.unchecked_bytes for check in checks),
        "findings": findings,
    }


# -- the target


@contextlib.contextmanager
def _locked(spool: Path, target: Path) -> Iterator[None]:
    """The target exists, is no spool in use, and no other backup writes it; a daemon's lock on a spool is the same."""
    target.mkdir(mode=0o750, parents=True, exist_ok=True)
    if target.resolve() == spool.resolve() or spool.resolve() in target.resolve().parents:
        raise UsageError(f"{target} lies within the spool {spool}; name a directory elsewhere")
    descriptor = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SpoolError(f"{target} is in use by a daemon or by another backup; name another directory") from None
        yield
    finally:
        os.close(descriptor)


def _check_marker(spool: Path, target: Path) -> None:
    """Only an empty directory, or a backup of the same spool, is written to."""
    marker = target / MARKER_FILE
    try:
        source = json.loads(marker.read_text())["spool"]
    except FileNotFoundError:
        names = sorted(set(os.listdir(target)) - {"lost+found"})
        if names and names != [backup_catalog.STAGING_DIRECTORY]:
            raise UsageError(f"{target} has {names[0]} in it and is no backup; name an empty directory") from None
        _write_marker(spool, target, None)
        return
    except (ValueError, KeyError, TypeError):
        raise SpoolError(f"{marker} makes no sense; name another directory") from None
    if source != str(spool.resolve()):
        raise UsageError(f"{target} is a backup of {source}, not of {spool}; name another directory")


def _write_marker(spool: Path, target: Path, taken_unix_ns: int | None) -> None:
    taken = None if taken_unix_ns is None else iso_utc(taken_unix_ns)
    fresh = target / f"{MARKER_FILE}{PART_SUFFIX}"
    with open(fresh, "w", encoding="utf-8") as file:
        json.dump({"schema_version": 1, "spool": str(spool.resolve()), "taken": taken}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, target / MARKER_FILE)


def _older(target: Path) -> dict[int, StreamSnapshot]:
    """The streams of an earlier copy, by id; none where there is none, or it cannot be read."""
    if not (target / CATALOG_FILE).exists():
        return {}
    try:
        return {stream.row.id: stream for stream in all_streams(target, all_epochs=True)}
    except MpserverdError:
        return {}


# -- the files


class _Copy:
    """Copies what the new catalog speaks of."""

    def __init__(self, spool: Path, target: Path, catalog: Path, before: dict[int, StreamSnapshot]) -> None:
        self._spool, self._target, self._catalog, self._before = spool, target, catalog, before
        self._sums: dict[Path, str] = {}
        self.count = Count()

    def _streams(self) -> list[StreamSnapshot]:
        return all_streams(self._catalog.parent, all_epochs=True)

    def refuse_to_drop_others(self) -> None:
        """A backup of some streams must not throw away what an earlier one of more has."""
        mine = {stream.row.id for stream in self._streams()}
        others = [stream.row.name for number, stream in self._before.items() if number not in mine]
        if others:
            raise UsageError(
                f"{self._target} has {len(others)} other streams, such as {others[0]}; "
                "name another directory, or back up all of them"
            )

    def run(self) -> None:
        streams = self._streams()
        self._check_space(streams)
        (self._target / STREAMS_DIRECTORY).mkdir(mode=0o750, exist_ok=True)
        same_owner(self._spool / STREAMS_DIRECTORY, self._target / STREAMS_DIRECTORY)
        same_owner(self._spool / CATALOG_FILE, self._catalog)
        same_owner(self._spool, self._target)
        for stream in streams:
            self._copy_stream(stream)
        sync_directory(self._target / STREAMS_DIRECTORY)

    def _check_space(self, streams: Sequence[StreamSnapshot]) -> None:
        needed = SPARE_BYTES + sum(
            _length(stream, segment)
            for stream in streams
            for segment in stream.segments
            if not self._is_kept(stream, segment)
        )
        there = os.statvfs(self._target)
        free = there.f_bavail * there.f_frsize
        if needed > free:
            raise SpoolError(f"{self._target} has {free} bytes free, the copy needs {needed}; free space")

    def _copy_stream(self, stream: StreamSnapshot) -> None:
        number = stream.row.id
        for attempt in range(RETAKES_MAX):
            count = Count(streams=1)
            try:
                self._copy_segments(stream, count)
                break
            except FileNotFoundError as error:
                if attempt == RETAKES_MAX - 1:
                    text = f"{error.filename} is missing, and the catalog still lists it; run mpserverctl verify"
                    raise SpoolError(text) from error
            if not backup_catalog.retake(self._spool, self._catalog, number):
                self.count.gone += 1  # deleted meanwhile
                return
            self.count.retaken += attempt == 0
            again = stream_by_id(self._catalog.parent, number)
            assert again is not None  # it was just written there
            stream = again
            if attempt:
                time.sleep(0.05 * attempt)
        for field in dataclasses.fields(Count):
            setattr(self.count, field.name, getattr(self.count, field.name) + getattr(count, field.name))

    def _copy_segments(self, stream: StreamSnapshot, count: Count) -> None:
        source = self._spool / STREAMS_DIRECTORY / stream.row.directory
        target = self._target / STREAMS_DIRECTORY / stream.row.directory
        target.mkdir(mode=0o750, exist_ok=True)
        same_owner(source, target)
        for segment in stream.segments:
            length = _length(stream, segment)
            if self._is_kept(stream, segment):
                count.kept_segments += 1
                count.kept_bytes += length
            else:
                count.copied_bytes += copy_file(source / segment.file_name, target / segment.file_name, length)
                count.segments += 1
                with contextlib.suppress(FileNotFoundError):  # a stream may have none yet
                    index = source / segment.index_name  # more of it would prove that the copied catalog is too old
                    copy_file(index, target / segment.index_name, index_bytes(index, stream.row.durable))
        sync_directory(target)

    def _is_kept(self, stream: StreamSnapshot, segment: Segment) -> bool:
        """Sealed, and the earlier copy has the same bytes by epoch, size and checksum.

        One that had no checksum yet when it was copied is read and held against the one that it has now.
        """
        old = self._before.get(stream.row.id)
        if old is None or segment.state != "sealed" or segment.sha256 is None:
            return False
        same = next((one for one in old.segments if (one.first, one.end) == (segment.first, segment.end)), None)
        if same is None or same.state != "sealed" or same.sha256 not in (None, segment.sha256):
            return False
        if (old.row.epoch, old.row.directory) != (stream.row.epoch, stream.row.directory):
            return False
        file = self._target / STREAMS_DIRECTORY / stream.row.directory / segment.file_name
        try:
            if file.stat().st_size != _length(stream, segment):
                return False
            return same.sha256 is not None or self._sum(file) == segment.sha256
        except FileNotFoundError:
            return False

    def _sum(self, file: Path) -> str:
        """Of a file of the earlier copy; asked for twice, for the space and for the copy."""
        if file not in self._sums:
            with file.open("rb") as opened:
                self._sums[file] = hashlib.file_digest(opened, "sha256").hexdigest()
        return self._sums[file]

    def remove_strangers(self) -> None:
        """What the catalog that now counts does not speak of: retired segments, deleted streams, torn copies."""
        known = {
            stream.row.directory: {name for one in stream.segments for name in (one.file_name, one.index_name)}
            for stream in all_streams(self._target, all_epochs=True)
        }
        for directory in (self._target / STREAMS_DIRECTORY).iterdir():
            for file in directory.iterdir():
                if file.name not in known.get(directory.name, ()):
                    file.unlink()
                    self.count.removed_files += 1
            if directory.name not in known:
                directory.rmdir()


def _length(stream: StreamSnapshot, segment: Segment) -> int:
    """Durable bytes of a segment."""
    end = stream.row.durable if segment.end is None else min(segment.end, stream.row.durable)
    return max(0, end - segment.first)
