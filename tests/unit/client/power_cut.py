"""A buffer file on a disk that loses power: of what was written since the last sync any part may be there.

The disk writes blocks of 4 KiB, each whole, and each as it was after any of the writes to it. ``cut`` makes the file
what such a disk would hold.
"""

from __future__ import annotations

import os
import pathlib
import random

from mpserverd.client import file_buffer

BLOCK = 4096


class Disk:
    """Install it with ``monkeypatch.setattr(file_buffer, "flush_to_disk", disk.flush)``."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.durable = b""
        self.versions: dict[int, list[bytes]] = {}
        self.flushes = 0

    def flush(self, descriptor: int) -> None:
        self.durable = self.path.read_bytes()
        self.versions.clear()
        self.flushes += 1

    def wrote(self, at: int, length: int) -> None:
        with self.path.open("rb") as file:
            for block in range(at // BLOCK, (at + length - 1) // BLOCK + 1):
                file.seek(block * BLOCK)
                self.versions.setdefault(block, []).append(file.read(BLOCK))

    def cut(self, chance: random.Random) -> None:
        content = bytearray(self.durable)
        for block, versions in self.versions.items():
            old = self.durable[block * BLOCK : (block + 1) * BLOCK]
            content[block * BLOCK : (block + 1) * BLOCK] = chance.choice(
                [old, old, versions[-1], chance.choice(versions)]
            )
        self.path.write_bytes(content)
        self.durable = bytes(content)
        self.versions.clear()


class Watched(file_buffer.FileBuffer):
    """Tells the disk what it writes. ``die`` ends it as kill -9 would."""

    disk: Disk

    @classmethod
    def on(cls, disk: Disk, client_id: str, packet_size: int, bytes_max: int, is_synced: bool = False) -> Watched:
        kind = type("WatchedHere", (cls,), {"disk": disk})
        buffer = kind(disk.path, client_id, packet_size, bytes_max, is_synced)
        assert isinstance(buffer, Watched)
        return buffer

    def _write(self, at: int, content: memoryview | bytes) -> None:
        super()._write(at, content)
        self.disk.wrote(at, len(content))

    def die(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1
