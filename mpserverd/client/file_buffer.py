"""The same ring of packets with a copy in a file, so that a program that starts again goes on where it was.

What it promises
* The program is killed at any instant (also kill -9): every packet whose ``send`` has returned is there again.
* Power cut or a crash of the system, with ``is_synced``: every packet before a ``sync`` is there again. Of later ones
  the newest may be missing.
* The same without ``is_synced``: the system writes the blocks of a file back in any order, so any of the packets that
  are held may be missing, at worst all of them if the ring has gone around since the last sync: the newest, the oldest
  (the server is told by first=, and counts a hole), or both.
* What is there is whole and in order: checksums decide (file_format.py).
* A packet may be there again although the server has acknowledged it; the server's OK says where to go on, so that
  nothing is stored twice.
* What the indices of packets are is in the file, synced, before the first packet is sent: see ``settle``.

Rules: the file is taken whole when it is made, so that a disk that fills later hurts nobody; written with plain writes
(no mapping: a full disk is an error there and not a signal); locked as long as it is open. After an error of the disk
the file is not written again, the packets in memory still go out, and every further ``send`` raises BufferFileError.
With ``is_synced`` no section is written over that a record on the disk may claim: ``append`` syncs before it would.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import threading
import zlib
from typing import NamedTuple

from mpserverd.client.buffer import PacketBuffer, check_sizes
from mpserverd.client.errors import BufferFileError
from mpserverd.client.file_format import BLOCK_BYTES, RING_AT, SLOTS_AT, Geometry, Slot, held_range
from mpserverd.client.file_lock import try_lock
from mpserverd.client.file_sync import flush_to_disk

_FILL_BYTES = 1 << 20
_NO_ALLOCATION = {errno.EINVAL, errno.EOPNOTSUPP}
"""What a file system says that cannot take blocks without writing them."""


class Record(NamedTuple):
    """What a slot says, as far as it matters to what is safe. ``end_crc``: of the section that ends there."""

    sequence: int = 0
    base_place: int = 0
    end_place: int = 0
    end_crc: int = 0


class FileBuffer(PacketBuffer):
    """Opens ``path``, or makes it with room for ``bytes_max``; a file that exists keeps its size, and is read whole.

    ``is_synced``: the owner calls ``sync`` before it promises packets to anybody.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        client_id: str,
        packet_size: int,
        bytes_max: int,
        is_synced: bool = False,
    ) -> None:
        self.path = pathlib.Path(path)
        self._failure: BufferFileError | None = None
        check_sizes(packet_size, bytes_max)
        try:
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
            self._descriptor = os.open(self.path, flags, 0o600)
        except OSError as error:
            raise self._error(f"cannot be opened: {error.strerror}") from error
        try:
            if not try_lock(self._descriptor):
                raise self._error("is in use by another client; each client needs a file of its own")
            geometry = self._find_geometry(client_id, packet_size, bytes_max)
            super().__init__(packet_size, geometry.capacity * packet_size)
            self._geometry = geometry
            self._crcs = [0] * geometry.sections
            self._is_synced = is_synced
            self._sequence = 0
            self._settled_sequence = 0
            self._written = self._durable = Record()
            self._descriptor_lock = threading.Lock()
            self._restore()
        except BaseException:
            os.close(self._descriptor)
            raise

    def _error(self, text: str) -> BufferFileError:
        return BufferFileError(f"buffer file {self.path} {text}")

    # -- opening

    def _find_geometry(self, client_id: str, packet_size: int, bytes_max: int) -> Geometry:
        try:
            found = Geometry.from_bytes(self._read(0, BLOCK_BYTES))
        except BufferFileError as error:
            raise self._error(f"is left alone: {error}; name another file or move it away") from None
        if found is None:
            return self._make(Geometry.fitting(packet_size, bytes_max, client_id))
        if (found.client_id, found.packet_size) != (client_id, packet_size):
            raise self._error(
                f"belongs to client {found.client_id} with packets of {found.packet_size} bytes, not to {client_id} "
                f"with {packet_size}"
            )
        return found

    def _make(self, geometry: Geometry) -> Geometry:
        """All blocks first, the header last: a file without a header promises nothing and is made again."""
        try:
            os.ftruncate(self._descriptor, 0)
            self._take_blocks(geometry.file_bytes)
            empty = Slot(0, None, 0, 0, 0, 0, 0, 0, 0, None, 0, (0,) * geometry.sections)
            self._write(SLOTS_AT[0], empty.to_bytes())
            flush_to_disk(self._descriptor)
            self._write(0, geometry.to_bytes().ljust(BLOCK_BYTES, b"\0"))
            flush_to_disk(self._descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, 0)  # others need the space
            raise self._error(f"cannot be made, it needs {geometry.file_bytes} bytes: {error.strerror}") from error
        self._sync_directory()
        return geometry

    def _take_blocks(self, file_bytes: int) -> None:
        """Zeros, and space for them: at once where the system can, by writing them where it cannot."""
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._descriptor, 0, file_bytes)
                return
            except OSError as error:
                if error.errno not in _NO_ALLOCATION:
                    raise
        for at in range(0, file_bytes, _FILL_BYTES):
            self._write(at, bytes(min(_FILL_BYTES, file_bytes - at)))

    def _sync_directory(self) -> None:
        with contextlib.suppress(OSError):  # Windows opens no directories, and keeps names by itself
            descriptor = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _restore(self) -> None:
        slots = [slot for at in SLOTS_AT if (slot := Slot.from_bytes(self._read(at, BLOCK_BYTES))) is not None]
        if not slots:
            raise self._error("has no readable record of what it holds; move it away to begin anew")
        ranges = [(held_range(self._geometry, slot, self._crc_of), slot) for slot in slots]
        (base, end), slot = max(ranges, key=lambda found: (found[0][1], found[1].sequence))
        self.epoch, self.shift, self.origin, self.acked = slot.epoch, slot.shift, slot.origin, slot.acked
        self.home = slot.home
        self.base_place, self.end_place = base, end
        self.restored_place = end if slot.doubtful_place is None else min(end, slot.doubtful_place)
        self._crcs = list(slot.crcs[: self._geometry.sections])
        self._durable = Record(0, 0, slot.synced_place, slot.synced_crc)  # the disk may claim any older base
        self._sequence = max(slot.sequence for slot in slots)
        section_first = end - end % self._geometry.section_packets
        if section_first < end:  # the end may be another one than the slot's
            self._crcs[self._section(section_first)] = self._crc_of(section_first, end)
        for at, length in self._pieces(base, end - base):
            self._ring[at : at + length] = self._read(RING_AT + at, length)
        self.save()

    def _section(self, place: int) -> int:
        return place // self._geometry.section_packets % self._geometry.sections

    def _crc_of(self, first: int, end: int) -> int:
        crc = 0
        for at, length in self._pieces(first, end - first):
            crc = zlib.crc32(self._read(RING_AT + at, length), crc)
        return crc

    # -- packets

    @property
    def room(self) -> int:
        """Without the released part of the oldest section: its place is used again as a whole (file_format.py)."""
        oldest = self.base_place - self.base_place % self._geometry.section_packets
        return self.capacity - (self.end_place - oldest)

    def append(self, packets: memoryview) -> int:
        self._check_file()
        count = len(packets) // self.packet_size
        place = self.end_place
        if count <= self.room:
            if self._is_synced and self._is_claimed(place + count):
                self.save()
                self.sync()
            try:
                self._write_ring(place, packets)
            except OSError as error:
                raise self._failed(error) from error
        count = super().append(packets)
        self.save()
        if self._failure is not None:
            self.end_place -= count  # not kept as promised, so not kept at all
            raise self._failure
        return count

    def _is_claimed(self, end: int) -> bool:
        """Whether appending up to ``end`` writes over sections that belong to what the disk says is held."""
        durable_base = self._durable.base_place
        return end - self.capacity > durable_base - durable_base % self._geometry.section_packets

    def _write_ring(self, place: int, packets: memoryview) -> None:
        """The packets and the checksums of their sections."""
        step, size = self._geometry.section_packets, self.packet_size
        at = 0
        while at < len(packets):
            number = self._section(place)
            count = min(step - place % step, len(packets) // size - at // size)
            piece = packets[at : at + count * size]
            self._write(RING_AT + place % self.capacity * size, piece)
            self._crcs[number] = zlib.crc32(piece, self._crcs[number] if place % step else 0)
            place, at = place + count, at + len(piece)

    # -- what is known

    def save(self) -> None:
        """Write the slot whose turn it is. What goes wrong is raised by the next ``append`` or ``sync``."""
        if self._failure is not None:
            return
        self._sequence += 1
        durable = self._durable  # a sync in another thread replaces it: end and checksum are of one record
        slot = Slot(
            self._sequence, self.epoch, self.shift, self.origin, self.acked, self.base_place, self.end_place,
            durable.end_place, durable.end_crc, self.restored_place, self.home, tuple(self._crcs),
        )  # fmt: skip
        try:
            self._write(SLOTS_AT[self._sequence % 2], slot.to_bytes())
        except OSError as error:
            self._failed(error)
            return
        crc = self._crcs[self._section(self.end_place - 1)] if self.end_place else 0
        self._written = Record(self._sequence, self.base_place, self.end_place, crc)

    def sync(self) -> None:
        """Everything appended so far survives a power cut when this returns. Raises BufferFileError.

        Any thread may call it, while another appends."""
        with self._descriptor_lock:
            self._check_file()
            written = self._written
            try:
                flush_to_disk(self._descriptor)
            except OSError as error:
                raise self._failed(error) from error
            self._durable = written

    def begin_epoch(self, epoch: int, place: int, index: int) -> None:
        super().begin_epoch(epoch, place, index)
        self._settled_sequence = self._sequence

    def go_on(self, next_index: int) -> int:
        is_first = self.restored_place is not None
        skipped = super().go_on(next_index)
        if is_first:
            self._settled_sequence = self._sequence
        return skipped

    @property
    def is_settled(self) -> bool:
        return self._durable.sequence >= self._settled_sequence or self._failure is not None

    def settle(self) -> None:
        if not self.is_settled:
            with contextlib.suppress(BufferFileError):  # the next append raises it
                self.sync()

    def close(self) -> None:
        """May be called again."""
        if self._descriptor < 0:
            return
        self.save()
        with contextlib.suppress(BufferFileError):
            self.sync()
        with self._descriptor_lock:  # a sync in another thread may be at it
            os.close(self._descriptor)
            self._descriptor = -1
        super().close()

    def _failed(self, error: OSError) -> BufferFileError:
        self._failure = self._error(f"cannot be written: {error.strerror}")
        return self._failure

    def _check_file(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._descriptor < 0:
            raise self._error("is closed")

    # -- the file; seek and write, because not every system has pwrite

    def _write(self, at: int, content: memoryview | bytes) -> None:
        os.lseek(self._descriptor, at, os.SEEK_SET)
        left = memoryview(content)
        while left:
            left = left[os.write(self._descriptor, left) :]

    def _read(self, at: int, length: int) -> bytes:
        os.lseek(self._descriptor, at, os.SEEK_SET)
        content = bytearray()
        while len(content) < length and (piece := os.read(self._descriptor, length - len(content))):
            content += piece
        return bytes(content)
