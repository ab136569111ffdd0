"""Segment files of one stream, mapped read-only.

Rules: a mapping is never closed while somebody may use it; it is let go, and ends with the last array or view on it
(segments are unlinked by retention, never cut below what is durable or used again, so such a view stays right). The
size of a file is looked at only to refuse what is too short; how far it may be read is the catalog's word.

It does not decide what to read.
"""

from __future__ import annotations

import mmap
import os
from collections import OrderedDict
from pathlib import Path

from mpserverd.errors import DamageError, SpoolError
from mpserverd.streams.catalog_view import Segment

MAPPINGS_MAX = 4
"""Mappings kept for the next call; each holds a file descriptor."""


class SegmentFiles:
    """Maps segments of the directory of one stream."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._mappings: OrderedDict[int, mmap.mmap] = OrderedDict()

    def view(self, segment: Segment, first: int, end: int) -> memoryview:
        """Read-only bytes [first, end) of the stream, which all lie in ``segment``.

        Raises FileNotFoundError when the file is gone (retention, or damage: the caller knows the catalog),
        DamageError when it is too short, SpoolError when it may not be read.
        """
        mapping = self._mappings.get(segment.first)
        if mapping is None or len(mapping) < end - segment.first:
            mapping = self._map(segment, end)
            self._mappings[segment.first] = mapping
            if len(self._mappings) > MAPPINGS_MAX:
                self._mappings.popitem(last=False)
        self._mappings.move_to_end(segment.first)
        return memoryview(mapping)[first - segment.first : end - segment.first]

    def close(self) -> None:
        self._mappings.clear()

    def _map(self, segment: Segment, end: int) -> mmap.mmap:
        path = self.directory / segment.file_name
        needed = end - segment.first
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError:
            raise SpoolError(f"no permission to read {path}; run as root or as a member of the spool's group") from None
        try:
            found = os.fstat(descriptor).st_size
            if found < needed:
                raise DamageError(
                    f"{path} has {found} bytes, the catalog says at least {needed}; run mpserverctl verify"
                )
            return mmap.mmap(descriptor, found, mmap.MAP_SHARED, mmap.PROT_READ)
        finally:
            os.close(descriptor)
