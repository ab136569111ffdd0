"""Checks of the machine: descriptors, memory, kernel settings, clock, swap. The rows stand in doctor.py."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import ClassVar

from mpserverd.errors import StartError
from mpserverd.net.fdlimit import DESCRIPTORS_PER_CLIENT, RESERVED_DESCRIPTORS, clients_that_fit
from mpserverd.ops import procfs, tune
from mpserverd.ops.findings import Finding, fault, note, ok, warning
from mpserverd.ops.site import Site
from mpserverd.supervisor.resources import check_memory

MEMORY_LOW_SHARE = 0.05
STA_UNSYNC = 0x0040
CLOCK_ERROR = 5
"""TIME_ERROR of adjtimex(2): not synchronised."""
TUNE = "mpserverctl tune --apply"


# -- descriptors


def descriptors(site: Site) -> Iterator[Finding]:
    """The limit of the running daemon, and the one that the unit would give the next."""
    clients = site.settings.server.max_clients
    seen = False
    supervisor = site.pids.get("supervisor")
    if supervisor is not None:
        found = procfs.limits(site.proc, supervisor, "Max open files")
        if found is not None:
            seen = True
            yield _enough(f"the daemon (pid {supervisor}) may open", found[0], clients, site)
    unit_limit = tune.number(site.unit.get("LimitNOFILE", ""))
    if unit_limit is not None:
        seen = True
        yield _enough("the unit's LimitNOFILE is", unit_limit, clients, site)
    if not seen:
        found = procfs.limits(site.proc, "self", "Max open files") or (0, 0)
        yield _enough("a daemon started from here may open", found[1], clients, site)


def _enough(subject: str, files: int, clients: int, site: Site) -> Finding:
    needed = DESCRIPTORS_PER_CLIENT * clients + RESERVED_DESCRIPTORS
    shown = "any number of" if files >= procfs.UNLIMITED else f"{files:,}"
    text = f"{subject} {shown} files, {clients:,} clients need {needed:,}"
    if files >= needed:
        return ok(text)
    command = f"{TUNE}; systemctl restart mpserverd" if site.unit else f"ulimit -n {needed} before the start"
    fitting = clients_that_fit(files)
    if fitting < clients:
        return fault(f"{text}; only {fitting:,} will be served", command)
    return warning(f"{text}; all clients fit, with less in reserve", command)


# -- memory


def memory(site: Site) -> Iterator[Finding]:
    """The arena is taken at the start: before it, it must fit; after it, the rest of the machine must live."""
    needed = site.settings.buffers.bytes
    found = procfs.sizes_kib(site.proc / "meminfo")
    available, total = found.get("MemAvailable"), found.get("MemTotal")
    if available is None or total is None:
        yield note(f"{site.proc / 'meminfo'} is hidden; whether {needed:,} bytes of buffers fit is not known")
        return
    if site.live is not None:
        least = round(total * MEMORY_LOW_SHARE)
        text = f"{available:,} of {total:,} bytes are available, beside {needed:,} bytes of buffers"
        if available < least:
            yield warning(f"{text}; less than {least:,}", "lower buffers.bytes, or: ps aux --sort=-rss | head")
        else:
            yield ok(text)
    else:
        yield _fits(site, needed, available)
    yield from _unit_memory(site, needed)


def _fits(site: Site, needed: int, available: int) -> Finding:
    try:
        check_memory(site.settings, proc=str(site.proc), cgroups=str(site.cgroups))
    except StartError as error:
        return fault(str(error), f"lower buffers.bytes in {site.config_path}")
    return ok(f"{needed:,} bytes of buffers fit into {available:,} that are available")


def _unit_memory(site: Site, needed: int) -> Iterator[Finding]:
    limit = site.unit.get("MemoryMax", "")
    if limit.isdecimal() and int(limit) < procfs.UNLIMITED and int(limit) < needed:
        yield fault(
            f"MemoryMax of the unit is {limit} bytes, buffers.bytes is {needed}",
            "systemctl edit mpserverd   (raise MemoryMax), or lower buffers.bytes",
        )


# -- kernel settings


def kernel_settings(site: Site) -> Iterator[Finding]:
    """What ``tune`` wants; worse than a note only where a setting of ours is cut because of it."""
    cut = {
        "net.core.rmem_max": ("receive_buffer_bytes", max(one.receive_buffer_bytes for one in site.settings.listeners)),
        "net.core.wmem_max": ("send_buffer_bytes", max(one.send_buffer_bytes for one in site.settings.listeners)),
    }
    low = False
    for row in tune.SYSCTLS:
        actual = tune.number(procfs.read(row.path(site.proc)))
        if actual is None:
            yield note(f"{row.key} does not exist here: another network namespace, perhaps a container, has it")
            low = True
        elif actual < row.wanted:
            key, asked = cut[row.key]
            low = True
            if actual < asked:
                yield warning(f"{row.key} is {actual:,}, so {key} = {asked:,} is cut to it", TUNE)
            else:
                yield note(f"{row.key} is {actual:,}, {row.wanted:,} are wanted: {row.reason}", TUNE)
    yield from _backlog(site)
    if not low:
        yield ok(", ".join(f"{row.key} is at least {row.wanted:,}" for row in tune.SYSCTLS))


def _backlog(site: Site) -> Iterator[Finding]:
    allowed = tune.number(procfs.read(site.proc / "sys/net/core/somaxconn"))
    wanted = site.settings.server.backlog
    if allowed is not None and allowed < wanted:
        yield warning(
            f"net.core.somaxconn is {allowed:,}, so server.backlog = {wanted:,} is cut to it",
            f"sysctl -w net.core.somaxconn={wanted}",
        )


# -- clock


class _Timex(ctypes.Structure):
    """struct timex of adjtimex(2), 64 bit; only ``modes``, the errors and ``status`` are looked at."""

    _fields_: ClassVar = [
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_long * 32),
    ]


def read_clock() -> tuple[int, int, int]:
    """State, status bits and largest error in us, as the kernel has them. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    timex = _Timex()
    state = libc.adjtimex(ctypes.byref(timex))
    if state < 0:
        number = ctypes.get_errno()
        raise OSError(number, "adjtimex is not allowed here")
    return state, timex.status, timex.maxerror


