"""Rules between keys. Each yields faults; none reads anything but the settings that it is given.

What depends on the machine (memory, file descriptors, ports, permissions) is not judged here but at the start.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from mpserverd import limits
from mpserverd.config.faults import Fault
from mpserverd.config.kinds import split_endpoint, type_code_bytes
from mpserverd.config.schema import Config, LayoutConfig


def check(config: Config) -> Iterator[Fault]:
    """All broken rules."""
    yield from _arena_fits(config)
    yield from _segments_hold_chunks(config)
    yield from _spool_holds_a_segment(config)
    yield from _names_are_unique(config)
    yield from _addresses_are_unique(config)
    yield from _clients_are_unique(config)
    for layout in config.layouts.values():
        yield from _layout_adds_up(layout)


def arena_bytes_min(config: Config) -> int:
    """Least shared memory in which every connection has its share and every worker its reserve."""
    server = config.server
    chunks = limits.CHUNKS_PER_CONNECTION * server.max_clients + limits.CHUNKS_PER_WORKER * server.workers
    return chunks * config.buffers.chunk_bytes


def _arena_fits(config: Config) -> Iterator[Fault]:
    least = arena_bytes_min(config)
    if config.buffers.bytes < least:
        yield Fault(
            ("buffers", "bytes"),
            f"too little; {limits.CHUNKS_PER_CONNECTION} chunks a client and {limits.CHUNKS_PER_WORKER} a worker take "
            f"{least} bytes; raise it, or lower server.max_clients, server.workers or buffers.chunk_bytes",
            config.buffers.bytes,
            (("server", "max_clients"), ("server", "workers"), ("buffers", "chunk_bytes")),
        )


def _segments_hold_chunks(config: Config) -> Iterator[Fault]:
    segment, chunk = config.spool.segment_bytes, config.buffers.chunk_bytes
    if segment % chunk:
        fitting = max(segment - segment % chunk, chunk)
        yield Fault(
            ("spool", "segment_bytes"),
            f"not a multiple of buffers.chunk_bytes ({chunk}); write {fitting}",
            segment,
            (("buffers", "chunk_bytes"),),
        )


def _spool_holds_a_segment(config: Config) -> Iterator[Fault]:
    """Retention frees whole segments and never the one that is written, so a smaller limit could not be kept."""
    spool = config.spool
    bounds: list[tuple[tuple[str | int, ...], int]] = [
        (("spool", "max_bytes"), spool.max_bytes),
        (("spool", "max_bytes_per_stream"), spool.max_bytes_per_stream),
    ]
    bounds += [(("client", index, "max_spool_bytes"), one.max_spool_bytes) for index, one in enumerate(config.clients)]
    for path, size_bytes in bounds:
        if 0 < size_bytes < spool.segment_bytes:
            yield Fault(
                path,
                f"less than one segment ({spool.segment_bytes}); raise it or lower spool.segment_bytes",
                size_bytes,
                (("spool", "segment_bytes"),),
            )


def _names_are_unique(config: Config) -> Iterator[Fault]:
    seen: dict[str, int] = {}
    for index, listener in enumerate(config.listeners):
        first = seen.setdefault(listener.name, index)
        if first != index:
            yield Fault(
                ("listener", index, "name"),
                f"listener.{first} has this name too; give each listener a name of its own",
                listener.name,
                (("listener", first, "name"),),
            )


def _addresses_are_unique(config: Config) -> Iterator[Fault]:
    """One port of one address has one listener; the any-address takes a port of all addresses of its family."""
    seen: list[tuple[int, ipaddress.IPv4Address | ipaddress.IPv6Address, int]] = []
    for index, listener in enumerate(config.listeners):
        address, port = split_endpoint(listener.address)
        for first, other, other_port in seen:
            if port != other_port or port == 0 or address.version != other.version:
                continue
            if address == other or address.is_unspecified or other.is_unspecified:
                yield Fault(
                    ("listener", index, "address"),
                    f"listener.{first} already takes {config.listeners[first].address}; choose another port",
                    listener.address,
                    (("listener", first, "address"),),
                )
                break
        seen.append((index, address, port))


def _clients_are_unique(config: Config) -> Iterator[Fault]:
    ids: dict[str, int] = {}
    networks: dict[object, int] = {}
    for index, client in enumerate(config.clients):
        first = ids.setdefault(client.id, index)
        if first != index:
            yield Fault(
                ("client", index, "id"),
                f"client.{first} has this id too; give each client an id of its own",
                client.id,
                (("client", first, "id"),),
            )
        first = networks.setdefault(client.address, index)
        if first != index:
            yield Fault(
                ("client", index, "address"),
                f"client.{first} has this address too; one address names one client",
                str(client.address),
                (("client", first, "address"),),
            )


def _layout_adds_up(layout: LayoutConfig) -> Iterator[Fault]:
    path = ("layout", layout.name)
    fields = (*path, "fields")
    total = sum(type_code_bytes(code) for code in layout.fields.values())
    if total != layout.size:
        yield Fault(
            (*path, "size"), f"its fields take {total} bytes; write {total}, or mend the fields", layout.size, (fields,)
        )
    for key, name, wanted in (
        ("sequence", layout.sequence, "a whole number (u or i)"),
        ("time", layout.time, "a whole number of 8 bytes (u8 or i8)"),
    ):
        if name is None:
            continue
        code = layout.fields.get(name)
        if code is None:
            names = ", ".join(layout.fields)
            yield Fault((*path, key), f"no such field; the fields are {names}", name, (fields,))
        elif code.lstrip("<>|")[0] not in "ui" or (key == "time" and type_code_bytes(code) != 8):
            yield Fault((*path, key), f'the field has type "{code}"; it must be {wanted}', name, (fields,))
