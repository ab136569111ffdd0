"""Do the limits add up? Memory for the arena, descriptors and chunks for the clients, the size of the disk; before
anything is made."""

from __future__ import annotations

import dataclasses
import os
import pathlib

from mpserverd.arena.migrate import Geometry
from mpserverd.arena.state import CONNECTION_WORDS, LATENCY_BUCKETS, NAME_BYTES, STREAM_WORDS
from mpserverd.config.schema import Config
from mpserverd.errors import StartError
from mpserverd.limits import CHUNKS_PER_CONNECTION
from mpserverd.net.fdlimit import clients_that_fit
from mpserverd.supervisor.core import SLOTS

SPARE_CONNECTION_ROWS = 16
SPARE_STREAM_ROWS = 64
STREAM_ROWS_PER_CLIENT = 2
"""A stream may still be draining while its row's successor is connected."""
_WORD_BYTES = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Fit:
    """``max_clients`` that can be served; ``why`` says what lowered it, "" when nothing did."""

    max_clients: int
    why: str


def fit_clients(config: Config, descriptor_limit: int) -> Fit:
    """How many clients descriptors and chunks allow. Raises StartError when not even one."""
    wanted = config.server.max_clients
    chunk_count = config.buffers.bytes // config.buffers.chunk_bytes
    bounds = {
        f"{descriptor_limit} file descriptors (raise LimitNOFILE)": clients_that_fit(descriptor_limit),
        f"{chunk_count} chunks of [buffers], {CHUNKS_PER_CONNECTION} a client (raise buffers.bytes)": chunk_count
        // CHUNKS_PER_CONNECTION,
    }
    reason, least = min(bounds.items(), key=lambda item: item[1])
    if least < 1:
        raise StartError(f"{reason} are not enough for a single client; {wanted} are wanted")
    why = f"{reason} are enough for {least} clients, server.max_clients is {wanted}" if least < wanted else ""
    return Fit(min(wanted, least), why)


def wanted_geometry(config: Config, max_clients: int) -> Geometry:
    """The memory that these settings ask for."""
    chunk_bytes = config.buffers.chunk_bytes
    return Geometry(
        connections=max_clients + SPARE_CONNECTION_ROWS,
        streams=STREAM_ROWS_PER_CLIENT * max_clients + SPARE_STREAM_ROWS,
        slots=SLOTS,
        chunk_bytes=chunk_bytes,
        chunks=config.buffers.bytes // chunk_bytes,
    )


def memory_bytes(geometry: Geometry) -> int:
    """About what the arena and the tables take."""
    stream_bytes = (STREAM_WORDS + LATENCY_BUCKETS) * _WORD_BYTES + NAME_BYTES
    tables = geometry.connections * CONNECTION_WORDS * _WORD_BYTES + geometry.streams * stream_bytes
    return tables + geometry.chunks * geometry.chunk_bytes


def check_memory(config: Config, *, proc: str = "/proc", cgroups: str = "/sys/fs/cgroup") -> None:
    """Raise StartError when the arena and the tables do not fit into what is available now."""
    needed = memory_bytes(wanted_geometry(config, config.server.max_clients))
    check_available(needed, proc=proc, cgroups=cgroups)


def check_spool(config: Config) -> None:
    """Raise StartError when more must stay free than the spool's file system has. One that says nothing is passed."""
    wanted = config.spool.min_free_bytes
    path = pathlib.Path(config.spool.path) / "streams"  # it may be on a disk of its own
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        found = os.statvfs(path)
    except OSError:
        return
    size = found.f_blocks * found.f_frsize
    if wanted > size:
        raise StartError(
            f"spool.min_free_bytes is {wanted}, the file system of {path} has {size} bytes: nothing could be stored; "
            "lower it, or change spool.path"
        )


def check_available(needed: int, *, proc: str = "/proc", cgroups: str = "/sys/fs/cgroup") -> None:
    """Raise StartError when so many bytes are not there to be taken now."""
    for what, available in _available_bytes(pathlib.Path(proc), pathlib.Path(cgroups)):
        if needed > available:
            raise StartError(
                f"shared memory needs {needed} bytes, {what} leaves {available}; "
                "lower buffers.bytes or server.max_clients, or free memory"
            )


def _available_bytes(proc: pathlib.Path, cgroups: pathlib.Path) -> list[tuple[str, int]]:
    """Every bound that is known here, by name. A system that hides them (ProcSubset=pid) has fewer."""
    found = []
    for line in _read(proc / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            found.append(("MemAvailable", int(line.split()[1]) * 1024))
    for line in _read(proc / "self/cgroup").splitlines():
        hierarchy, controllers, path = [*line.split(":", 2), "", ""][:3]
        if hierarchy == "0":
            found += _cgroup_bounds(cgroups, path, "memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            found += _cgroup_bounds(cgroups / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes")
    return found


def _cgroup_bounds(root: pathlib.Path, path: str, limit: str, used: str) -> list[tuple[str, int]]:
    """The limit of each group from ours up to the root, less what is used in it."""
    found = []
    group = root / path.lstrip("/")
    while True:
        limit_text, used_text = _read(group / limit).strip(), _read(group / used).strip()
        if limit_text.isdigit() and used_text.isdigit():
            found.append((f"{group / limit}", max(0, int(limit_text) - int(used_text))))
        if group in (root, group.parent):
            return found
        group = group.parent


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
