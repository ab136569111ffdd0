"""What a stream of ``mpload chaos`` contains: every byte follows from seed, client, stream number and offset. Pure.

    packet i    i as u64 LE (u32 in packets of less than 16 bytes), then filler that depends on its place in the stream

So that what was sent need not be kept to be compared, and so that each packet says which one it is: a difference can be
told as packets that are missing, doubled or strange.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

PATTERN_BYTES = 65_521
"""A prime: the filler of a packet repeats after that many packets only."""
PIECE_BYTES_MAX = 1 << 20

Bytes = npt.NDArray[np.uint8]


def sequence_bytes(packet_size: int) -> int:
    """Size of the packet's number; the configuration of the daemon says the same."""
    return 8 if packet_size >= 16 else 4


class Content:
    """The stream ``number`` of ``client``."""

    def __init__(self, seed: int, client: int, number: int, packet_size: int) -> None:
        if packet_size < sequence_bytes(packet_size):
            raise ValueError(f"packets of {packet_size} bytes have no room for a number")
        self.packet_size = packet_size
        name = f"{seed}/{client}/{number}".encode()
        self._pattern = np.frombuffer(hashlib.shake_128(name).digest(PATTERN_BYTES), np.uint8)
        self._number_type = np.dtype(f"<u{sequence_bytes(packet_size)}")

    def packets(self, indexes: npt.NDArray[np.int64]) -> Bytes:
        """Those packets, one a row."""
        size = self.packet_size
        places = indexes[:, None] * size + np.arange(size, dtype=np.int64)
        rows: Bytes = self._pattern[places % PATTERN_BYTES]
        numbers = indexes.astype(self._number_type)
        rows[:, : self._number_type.itemsize] = numbers.view(np.uint8).reshape(-1, numbers.itemsize)
        return rows

    def piece(self, first: int, end: int) -> Bytes:
        """Bytes [first, end) of the stream, at most PIECE_BYTES_MAX of them."""
        if not 0 <= first <= end <= first + PIECE_BYTES_MAX:
            raise ValueError(f"bytes {first} to {end}")
        first_packet, end_packet = first // self.packet_size, -(-end // self.packet_size)
        rows = self.packets(np.arange(first_packet, end_packet, dtype=np.int64))
        skipped = first - first_packet * self.packet_size
        return rows.reshape(-1)[skipped : skipped + end - first]

    def numbers_of(self, rows: Bytes) -> npt.NDArray[np.int64]:
        """What each of the packets says its index is; anything, when it is not of this stream."""
        numbers = np.ascontiguousarray(rows[:, : self._number_type.itemsize]).view(self._number_type).reshape(-1)
        return numbers.astype(np.uint64).clip(max=np.iinfo(np.int64).max).astype(np.int64)
