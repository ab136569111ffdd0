"""The packets that a client keeps until they are acknowledged: a ring of memory that is taken once.

Rules. A *place* counts the packets that ever came in, from 0, and never changes. An *index* is the number that the
server knows a packet by: place + a shift that is fixed when the server has said OK. ``base`` is the index of the oldest
packet that is held, ``end`` the one after the newest. Packets lie whole: none wraps around the end of the ring.
A view into the ring is valid until its packets are released or dropped.

Not safe for threads by itself: whoever owns it brings a lock. ``file_buffer.py`` adds a file.
"""

from __future__ import annotations

import mmap

from mpserverd import limits
from mpserverd.client.errors import BufferFullError

BUFFER_BYTES = 64 * limits.MIB
"""Default size. With an acknowledgement every 0.15 s it carries 400 MB/s; memory is taken as it is used."""
BUFFER_BYTES_MAX = limits.TIB
DROP_PARTS = 8
"""When the oldest give way, at least an eighth of them does: each hole costs a new connection."""


def check_sizes(packet_size: int, bytes_max: int) -> None:
    """Raises ValueError."""
    if not limits.PACKET_BYTES_MIN <= packet_size <= limits.PACKET_BYTES_MAX:
        raise ValueError(
            f"a packet has {limits.PACKET_BYTES_MIN} to {limits.PACKET_BYTES_MAX} bytes, not {packet_size}"
        )
    if not packet_size <= bytes_max <= BUFFER_BYTES_MAX:
        raise ValueError(f"a buffer of {bytes_max} bytes for packets of {packet_size}; at least one must fit")


class PacketBuffer:
    """``epoch``, ``origin`` and ``acked`` are what is known of the server's stream: its epoch, the index at which this
    client's numbering began, and the index that the server has acknowledged up to. ``home`` names the server that the
    epoch is known from (``Servers.key``, 0: none)."""

    def __init__(self, packet_size: int, bytes_max: int = BUFFER_BYTES) -> None:
        check_sizes(packet_size, bytes_max)
        self.packet_size = packet_size
        self.capacity = bytes_max // packet_size
        # mapped, because a bytearray touches all of its pages at once
        self._ring = memoryview(mmap.mmap(-1, self.capacity * packet_size))
        self.base_place = 0
        self.end_place = 0
        self.shift = 0
        self.epoch: int | None = None
        self.origin = 0
        self.acked = 0
        self.home = 0
        self.restored_place: int | None = None
        """Packets before it come from a file; None when there are none, or when the server has said OK since."""
        self.is_closed = False

    # -- numbers

    @property
    def base(self) -> int:
        return self.base_place + self.shift

    @property
    def end(self) -> int:
        return self.end_place + self.shift

    @property
    def held(self) -> int:
        return self.end_place - self.base_place

    @property
    def room(self) -> int:
        """How many packets can be appended now."""
        return self.capacity - self.held

    @property
    def piece_max(self) -> int:
        """More packets than this are appended in pieces, so that nobody waits long for the lock."""
        return max(1, min(self.capacity // DROP_PARTS, 4 * limits.PACKET_BYTES_MAX // self.packet_size))

    # -- packets

    def append(self, packets: memoryview) -> int:
        """Keep a copy of whole packets, bytes in a row; returns how many. Raises BufferFullError and keeps none."""
        count = len(packets) // self.packet_size
        if count > self.room:
            raise BufferFullError(f"{count} packets do not fit: room for {self.room} of {self.capacity}")
        at = 0
        for first, length in self._pieces(self.end_place, count):
            self._ring[first : first + length] = packets[at : at + length]
            at += length
        self.end_place += count
        return count

    def view(self, byte_place: int, bytes_max: int) -> memoryview:
        """Bytes from ``byte_place`` (place x packet size + bytes of that packet) on, as far as they lie in a row."""
        held_bytes = self.end_place * self.packet_size - byte_place
        at = byte_place % len(self._ring)
        return self._ring[at : at + max(0, min(held_bytes, bytes_max, len(self._ring) - at))]

    def _pieces(self, place: int, count: int) -> list[tuple[int, int]]:
        """Where ``count`` packets from ``place`` on lie: (offset, bytes) in the ring, one or two of them."""
        size, length = self.packet_size, len(self._ring)
        first = place % self.capacity * size
        whole = count * size
        before_end = min(whole, length - first)
        pieces = [(first, before_end)]
        if before_end < whole:
            pieces.append((0, whole - before_end))
        return pieces

    def release(self, index: int) -> None:
        """Forget every packet before ``index``."""
        self.base_place = max(self.base_place, min(index - self.shift, self.end_place))

    def drop_oldest(self, wanted: int) -> int:
        """Make room for ``wanted`` packets (at most ``piece_max``); returns how many were dropped for it."""
        before = self.base_place
        step = max(1, self.capacity // DROP_PARTS)
        while self.room < wanted:
            self.base_place = min(self.base_place + step, self.end_place)
        return self.base_place - before

    # -- what the server said

    def begin_epoch(self, epoch: int, place: int, index: int) -> None:
        """The packet at ``place`` is number ``index`` of the stream with this epoch; earlier ones are not needed.
        Call ``settle`` before any packet is sent."""
        self.shift = index - place
        self.epoch, self.origin, self.acked = epoch, index, index
        self.restored_place = None
        self.release(index)
        self.save()

    def go_on(self, next_index: int) -> int:
        """The server went on with our epoch and has everything before ``next_index``. Returns how many indices were
        left out: a file may have lost its newest packets in a power cut, which the server had got before.
        Call ``settle`` before any packet is sent."""
        skipped = 0
        if self.restored_place is not None:
            skipped = max(0, next_index - (self.restored_place + self.shift))
            if skipped:
                self.base_place = max(self.base_place, self.restored_place)
                self.shift += skipped
            self.restored_place = None
            self.save()
        self.acknowledge(next_index)
        return skipped

    def acknowledge(self, next_index: int) -> None:
        first_time = self.acked <= self.origin < next_index
        self.acked = max(self.acked, next_index)
        self.release(next_index)
        if first_time:
            self.save()

    def save(self) -> None:
        """Memory promises nothing."""

    def sync(self) -> None:
        """Memory promises nothing."""

    @property
    def is_settled(self) -> bool:
        """Whether packets may be sent: what their indices are is safe."""
        return True

    def settle(self) -> None:
        """Make it so. May wait for a disk; any thread may call it, also without the owner's lock."""

    def close(self) -> None:
        self._ring = memoryview(b"")
        self.is_closed = True
