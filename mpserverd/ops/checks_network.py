"""Checks of the network: who listens where, what TCP and the cards lost. The rows stand in doctor.py."""

from __future__ import annotations

import errno
import ipaddress
import socket
import time
from collections.abc import Iterator
from typing import Any

from mpserverd.config.kinds import split_endpoint
from mpserverd.config.schema import ListenerConfig
from mpserverd.net.allowlist import Address
from mpserverd.ops import procfs
from mpserverd.ops.findings import Finding, fault, note, ok, warning
from mpserverd.ops.procfs import Listening
from mpserverd.ops.site import Site

PRIVILEGED_PORTS = 1024
RETRANSMITTED_SHARE_HIGH = 0.01
SEGMENTS_MIN = 1000
"""Fewer say nothing about a share."""
CARD_LOSS_SHARE_HIGH = 0.0001
CONNECT_DEADLINE_S = 2.0
REFUSAL_S = 0.3
"""A daemon that does not want a connection closes it at once."""

LOSSES = {
    "TCPRcvQDrop": "packets dropped because a receive queue was full",
    "PruneCalled": "times that a receive queue was cut because of too little memory",
    "RcvPruned": "packets dropped from a receive queue because of too little memory",
    "TCPBacklogDrop": "packets dropped because the backlog of a socket was full",
    "ListenOverflows": "connections refused because the queue of a listener was full",
    "TCPMemoryPressures": "times that TCP ran short of memory",
}
"""Counters of /proc/net/netstat that have to stand still, and what they mean."""
_CURES = {
    "ListenOverflows": "raise server.backlog and net.core.somaxconn",
    "TCPMemoryPressures": "raise net.ipv4.tcp_mem, or lower receive_buffer_bytes",
}
_CURE = "mpserverctl workers   (are they busy?); raise receive_buffer_bytes; mpserverctl tune --apply"


# -- ports


def ports(site: Site) -> Iterator[Finding]:
    """Each listener: bound by the daemon, or free for it."""
    everyone = procfs.listening(site.proc)
    bound = _bound_by_daemon(site)
    for listener in site.settings.listeners:
        where = f"listener {listener.name}: {listener.address}"
        if site.live is not None:
            yield from _bound(site, listener, bound.get(listener.name), everyone)
        elif listener.port == 0:
            yield ok(f"{where}: any free port")
        else:
            yield from _free(site, listener, everyone)


def _bound_by_daemon(site: Site) -> dict[str, str]:
    """Where the daemon's listeners are, by name."""
    facts: dict[str, Any] = site.live.facts if site.live is not None else {}
    return {one["name"]: one["address"] for one in facts.get("listeners", {}).values() if one.get("address")}


def _bound(site: Site, listener: ListenerConfig, address: str | None, everyone: list[Listening]) -> Iterator[Finding]:
    where = f"listener {listener.name}: {address or listener.address}"
    host, port = split_endpoint(address) if address else (None, 0)
    mine = [one for one in everyone if host is not None and one.port == port and one.address == host]
    if not mine:
        yield fault(f"{where}: the daemon runs, and nobody listens there", "mpserverctl reload; mpserverctl events")
        return
    backlog = site.settings.server.backlog
    waiting = sum(one.waiting for one in mine)
    text = f"{where}: the daemon listens, {waiting} connections wait, {backlog} may"
    yield warning(text, "mpserverctl check   (does the supervisor hang?)") if waiting > backlog // 2 else ok(text)
    if site.probe and host is not None:
        yield _connected(where, host, port)


def _connected(where: str, host: Address, port: int) -> Finding:
    """One connection without a byte; it leaves no stream."""
    if host.is_unspecified:
        host = ipaddress.ip_address("127.0.0.1" if host.version == 4 else "::1")
    began_s = time.monotonic()
    try:
        client = socket.create_connection((str(host), port), timeout=CONNECT_DEADLINE_S)
    except OSError as error:
        why = error.strerror or f"none within {CONNECT_DEADLINE_S:g} s"
        return fault(f"{where}: no connection from here: {why}", "nft list ruleset; mpserverctl check")
    took_ms = 1000 * (time.monotonic() - began_s)
    with client:
        refused = _is_closed(client)
    if refused:
        command = "mpserverctl stats   (errors_by_reason says which limit)"
        return warning(f"{where}: a connection from {host} is closed at once: by allow, deny or a limit", command)
    return ok(f"{where}: a connection from here took {took_ms:.1f} ms")


def _is_closed(client: socket.socket) -> bool:
    client.settimeout(REFUSAL_S)
    try:
        return client.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionResetError:
        return True


