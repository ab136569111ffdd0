"""What is wrong with this machine and this configuration, and what to type: the table of checks.

Each row is a function of a ``Site``; it judges what it finds, changes nothing, and writes nothing but the probe that
was asked for. This version has no TLS, so nothing looks at certificates.
"""

from __future__ import annotations

from typing import Any

from mpserverd.ops import checks_access, checks_daemon, checks_disk, checks_host, checks_network, checks_packets
from mpserverd.ops.findings import Check, report
from mpserverd.ops.site import Site

CHECKS = (
    Check("configuration", "whether it loads, and is what the daemon has", checks_daemon.configuration),
    Check("daemon", "whether it answers; children that are stuck, dead or replaced often", checks_daemon.daemon),
    Check("descriptors", "open files against 3 x max_clients + 1,024", checks_host.descriptors),
    Check("memory", "the buffers against MemAvailable, cgroup and MemoryMax", checks_host.memory),
    Check("kernel settings", "what `tune` wants, and what is cut because of it", checks_host.kernel_settings),
    Check("disk space", "free space and files against min_free_bytes and max_bytes", checks_disk.space),
    Check("file system", "its kind, and whether O_DIRECT works", checks_disk.file_system),
    Check("disk speed", "writes and syncs of a small file in the spool; with --probe only", checks_disk.speed),
    Check("clock", "whether the kernel's clock is synchronised", checks_host.clock),
    Check("ports", "listeners bound, or free; who holds one that is taken", checks_network.ports),
    Check("permissions", "configuration, spool and control socket for the service's user", checks_access.permissions),
    Check("packet size", "stored bytes and cut-off packets that contradict it", checks_packets.packet_size),
    Check("tcp", "segments sent again, packets dropped from queues, now and since boot", checks_network.tcp_losses),
    Check("network cards", "errors and drops of each card", checks_network.cards),
    Check("swap", "packets or processes of the daemon in swap", checks_host.swap),
    Check("storer", "duration of its cycles, failed writes, a full spool", checks_daemon.storer),
    Check("ledger", "whether it balances; bytes dropped or lost", checks_daemon.ledger),
)


def diagnose(site: Site) -> dict[str, Any]:
    """The report of all checks, worst first."""
    return report(site, CHECKS)