def clock(site: Site, look: Callable[[], tuple[int, int, int]] = read_clock) -> Iterator[Finding]:
    """Latencies compare the clients' clocks with this one; times of packets come from it too."""
    state, status, error_us = look()
    timed = [layout.name for layout in site.settings.layouts.values() if layout.time is not None]
    if not status & STA_UNSYNC and state != CLOCK_ERROR:
        yield ok(f"synchronised, to {error_us / 1000:,.1f} ms at worst")
        return
    text = f"the clock is not synchronised (status {status:#x}, STA_UNSYNC is {STA_UNSYNC:#x})"
    command = "apt install chrony; or: timedatectl set-ntp true"
    if timed:
        yield warning(f"{text}; latencies of layout {', '.join(timed)} are worth nothing", command)
    else:
        yield note(f"{text}; --since and --until of readers go by it", command)


# -- swap


def swap(site: Site) -> Iterator[Finding]:
    """Packets in swap are slower than on disk."""
    if not site.pids:
        yield ok("no daemon to look at")
        return
    swapped, unseen = 0, 0
    for name, pid in site.pids.items():
        sizes = procfs.sizes_kib(site.proc / str(pid) / "status")
        unseen += "VmSwap" not in sizes
        if sizes.get("VmSwap", 0):
            swapped += sizes["VmSwap"]
            yield warning(
                f"{name} (pid {pid}) has {sizes['VmSwap']:,} bytes in swap, 0 are wanted",
                "systemctl set-property mpserverd MemorySwapMax=0; systemctl restart mpserverd",
            )
    if not swapped:
        yield ok(f"0 bytes of {len(site.pids) - unseen} processes are in swap")
