"""What a disk holds behind the durable offsets before a daemon starts on it, counted without the project's code.

That is what the daemon must name in its journal, and add to its count, when it cuts it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import re
import shutil
import sqlite3
import tempfile

_SUM = re.compile(
    r'streams end at their durable offset why="the system went down .*?" streams=(\d+) cut_bytes_max=(\d+)'
)
_EACH = "stream cut at its durable offset"


@dataclasses.dataclass
class Tails:
    """``streams`` had a client; ``bytes`` lie behind the offsets of so many of them. ``counted_bytes``: until now."""

    streams: int = 0
    streams_cut: int = 0
    bytes: int = 0
    counted_bytes: int = 0

    def compare(self, log: str, catalog: pathlib.Path) -> None:
        """With what the daemon said, and with its count at its end."""
        said = [(int(streams), int(cut)) for streams, cut in _SUM.findall(log)]
        wanted = [(self.streams, self.bytes)] if self.streams else []
        assert said == wanted, f"the journal says {said} about what was cut, the disk had {wanted}"
        assert log.count(_EACH) == self.streams_cut
        with contextlib.closing(sqlite3.connect(catalog)) as opened:
            (total,) = opened.execute("SELECT coalesce(sum(value), 0) FROM total WHERE name = 'cut_bytes'").fetchone()
        assert total == self.counted_bytes + self.bytes, f"cut_bytes is {total}, it was {self.counted_bytes}: {self}"


def look(spool: pathlib.Path) -> Tails:
    """The catalog is asked in a copy: the daemon has to find its log as the power cut left it."""
    found = Tails()
    with tempfile.TemporaryDirectory() as directory:
        copy = pathlib.Path(directory, "catalog.sqlite")
        for suffix in ("", "-wal"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(f"{spool}/catalog.sqlite{suffix}", f"{copy}{suffix}")
        with contextlib.closing(sqlite3.connect(copy)) as catalog:
            if not catalog.execute("SELECT 1 FROM sqlite_master WHERE name = 'released'").fetchone():
                return found
            total = "SELECT coalesce(sum(value), 0) FROM total WHERE name = 'cut_bytes'"
            (found.counted_bytes,) = catalog.execute(total).fetchone()
            rows = catalog.execute("SELECT id, directory, durable FROM stream WHERE connected = 1").fetchall()
            for number, name, durable in rows:
                firsts = {
                    first for (first,) in catalog.execute("SELECT first FROM segment WHERE stream = ?", (number,))
                }
                size = _behind(spool / "streams" / name, durable, firsts)
                found.streams += 1
                found.streams_cut += size > 0
                found.bytes += size
    return found


def _behind(directory: pathlib.Path, durable: int, firsts: set[int]) -> int:
    """In the segment that was written, and in those that were begun and not committed."""
    size = 0
    for path in directory.glob("*.seg"):
        first = int(path.stem)
        if first == max(firsts, default=-1) or (first >= durable and first not in firsts):
            size += len(path.read_bytes()[max(0, durable - first) :].rstrip(b"\0"))
    return size
