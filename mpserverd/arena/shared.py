"""Versioned shared memory: a memfd with a header page that says what lies behind it.

Rules: the geometry is read from the header, never from a configuration; the size is sealed, so that nobody can shrink
the file under a mapping (that would be SIGBUS); every shared word is an aligned u64 written through
``memoryview.cast("Q")`` or numpy, because ``struct.pack_into`` zeroes first and readers see that. Readers and writers
rely on stores becoming visible in program order, which x86-64 guarantees.

This module knows nothing of what the words mean.
"""

from __future__ import annotations

import fcntl
import mmap
import os

import numpy as np
import numpy.typing as npt

from mpserverd.errors import LayoutError, StartError

PAGE_BYTES = 4096
HEADER_WORDS = PAGE_BYTES // 8
WORD_BYTES = 8

MAGIC_WORD, VERSION_WORD, SIZE_WORD = 0, 1, 2
GEOMETRY_WORD = 3
"""First of the words that describe the geometry; ``GEOMETRY_COUNT`` of them."""
GEOMETRY_COUNT = 13
LIVE_WORD = 16
"""First header word that is free for live values."""

F_ADD_SEALS = getattr(fcntl, "F_ADD_SEALS", 1033)
_SEALS = 0x0001 | 0x0002 | 0x0004  # F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW


def create_memfd(name: str, size_bytes: int) -> int:
    """Make a memfd of ``size_bytes``, with all its memory allocated and its size sealed. The caller owns the fd.

    Raises StartError when the memory is not there: better now than as an OOM kill later.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, size_bytes)
        fcntl.fcntl(fd, F_ADD_SEALS, _SEALS)
    except OSError as error:
        os.close(fd)
        raise StartError(
            f"cannot allocate {size_bytes} bytes of shared memory for {name}: {error.strerror}; "
            "lower [buffers] bytes or [server] max_clients"
        ) from error
    return fd


class SharedWords:
    """A mapped memfd: ``words`` is a memoryview of u64 over all of it, ``array`` the same for numpy.

    ``read_only`` maps are for tools such as mpserverctl.
    """

    def __init__(self, fd: int, *, magic: int, version: int, what: str, read_only: bool = False) -> None:
        size_bytes = os.fstat(fd).st_size
        if size_bytes < PAGE_BYTES:
            raise LayoutError(f"{what}: {size_bytes} bytes are too few for a header of {PAGE_BYTES}")
        access = mmap.PROT_READ if read_only else mmap.PROT_READ | mmap.PROT_WRITE
        self.fd = fd
        self.map = mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, access)
        self.words: memoryview = memoryview(self.map).cast("Q")
        self.array: npt.NDArray[np.uint64] = np.frombuffer(self.map, dtype=np.uint64)
        if self.words[MAGIC_WORD] != magic:
            raise LayoutError(f"{what}: no such memory (magic {self.words[MAGIC_WORD]:#x}, wanted {magic:#x})")
        if self.words[VERSION_WORD] != version:
            raise LayoutError(f"{what}: layout {self.words[VERSION_WORD]}, this version knows {version}")
        if self.words[SIZE_WORD] != size_bytes:
            raise LayoutError(f"{what}: header says {self.words[SIZE_WORD]} bytes, the file has {size_bytes}")

    def geometry(self, index: int) -> int:
        """The ``index``-th word that the creator passed to ``create``."""
        return int(self.words[GEOMETRY_WORD + index])

    @staticmethod
    def create(name: str, size_bytes: int, *, magic: int, version: int, geometry: list[int]) -> int:
        """Make the memfd and write its header, magic last. Returns the fd."""
        if len(geometry) > GEOMETRY_COUNT:
            raise ValueError(f"{len(geometry)} words of geometry, at most {GEOMETRY_COUNT}")
        fd = create_memfd(name, size_bytes)
        with mmap.mmap(fd, PAGE_BYTES) as header:
            words = memoryview(header).cast("Q")
            words[VERSION_WORD] = version
            words[SIZE_WORD] = size_bytes
            for index, value in enumerate(geometry):
                words[GEOMETRY_WORD + index] = value
            words[MAGIC_WORD] = magic
            words.release()
        return fd


def header_of(fd: int, magic: int, what: str) -> int:
    """The layout's version, which stands in the same place in all layouts. Raises LayoutError."""
    words = np.frombuffer(os.pread(fd, GEOMETRY_WORD * WORD_BYTES, 0), dtype=np.uint64).tolist()
    if len(words) < GEOMETRY_WORD or words[MAGIC_WORD] != magic:
        raise LayoutError(f"{what}: no such memory")
    return int(words[VERSION_WORD])


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
