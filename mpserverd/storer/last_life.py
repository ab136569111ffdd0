"""How the daemon ended before, judged at the storer's start from what the catalog remembers of the boot.

A stop commits that everything is put away. Without it: the same boot means that all processes of the daemon ended,
another one that the system went down. Either way the shared memory is gone, and streams end at their durable offset.
When the memory lived on (a restart, or a new storer beside the old workers) nobody asks.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

_BOOT_ID_FILE = "/proc/sys/kernel/random/boot_id"
BOOT_KEY, CLOSED_KEY, SYNC_KEY = "boot_id", "closed", "sync"


class LastLife(enum.Enum):
    """The words of the journal."""

    STOPPED = "a stop"
    CRASHED = "all processes of the daemon ended without a stop"
    WENT_DOWN = "the system went down (power cut, crash or reset)"
    UNKNOWN = "not known"


def judge(meta: Mapping[str, str], boot_id: str) -> LastLife:
    if meta.get(CLOSED_KEY) == "1":
        return LastLife.STOPPED
    before = meta.get(BOOT_KEY, "")
    if not before or not boot_id:
        return LastLife.UNKNOWN
    return LastLife.CRASHED if before == boot_id else LastLife.WENT_DOWN


def boot_id() -> str:
    """Empty where the kernel does not say."""
    try:
        with open(_BOOT_ID_FILE, encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""
