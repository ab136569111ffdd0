"""What the kernel tells in /proc and /sys, as plain values. Every function takes the root that it reads below.

A file that is not there, or hidden from this user, is an empty answer: whoever asks knows what that means. It judges
nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import os
from collections.abc import Iterator
from pathlib import Path

from mpserverd.net.allowlist import Address

LISTEN = "0A"
SOCKET_LINK = "socket:["
UNLIMITED = 2**63 - 1


@dataclasses.dataclass(frozen=True, slots=True)
class Listening:
    """A TCP socket that listens; ``inode`` names it in /proc/PID/fd, ``waiting`` connections are not yet accepted."""

    address: Address
    port: int
    inode: int
    waiting: int


@dataclasses.dataclass(frozen=True, slots=True)
class Holder:
    """A process that has a socket open."""

    pid: int
    name: str


def read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def limits(proc: Path, pid: int | str, name: str) -> tuple[int, int] | None:
    """Soft and hard limit, such as of ``Max open files``; None when the process cannot be looked at."""
    for line in read(proc / str(pid) / "limits").splitlines():
        if line.startswith(name):
            soft, hard = line[len(name) :].split()[:2]
            return _limit(soft), _limit(hard)
    return None


def _limit(text: str) -> int:
    return UNLIMITED if text == "unlimited" else int(text)


def sizes_kib(path: Path) -> dict[str, int]:
    """Lines such as ``MemAvailable:  1024 kB`` as bytes by name; of meminfo, status and smaps_rollup."""
    found = {}
    for line in read(path).splitlines():
        name, colon, value = line.partition(":")
        parts = value.split()
        if colon and len(parts) == 2 and parts[1] == "kB" and parts[0].isdecimal():
            found[name] = int(parts[0]) * 1024
    return found


def counters(path: Path) -> dict[str, dict[str, int]]:
    """/proc/net/snmp and /proc/net/netstat: a line of names and a line of values for each protocol."""
    found: dict[str, dict[str, int]] = {}
    names: list[str] = []
    for line in read(path).splitlines():
        protocol, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].lstrip("-").isdigit():
            found[protocol] = dict(zip(names, map(int, words), strict=False))
        names = words
    return found


def listening(proc: Path) -> list[Listening]:
    """Every TCP socket that listens, in this network namespace."""
    found = []
    for name in ("tcp", "tcp6"):
        for line in read(proc / "net" / name).splitlines()[1:]:
            words = line.split()
            if len(words) > 9 and words[3] == LISTEN:
                address, _, port = words[1].partition(":")
                waiting = int(words[4].partition(":")[2], 16)
                found.append(Listening(_address(address), int(port, 16), int(words[9]), waiting))
    return found


def _address(text: str) -> Address:
    """Four bytes each in the machine's order, which is little endian here."""
    raw = bytes.fromhex(text)
    plain = b"".join(raw[at : at + 4][::-1] for at in range(0, len(raw), 4))
    return ipaddress.IPv4Address(plain) if len(plain) == 4 else ipaddress.IPv6Address(plain)


def holders(proc: Path, inode: int) -> list[Holder]:
    """Processes that hold this socket, as far as this user may look."""
    wanted = f"{SOCKET_LINK}{inode}]"
    return [
        Holder(pid, read(proc / str(pid) / "comm").strip())
        for pid in pids(proc)
        if any(link == wanted for link in _links(proc / str(pid) / "fd"))
    ]


def pids(proc: Path) -> list[int]:
    try:
        return sorted(int(name) for name in os.listdir(proc) if name.isdecimal())
    except OSError:
        return []


def _links(directory: Path) -> Iterator[str]:
    try:
        names = os.listdir(directory)
    except OSError:
        return
    for name in names:
        with contextlib.suppress(OSError):
            yield os.readlink(directory / name)


def owner(proc: Path, pid: int) -> tuple[int, list[int]] | None:
    """Effective user and all groups of a process."""
    uid, groups = None, []
    for line in read(proc / str(pid) / "status").splitlines():
        name, _, value = line.partition(":")
        if name == "Uid":
            uid = int(value.split()[1])
        elif name == "Gid":
            groups.append(int(value.split()[1]))
        elif name == "Groups":
            groups += [int(word) for word in value.split()]
    return None if uid is None else (uid, groups)


def arguments(proc: Path, pid: int) -> list[str]:
    """The command line of a process."""
    return read(proc / str(pid) / "cmdline").rstrip("\0").split("\0")


def interfaces(sys: Path) -> dict[str, dict[str, int]]:
    """The statistics of every network card but loopback."""
    found = {}
    net = sys / "class/net"
    try:
        names = sorted(os.listdir(net))
    except OSError:
        return {}
    for name in names:
        directory = net / name / "statistics"
        if name == "lo" or not directory.is_dir():
            continue
        values = {entry.name: read(entry).strip() for entry in directory.iterdir()}
        found[name] = {key: int(value) for key, value in values.items() if value.isdecimal()}
    return found