def _free(site: Site, listener: ListenerConfig, everyone: list[Listening]) -> Iterator[Finding]:
    where = f"listener {listener.name}: {listener.address}"
    host, port = split_endpoint(listener.address)
    taken = [one for one in everyone if one.port == port and _collide(one.address, host)]
    for one in taken:
        names = [f"{holder.name} (pid {holder.pid})" for holder in procfs.holders(site.proc, one.inode)]
        by = ", ".join(names) or "a process that only root may see"
        yield fault(
            f"{where}: taken by {by}",
            f"ss -ltnp 'sport = :{port}'; stop that one, or change address of the [[listener]]",
        )
    if not taken:
        yield _bindable(where, host) or ok(f"{where}: free")
    if port < PRIVILEGED_PORTS and site.service_owner[1] != 0:
        yield warning(
            f"{where}: ports below {PRIVILEGED_PORTS} need a capability, and {site.service_owner[0]} has none",
            "systemctl edit mpserverd   (AmbientCapabilities=CAP_NET_BIND_SERVICE, CapabilityBoundingSet= too)",
        )


def _collide(one: Address, other: Address) -> bool:
    return one == other or one.is_unspecified or other.is_unspecified


def _bindable(where: str, host: Address) -> Finding | None:
    """Whether the address is one of this machine; any port of it will tell."""
    family = socket.AF_INET if host.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.bind((str(host), 0))
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            return fault(f"{where}: no address of this machine", "ip address; then change address of the [[listener]]")
        return fault(f"{where}: cannot be bound: {error.strerror}", "ip address")
    return None


# -- what was lost


def tcp_losses(site: Site) -> Iterator[Finding]:
    """Counters since boot, and how far they moved while we looked."""
    tcp, more = _tcp_counters(site)
    if not tcp:
        yield note(f"{site.proc / 'net/snmp'} is hidden; retransmits are not known")
        return
    site.sleep(site.interval_s)
    tcp_later, more_later = _tcp_counters(site)
    moved = {name: tcp_later.get(name, 0) - value for name, value in tcp.items()}
    calm = True
    for segments, repeated, when in (
        (moved["OutSegs"], moved["RetransSegs"], f"in the last {site.interval_s:g} s"),
        (tcp_later["OutSegs"], tcp_later["RetransSegs"], "since boot"),
    ):
        share = repeated / segments if segments else 0.0
        if segments >= SEGMENTS_MIN and share > RETRANSMITTED_SHARE_HIGH:
            calm = False
            yield warning(
                f"{repeated:,} of {segments:,} segments ({100 * share:.1f} %) were sent again {when}, "
                f"{100 * RETRANSMITTED_SHARE_HIGH:g} % are much",
                "ss -tin state established | grep -B1 retrans; look at cables, switches and ethtool -S",
            )
    for name, meaning in LOSSES.items():
        total, lately = more_later.get(name, 0), more_later.get(name, 0) - more.get(name, 0)
        command = _CURES.get(name, _CURE)
        if lately > 0:
            calm = False
            yield warning(
                f"{name}: {lately:,} {meaning} in the last {site.interval_s:g} s, {total:,} since boot", command
            )
        elif total > 0:
            yield note(f"{name}: {total:,} {meaning} since boot, none in the last {site.interval_s:g} s", command)
    if calm:
        segments, repeated = tcp_later["OutSegs"], tcp_later["RetransSegs"]
        yield ok(f"{repeated:,} of {segments:,} segments were sent again since boot")


def _tcp_counters(site: Site) -> tuple[dict[str, int], dict[str, int]]:
    tcp = procfs.counters(site.proc / "net/snmp").get("Tcp", {})
    return tcp, procfs.counters(site.proc / "net/netstat").get("TcpExt", {})


def cards(site: Site) -> Iterator[Finding]:
    """Packets that the network cards lost since boot."""
    lost = False
    found = procfs.interfaces(site.sys)
    for name, values in found.items():
        received = values.get("rx_packets", 0)
        for key in ("rx_errors", "rx_missed_errors", "rx_fifo_errors", "rx_dropped", "tx_errors"):
            count = values.get(key, 0)
            if not count:
                continue
            lost = True
            text = f"{name}: {key} is {count:,}, rx_packets is {received:,}"
            command = f"ethtool -S {name}; ethtool -G {name} rx 4096"
            heavy = count > max(1, received) * CARD_LOSS_SHARE_HIGH
            yield warning(text, command) if heavy else note(text, command)
    if not lost:
        yield ok(f"{', '.join(found) or 'no card'}: no error and no drop since boot")
