"""CPU time and memory of a group of processes, from /proc."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterable

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_s(pids: Iterable[int]) -> float:
    """User and system time of the processes, threads that ended included."""
    ticks = 0
    for pid in pids:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS_PER_S


def memory_bytes(pids: Iterable[int]) -> dict[str, int]:
    """Proportional memory, and shared memory files whole: pages that nobody has touched yet are taken all the same."""
    private = mapped_files = shared_mapped = 0
    memfds: dict[int, int] = {}
    for pid in pids:
        for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name == "Pss_Anon":
                private += int(rest.split()[0]) * 1024
            elif name == "Pss_File":
                mapped_files += int(rest.split()[0]) * 1024
            elif name == "Pss_Shmem":
                shared_mapped += int(rest.split()[0]) * 1024
        memfds |= _memfds(pid)
    shared = max(shared_mapped, sum(memfds.values()))
    return {"total": private + mapped_files + shared, "private": private, "files": mapped_files, "shared": shared}


def _memfds(pid: int) -> dict[int, int]:
    """Allocated bytes of a process's memory files, by inode."""
    found = {}
    for link in pathlib.Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if os.readlink(link).startswith("/memfd:"):
                status = link.stat()
                found[status.st_ino] = status.st_blocks * 512
    return found
