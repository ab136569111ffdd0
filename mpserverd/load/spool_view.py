"""What a spool holds, as far as verifying needs it: through the catalog, or from the bare files.

The catalog's view is what every reader of the spool sees. The files' view needs nothing of this project's reader: the
bytes of a stream are its segment files in the order of their names. It takes the place of the first one where a spool
has no catalog.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mpserverd.errors import SpoolError

CATALOG_NAME = "catalog.sqlite"
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class StoredStream:
    """Sizes are bytes. ``end_offset`` counts holes too, ``stored_bytes`` does not; ``complete``: no more will come.
    ``packet_size`` and ``epoch`` are None where only the files are known."""

    name: str
    first_offset: int
    end_offset: int
    stored_bytes: int
    complete: bool
    packet_size: int | None = None
    epoch: str | None = None


class SpoolView(Protocol):
    def streams(self) -> list[StoredStream]:
        """All there are now."""

    def read(self, stream: StoredStream) -> Iterator[bytes | memoryview]:
        """Its stored bytes, from the oldest one."""


class CatalogView:
    def __init__(self, spool: Path) -> None:
        self.spool = spool

    def streams(self) -> list[StoredStream]:
        from mpserverd.streams.listing import list_streams  # noqa: PLC0415 - only who verifies pays for the import

        return [
            StoredStream(
                name=info.name,
                first_offset=info.first_offset,
                end_offset=info.durable_offset,
                stored_bytes=info.durable_bytes,
                complete=not info.connected,
                packet_size=info.packet_size,
                epoch=info.epoch,
            )
            for info in list_streams(self.spool)
        ]

    def read(self, stream: StoredStream) -> Iterator[bytes | memoryview]:
        from mpserverd.streams.reader import open_stream  # noqa: PLC0415

        with open_stream(stream.name, spool=self.spool) as opened:
            yield from opened.read_bytes(stream.first_offset, stream.end_offset)


class FilesView:
    """A stream is complete when its files are not longer than what was written; that cannot be seen from a file, so it
    says ``complete`` always, and the wait is for the length."""

    def __init__(self, spool: Path) -> None:
        self.directory = spool / "streams"

    def streams(self) -> list[StoredStream]:
        found = []
        for directory in sorted(self.directory.iterdir()):
            files = _segments(directory)
            if files:
                length = sum(file.stat().st_size for file in files)
                first = int(files[0].stem)
                found.append(StoredStream(directory.name, first, first + length, length, True))
        return found

    def read(self, stream: StoredStream) -> Iterator[bytes | memoryview]:
        for path in _segments(self.directory / stream.name):
            with path.open("rb") as file:
                while piece := file.read(READ_BYTES):
                    yield piece


def open_spool(spool: Path) -> SpoolView:
    """The view that fits the spool. Raises SpoolError when it is none."""
    if (spool / CATALOG_NAME).exists():
        return CatalogView(spool)
    if (spool / "streams").is_dir():
        return FilesView(spool)
    raise SpoolError(f"{spool} is no spool: it has neither {CATALOG_NAME} nor a directory streams")


def _segments(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("*.seg") if path.stem.isdigit())
