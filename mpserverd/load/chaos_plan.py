"""What one run of ``mpload chaos`` is to do, as a pure function of its options: clients, faults, the daemon's settings.

It opens nothing and knows no clock; the same seed makes the same plan.
"""

from __future__ import annotations

import dataclasses
import enum
import pathlib
import random
from collections.abc import Sequence
from typing import TypeVar

from mpserverd.limits import HEARTBEAT_TIMEOUT_S_MIN
from mpserverd.load.chaos_content import sequence_bytes

PACKET_SIZES = (16, 7, 24, 1500)
RATE_BYTES_MAX = 1 << 20
"""Paced clients send at most so much a second: 1,500 x 10,050 would fill a disk, and finds nothing more."""
FAULTS_PER_S = 2.0
WARM_UP_S = 0.3
HEARTBEAT_TIMEOUT_S = HEARTBEAT_TIMEOUT_S_MIN
WORKERS_MIN, WORKERS_MAX = 2, 4
SPARE_CLIENTS = 16
KIB, MIB = 1 << 10, 1 << 20

T = TypeVar("T")


class FaultKind(enum.Enum):
    """What is done to the daemon. The values are the words of ``--kill``."""

    WORKER = "worker"
    STORER = "storer"
    SUPERVISOR = "supervisor"
    STOP = "stop"
    RELOAD = "reload"
    RESTART = "restart"

    @property
    def needs_store(self) -> bool:
        """Only a daemon that stores its descriptors outlives this without its clients noticing."""
        return self in (FaultKind.SUPERVISOR, FaultKind.RESTART)


class Habit(enum.Enum):
    """How a client behaves."""

    STEADY = "steady"
    """One connection from the beginning to the end."""
    STALLING = "stalling"
    """The same, but at times it sends nothing for a while, often in the middle of a packet."""
    RETURNING = "returning"
    """Ends in order, and comes back."""
    TORN = "torn"
    """Ends after half a packet, and comes back."""
    RESETTING = "resetting"
    """Ends with a reset once the peer's kernel has everything, and comes back."""


@dataclasses.dataclass(frozen=True)
class ChaosOptions:
    """``rate`` is packets a second of each client, 0: flat out. ``faults`` None: two a second."""

    duration_s: float = 30.0
    seed: int = 1
    clients: int = 8
    rate: float = 10_050.0
    kinds: tuple[FaultKind, ...] = tuple(FaultKind)
    habits: tuple[Habit, ...] = tuple(Habit)
    faults: int | None = None

    @property
    def fault_count(self) -> int:
        return max(1, round(self.duration_s * FAULTS_PER_S)) if self.faults is None else self.faults


@dataclasses.dataclass(frozen=True)
class ClientPlan:
    """One client. ``named``: its address has a [[client]] table, so that all of its connections are one stream."""

    client: int
    address: str
    packet_size: int
    bytes_per_s: float
    habit: Habit
    named: bool

    @property
    def name(self) -> str:
        return f"chaos-{self.client}"


@dataclasses.dataclass(frozen=True)
class Fault:
    at_s: float
    kind: FaultKind


@dataclasses.dataclass(frozen=True)
class DaemonPlan:
    """Settings that differ from seed to seed, so that edges of chunks and segments lie elsewhere."""

    chunk_bytes: int
    segment_bytes: int
    arena_bytes: int
    commit_interval_s: float
    receive_buffer_bytes: int
    clients_max: int


def plan_clients(options: ChaosOptions) -> list[ClientPlan]:
    """Sizes and habits are dealt like cards: each as often as any other."""
    chance = random.Random(f"clients {options.seed}")
    habits = _dealt(list(options.habits), options.clients, chance)
    return [
        ClientPlan(
            client=number,
            address=f"127.1.{number // 250}.{number % 250 + 1}",
            packet_size=PACKET_SIZES[number % len(PACKET_SIZES)],
            bytes_per_s=min(options.rate * PACKET_SIZES[number % len(PACKET_SIZES)], RATE_BYTES_MAX),
            habit=habit,
            named=chance.random() < 0.5,
        )
        for number, habit in enumerate(habits)
    ]


def plan_faults(options: ChaosOptions, kinds: Sequence[FaultKind]) -> list[Fault]:
    """At random moments after the warm-up, each kind as often as any other."""
    if not kinds:
        return []
    chance = random.Random(f"faults {options.seed}")
    count = options.fault_count
    moments = sorted(chance.uniform(WARM_UP_S, max(WARM_UP_S, options.duration_s)) for _ in range(count))
    return [Fault(at_s, kind) for at_s, kind in zip(moments, _dealt(list(kinds), count, chance), strict=True)]


def _dealt(cards: list[T], count: int, chance: random.Random) -> list[T]:
    dealt: list[T] = []
    while len(dealt) < count:
        dealt += chance.sample(cards, len(cards))
    return dealt[:count]


def plan_daemon(options: ChaosOptions) -> DaemonPlan:
    chance = random.Random(f"daemon {options.seed}")
    chunk_bytes = chance.choice((4 * KIB, 16 * KIB, 64 * KIB))
    clients_max = 2 * options.clients + SPARE_CLIENTS
    return DaemonPlan(
        chunk_bytes=chunk_bytes,
        segment_bytes=chunk_bytes * chance.choice((16, 32, 64)),
        arena_bytes=max(4 * MIB, 8 * chunk_bytes * clients_max),
        commit_interval_s=chance.choice((0.005, 0.05, 0.1)),
        receive_buffer_bytes=chance.choice((8 * KIB, 32 * KIB, 128 * KIB)),
        clients_max=clients_max,
    )


def listener_name(packet_size: int) -> str:
    return f"size{packet_size}"


def config_text(plan: DaemonPlan, clients: Sequence[ClientPlan], directory: pathlib.Path, workers: int) -> str:
    """The daemon's configuration file. Ports are the kernel's choice."""
    parts = [
        f"""[server]
workers = {workers}
max_clients = {plan.clients_max}
control_socket = "{directory}/control.sock"
stop_timeout_s = 30.0
heartbeat_timeout_s = {HEARTBEAT_TIMEOUT_S}
restart_backoff_s_max = 0.1

[buffers]
bytes = {plan.arena_bytes}
chunk_bytes = {plan.chunk_bytes}

[spool]
path = "{directory}/spool"
segment_bytes = {max(plan.segment_bytes, 64 * KIB)}
commit_interval_s = {plan.commit_interval_s}
max_bytes = 0
min_free_bytes = 0

[log]
level = "info"
target = ["stderr"]
"""
    ]
    parts += [_listener_text(plan, size) for size in sorted({client.packet_size for client in clients})]
    parts += [f'[[client]]\nid = "{client.name}"\naddress = "{client.address}"\n' for client in clients if client.named]
    return "\n".join(parts)


def _listener_text(plan: DaemonPlan, packet_size: int) -> str:
    name, number = listener_name(packet_size), sequence_bytes(packet_size)
    return f"""[[listener]]
name = "{name}"
address = "127.0.0.1:0"
layout = "{name}"
on_full = "block"
receive_buffer_bytes = {plan.receive_buffer_bytes}
handshake_timeout_s = 0

[layout.{name}]
size = {packet_size}
fields = {{ sequence = "<u{number}", filler = "V{packet_size - number}" }}
sequence = "sequence"
"""
