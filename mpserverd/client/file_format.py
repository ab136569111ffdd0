"""The layout of a buffer file, version 2, as pure functions. All numbers are little endian.

    0       header: "mpsbuf\\r\\n", version u32, packet size u32, packets a section u64, sections u32,
                    client id 64 bytes
    4096    slot 0: sequence u64, flags u64 (1: epoch is known, 2: some places are doubtful), epoch u64, shift i64,
    8192    slot 1           origin u64, acked u64, base place u64, end place u64, synced place u64, synced CRC u64,
                             doubtful place u64, home u64, a CRC-32 u32 for each of up to 64 sections
    12288   ring: sections of packets; the packet at place p lies at (p mod capacity) x packet size

Header and slots end with a CRC-32 of what is before it in them. The slots are written in turn, the one with the higher
sequence is the newer one. Section k of the ring holds the places [k, k + 1) x packets a section, modulo the capacity;
its CRC covers the packets from its beginning up to its end, or to the end place if that comes first. The synced CRC is
the same of the section that the synced place is in, up to that: everything before it was synced before the slot was
written. The place of a section is used again only when every packet in it has been acknowledged or dropped.

Indices are doubtful while the server has not said OK since the file was opened: a power cut may have taken packets from
the file that the server has got. Doubtful is the place that the file ended at when it was opened, however often it was
opened since. Home is ``Servers.key`` of the server that the epoch is known from, 0 for none.

So of a section whose CRC is wrong after a power cut, either everything was acknowledged, or its newest packets were not
synced. ``held_range`` says what that leaves.
"""

from __future__ import annotations

import dataclasses
import struct
import zlib
from collections.abc import Callable

from mpserverd import limits
from mpserverd.client.errors import BufferFileError

MAGIC = b"mpsbuf\r\n"
VERSION = 2
BLOCK_BYTES = 4096
SLOTS_AT = (BLOCK_BYTES, 2 * BLOCK_BYTES)
RING_AT = 3 * BLOCK_BYTES
SECTIONS_MAX = 64

_HEADER = struct.Struct(f"<8sIIQI{limits.CLIENT_ID_BYTES_MAX}s")
_SLOT = struct.Struct("<QQQqQQQQQQQQ")
_CRC = struct.Struct("<I")
_SECTION_CRCS = struct.Struct(f"<{SECTIONS_MAX}I")
_EPOCH_KNOWN = 1
_DOUBTFUL = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Geometry:
    packet_size: int
    section_packets: int
    sections: int
    client_id: str

    @classmethod
    def fitting(cls, packet_size: int, bytes_max: int, client_id: str) -> Geometry:
        capacity = bytes_max // packet_size
        sections = min(SECTIONS_MAX, capacity)
        return cls(packet_size, capacity // sections, sections, client_id)

    @property
    def capacity(self) -> int:
        return self.section_packets * self.sections

    @property
    def file_bytes(self) -> int:
        return RING_AT + self.capacity * self.packet_size

    def to_bytes(self) -> bytes:
        body = _HEADER.pack(
            MAGIC, VERSION, self.packet_size, self.section_packets, self.sections, self.client_id.encode("ascii")
        )
        return body + _CRC.pack(zlib.crc32(body))

    @classmethod
    def from_bytes(cls, content: bytes) -> Geometry | None:
        """None when the file was never finished: its first bytes are zeros, or missing. Raises BufferFileError."""
        if not content.strip(b"\0"):
            return None
        if len(content) < _HEADER.size + _CRC.size or not content.startswith(MAGIC):
            raise BufferFileError("this is no buffer file")
        _, version, packet_size, section_packets, sections, client_id = _HEADER.unpack_from(content)
        if version != VERSION:
            raise BufferFileError(f"layout version {version}, this program knows {VERSION}")
        if _CRC.unpack_from(content, _HEADER.size)[0] != zlib.crc32(content[: _HEADER.size]):
            raise BufferFileError("its header is damaged")
        return cls(packet_size, section_packets, sections, client_id.rstrip(b"\0").decode("ascii"))


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """What was true when it was written."""

    sequence: int
    epoch: int | None
    shift: int
    origin: int
    acked: int
    base_place: int
    end_place: int
    synced_place: int
    synced_crc: int
    doubtful_place: int | None
    home: int
    crcs: tuple[int, ...]

    def to_bytes(self) -> bytes:
        flags = (0 if self.epoch is None else _EPOCH_KNOWN) | (0 if self.doubtful_place is None else _DOUBTFUL)
        body = _SLOT.pack(
            self.sequence, flags, self.epoch or 0, self.shift, self.origin, self.acked, self.base_place,
            self.end_place, self.synced_place, self.synced_crc, self.doubtful_place or 0, self.home,
        )  # fmt: skip
        body += _SECTION_CRCS.pack(*self.crcs, *([0] * (SECTIONS_MAX - len(self.crcs))))
        return body + _CRC.pack(zlib.crc32(body))

    @classmethod
    def from_bytes(cls, content: bytes) -> Slot | None:
        """None when it was not written whole."""
        length = _SLOT.size + _SECTION_CRCS.size
        if len(content) < length + _CRC.size or not content.strip(b"\0"):
            return None
        if _CRC.unpack_from(content, length)[0] != zlib.crc32(content[:length]):
            return None
        words = _SLOT.unpack_from(content)
        sequence, flags, epoch, shift, origin, acked, base, end, synced, synced_crc, doubtful, home = words
        known, doubtful = epoch if flags & _EPOCH_KNOWN else None, doubtful if flags & _DOUBTFUL else None
        crcs = _SECTION_CRCS.unpack_from(content, _SLOT.size)
        return cls(sequence, known, shift, origin, acked, base, end, synced, synced_crc, doubtful, home, crcs)


def held_range(geometry: Geometry, slot: Slot, crc_of: Callable[[int, int], int]) -> tuple[int, int]:
    """Places [base, end) of a slot that can be trusted; ``crc_of(first place, end place)`` reads the ring.

    Damaged sections at the beginning were acknowledged and used again; a damaged one behind good ones is the torn tail.
    """
    step = geometry.section_packets
    base = end = slot.base_place
    is_found = False
    for first in range(slot.base_place - slot.base_place % step, slot.end_place, step):
        section_end = min(first + step, slot.end_place)
        good_end = _good_end(geometry, slot, crc_of, first, section_end)
        if good_end == first:
            if is_found:
                break
            base = end = section_end
            continue
        is_found, end = True, max(base, good_end)
        if good_end < section_end:
            break
    return (base, end) if is_found else (slot.base_place, slot.base_place)


def _good_end(geometry: Geometry, slot: Slot, crc_of: Callable[[int, int], int], first: int, end: int) -> int:
    """Up to where the section [first, end) is what was written; ``first`` when it is not."""
    if crc_of(first, end) == slot.crcs[first // geometry.section_packets % geometry.sections]:
        return end
    if first < slot.synced_place <= end and crc_of(first, slot.synced_place) == slot.synced_crc:
        return slot.synced_place
    return first
