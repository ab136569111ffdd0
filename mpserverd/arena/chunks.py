"""The arena: fixed-size chunks of packet bytes in shared memory, and the table that says whose each chunk is.

The table is the only truth; free lists are derived by scanning it. A chunk's row has four words:

    WORD    state (2 low bits) and, above them, the lease or the stream number
    BASE    stream offset of the chunk's first byte, a multiple of the chunk size
    FIRST   stream offset of the first valid byte in it (>= BASE)
    SERIAL  rises by one for each chunk that its stream takes

Each state has one owner, so each change is one store by one process, and no lock exists:

    FREE    -> LEASED   the supervisor, which leases batches ahead to a worker's incarnation
    LEASED  -> USED     that worker; BASE, FIRST and SERIAL are written first, WORD last
    LEASED  -> FREE     that worker (giving back), or the supervisor once the worker's pidfd has fired
    USED    -> FREE     the storer, after the commit that makes its bytes durable
    USED    -> LEASED   the stream's worker, only for bytes at or above *offered* (a drop, its hole published
                        before), or of a stream that is not stored

A chunk belongs to a stream *number*, which is never reused, never to a connection's row. The table lies in a memfd of
its own, so that tools can map it without seeing packets.
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from mpserverd.arena.shared import PAGE_BYTES, WORD_BYTES, SharedWords, create_memfd, round_up
from mpserverd.errors import LayoutError

TABLE_MAGIC = 0x6D70736368756E6B
TABLE_VERSION = 1

FREE, LEASED, USED = 0, 1, 2
_STATE_BITS = 2

LET_GO_ALL = (1 << 63) - 1
"""Value of a stream's LET_GO word that lets go of every chunk: its connection is over."""

Words = npt.NDArray[np.uint64]


def leased_word(lease: int) -> int:
    """The word of a chunk leased to the child incarnation ``lease``."""
    return (lease << _STATE_BITS) | LEASED


def used_word(stream_number: int) -> int:
    """The word of a chunk that holds bytes of stream ``stream_number``."""
    return (stream_number << _STATE_BITS) | USED


def word_state(word: int) -> int:
    return word & 3


def word_number(word: int) -> int:
    """The lease or stream number in a word."""
    return word >> _STATE_BITS


class ChunkTable:
    """The rows of all chunks, as four parallel arrays of u64 (``words``, ``bases``, ``firsts``, ``serials``).

    The ``*_view`` attributes are memoryviews on the same words, for single stores in the hot path.
    """

    def __init__(self, fd: int, *, read_only: bool = False) -> None:
        shared = SharedWords(fd, magic=TABLE_MAGIC, version=TABLE_VERSION, what="chunk table", read_only=read_only)
        self.fd = fd
        self._shared = shared
        self.chunk_bytes = shared.geometry(0)
        self.count = count = shared.geometry(1)
        start = PAGE_BYTES // WORD_BYTES
        columns = [(start + i * count, start + (i + 1) * count) for i in range(4)]
        self.words, self.bases, self.firsts, self.serials = (shared.array[a:b] for a, b in columns)
        self.words_view, self.bases_view, self.firsts_view, self.serials_view = (shared.words[a:b] for a, b in columns)

    @classmethod
    def create(cls, *, chunk_bytes: int, count: int) -> ChunkTable:
        size_bytes = round_up(PAGE_BYTES + count * 4 * WORD_BYTES, PAGE_BYTES)
        fd = SharedWords.create(
            "mpserverd-chunks", size_bytes, magic=TABLE_MAGIC, version=TABLE_VERSION, geometry=[chunk_bytes, count]
        )
        return cls(fd)

    def free_count(self) -> int:
        return int(np.count_nonzero(self.words == np.uint64(FREE)))

    def leased_to(self, lease: int) -> npt.NDArray[np.intp]:
        """Indices of the chunks leased to ``lease``, ascending."""
        return np.flatnonzero(self.words == np.uint64(leased_word(lease)))

    def lease(self, lease: int, count: int) -> int:
        """Supervisor only: lease up to ``count`` free chunks. Returns how many."""
        free = np.flatnonzero(self.words == np.uint64(FREE))[:count]
        self.words[free] = np.uint64(leased_word(lease))
        return len(free)

    def revoke(self, lease: int) -> int:
        """Supervisor only, after the owner's pidfd fired: free what a dead child had leased. Returns how many."""
        dead = self.leased_to(lease)
        self.words[dead] = np.uint64(FREE)
        return len(dead)

    def publish(self, index: int, stream_number: int, base: int, first: int, serial: int) -> None:
        """Worker only: turn a chunk it has leased into one of the stream; the word is written last."""
        self.bases_view[index] = base
        self.firsts_view[index] = first
        self.serials_view[index] = serial
        self.words_view[index] = (stream_number << _STATE_BITS) | USED

    def used_by(self, stream_number: int) -> npt.NDArray[np.intp]:
        """Indices of the chunks of one stream, in the order in which the stream took them."""
        mine = np.flatnonzero(self.words == np.uint64(used_word(stream_number)))
        return mine[np.argsort(self.serials[mine], kind="stable")]


class Arena:
    """The chunk table and the packet bytes themselves.

    ``data`` is a memoryview of bytes; chunk i is ``data[i * chunk_bytes : (i + 1) * chunk_bytes]`` and starts on a
    page, so that O_DIRECT can write straight out of it. ``bytes`` is the same for numpy.
    """

    def __init__(self, table_fd: int, data_fd: int) -> None:
        import mmap  # noqa: PLC0415  (tools that read only the table never map packets)

        self.table = ChunkTable(table_fd)
        self.data_fd = data_fd
        self.chunk_bytes = self.table.chunk_bytes
        self.count = self.table.count
        size_bytes = self.chunk_bytes * self.count
        if os.fstat(data_fd).st_size != size_bytes:
            raise LayoutError(f"arena: {os.fstat(data_fd).st_size} bytes, its table says {size_bytes}")
        self._map = mmap.mmap(data_fd, size_bytes)
        self.data: memoryview = memoryview(self._map)
        self.bytes: npt.NDArray[np.uint8] = np.frombuffer(self._map, dtype=np.uint8)

    @classmethod
    def create(cls, *, size_bytes: int, chunk_bytes: int) -> Arena:
        """Allocate everything now. ``size_bytes`` is rounded down to whole chunks. Raises StartError."""
        count = size_bytes // chunk_bytes
        table = ChunkTable.create(chunk_bytes=chunk_bytes, count=count)
        return cls(table.fd, create_memfd("mpserverd-arena", count * chunk_bytes))
