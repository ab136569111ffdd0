"""What one run of ``mpload`` is to do, checked, and how it is divided over processes. Pure.

It opens nothing and resolves no names.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import itertools
import re
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any

from mpserverd.client.packets import count_for_bytes
from mpserverd.errors import UsageError
from mpserverd.limits import CLIENT_ID_BYTES_MAX, CLIENT_ID_PATTERN

FLAT_OUT_BLOCK_BYTES = 1 << 20
"""Measured: at 1 MiB a call the sender spends 0.8 of its time in the kernel's copy; at 64 KiB half of it elsewhere."""
FLAT_OUT_BYTES_MAX = 64 << 20
"""What the blocks of one process may take together."""
PACED_BATCH = 804
SOURCE_ADDRESSES_MAX = 4096
PROTOCOLS = ("raw", "mps")

ResolvedAddress = tuple[int, tuple[Any, ...]]
"""Address family and what connect() takes."""


@dataclasses.dataclass(frozen=True)
class Scenario:
    """Options of ``mpload run`` that the senders need. ``rate`` 0: flat out. ``batch`` 0: the default of the mode."""

    targets: tuple[ResolvedAddress, ...]
    protocol: str = "raw"
    client_prefix: str | None = None
    clients: int = 10
    rate: Fraction = Fraction(10_050)
    packet_size: int = 16
    batch: int = 0
    duration_s: float | None = 30.0
    packets: int | None = None
    source_addresses: tuple[str, ...] = ()
    seed: int = 1
    hashing: bool = False
    send_buffer_bytes: int = 131_072
    connect_timeout_s: float = 5.0
    drain_timeout_s: float = 5.0
    close_timeout_s: float = 10.0

    def __post_init__(self) -> None:
        if self.packets is None and self.duration_s is None:
            raise UsageError("neither a duration nor a number of packets: the run would have no end")
        longest = self.client_id(self.clients - 1)
        if not re.fullmatch(CLIENT_ID_PATTERN, longest) or len(longest) > CLIENT_ID_BYTES_MAX:
            raise UsageError(
                f"client id {longest[:80]!r}: at most {CLIENT_ID_BYTES_MAX} letters, digits, dots, dashes and _, "
                "the first a letter or digit"
            )

    def client_id(self, client: int) -> str:
        """What an mps client calls itself: the same in every run with this seed."""
        prefix = f"mpload-{self.seed}" if self.client_prefix is None else self.client_prefix
        return f"{prefix}-{client}"

    @cached_property
    def flat_out(self) -> bool:
        return self.rate == 0

    @cached_property
    def packets_per_client(self) -> int | None:
        """What each client is to send; None: as much as it can until the time is over."""
        if self.flat_out or self.duration_s is None:
            return self.packets
        timed = round(self.rate * Fraction(self.duration_s))
        return timed if self.packets is None else min(timed, self.packets)

    @cached_property
    def phase_step(self) -> Fraction:
        """Nanoseconds between the first batches of two neighbours, so that all clients fill one batch's time evenly."""
        if self.flat_out:
            return Fraction(0)
        return Fraction(self.batch_packets(1) * 1_000_000_000) / self.rate / self.clients

    def batch_packets(self, clients_in_process: int) -> int:
        """Packets a batch; flat out by default as many as fit a block."""
        if self.batch:
            return self.batch
        if not self.flat_out:
            return PACED_BATCH
        return count_for_bytes(self.packet_size, min(FLAT_OUT_BLOCK_BYTES, FLAT_OUT_BYTES_MAX // clients_in_process))

    def source_address(self, client: int) -> str | None:
        return self.source_addresses[client % len(self.source_addresses)] if self.source_addresses else None


def split_clients(clients: int, processes: int) -> list[range]:
    """Which clients each process runs; sizes differ by one at most, none is empty."""
    count = max(1, min(clients, processes))
    edges = [clients * part // count for part in range(count + 1)]
    return [range(first, end) for first, end in itertools.pairwise(edges)]


def parse_source_addresses(text: str) -> tuple[str, ...]:
    """``127.0.0.1-127.0.0.9,10.0.0.1``: single addresses and ranges, ends included. Raises UsageError."""
    addresses: list[str] = []
    for part in text.split(","):
        first_text, dash, last_text = part.strip().partition("-")
        try:
            first = ipaddress.ip_address(first_text)
            last = ipaddress.ip_address(last_text) if dash else first
        except ValueError as error:
            raise UsageError(f"source addresses: {error}; write 127.0.0.1-127.0.0.9 or a,b,c") from None
        if first.version != last.version or int(first) > int(last):
            raise UsageError(f"source addresses: {part.strip()} is no range from a lower to a higher address")
        count = int(last) - int(first) + 1
        if len(addresses) + count > SOURCE_ADDRESSES_MAX:
            raise UsageError(f"source addresses: more than {SOURCE_ADDRESSES_MAX}")
        addresses += [str(first + step) for step in range(count)]
    return tuple(addresses)


def targets_as_text(targets: Sequence[ResolvedAddress]) -> str:
    return ", ".join(f"{address[0]} port {address[1]}" for _, address in targets)
