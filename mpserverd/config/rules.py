"""Rules between keys. Each yields faults; none reads anything but the settings that it is given.

What depends on the machine (memory, file descriptors, ports, permissions) is not judged here but at the start.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Set
from typing import Any

from mpserverd import limits
from mpserverd.config.faults import Fault, KeyPath, is_refused, key_text
from mpserverd.config.kinds import split_endpoint, type_code_shape
from mpserverd.config.schema import Config
from mpserverd.config.words import OnFull, Protocol


def check(config: Config, refused: Set[KeyPath] = frozenset()) -> Iterator[Fault]:
    """All broken rules. ``refused``: keys that hold a stand-in for a wrong value, which is compared with nothing."""
    yield from _arena_fits(config)
    yield from _segments_hold_chunks(config)
    yield from _spool_holds_a_segment(config)
    yield from _names_are_unique(config, refused)
    yield from _addresses_are_unique(config, refused)
    yield from _clients_are_unique(config, refused)
    yield from _protocols_keep_promises(config, refused)
    for layout in config.layouts.values():
        yield from layout_faults(layout.name, layout.size, layout.fields, layout.sequence, layout.time)


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


def _names_are_unique(config: Config, refused: Set[KeyPath]) -> Iterator[Fault]:
    seen: dict[str, int] = {}
    for index, listener in enumerate(config.listeners):
        if is_refused(("listener", index, "name"), refused):
            continue
        first = seen.setdefault(listener.name, index)
        if first != index:
            yield Fault(
                ("listener", index, "name"),
                f"listener.{first} has this name too; give each listener a name of its own",
                listener.name,
                (("listener", first, "name"),),
            )


def _addresses_are_unique(config: Config, refused: Set[KeyPath]) -> Iterator[Fault]:
    """One port of one address has one listener; the any-address takes a port of all addresses of its family."""
    seen: list[tuple[int, ipaddress.IPv4Address | ipaddress.IPv6Address, int]] = []
    for index, listener in enumerate(config.listeners):
        if is_refused(("listener", index, "address"), refused):
            continue
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


def _clients_are_unique(config: Config, refused: Set[KeyPath]) -> Iterator[Fault]:
    ids: dict[str, int] = {}
    networks: dict[object, int] = {}
    for index, client in enumerate(config.clients):
        path: KeyPath = ("client", index, "id")
        if not is_refused(path, refused) and (first := ids.setdefault(client.id, index)) != index:
            problem = f"client.{first} has this id too; give each client an id of its own"
            yield Fault(path, problem, client.id, (("client", first, "id"),))
        path = ("client", index, "address")
        if not is_refused(path, refused) and (first := networks.setdefault(client.address, index)) != index:
            problem = f"client.{first} has this address too; one address names one client"
            yield Fault(path, problem, str(client.address), (("client", first, "address"),))


def _protocols_keep_promises(config: Config, refused: Set[KeyPath]) -> Iterator[Fault]:
    """What is acknowledged is kept; what has no hello has a size."""
    for index, listener in enumerate(config.listeners):
        path: KeyPath = ("listener", index)
        protocol: KeyPath = (*path, "protocol")
        if is_refused(protocol, refused):
            continue
        if listener.protocol is Protocol.RAW and not listener.packet_size:
            yield Fault(
                (*path, "packet_size"), "raw has no hello that says it; write 1 or more, or use mps", 0, (protocol,)
            )
        if listener.protocol is not Protocol.MPS:
            continue
        if listener.on_full is OnFull.DROP_OLDEST:
            problem = 'mps promises to lose nothing; write "block", or use raw'
            yield Fault((*path, "on_full"), problem, str(listener.on_full), (protocol,))
        if not listener.store:
            problem = "mps acknowledges what is stored; write true, or use raw"
            yield Fault((*path, "store"), problem, listener.store, (protocol,))


def layout_faults(
    name: str, size: int | None, fields: Mapping[str, Any], sequence: str | None, time: str | None
) -> Iterator[Fault]:
    """What is wrong between the keys of one layout, as far as it can be known: types may be wrong, ``size`` None."""
    path = ("layout", name)
    yield from _size_faults(path, size, fields)
    for key, field, wanted in (
        ("sequence", sequence, "a whole number (u or i)"),
        ("time", time, "a whole number of 8 bytes (u8 or i8)"),
    ):
        if field is None:
            continue
        if field not in fields:
            names = ", ".join(key_text((name,)) for name in fields)
            yield Fault((*path, key), f"no such field; the fields are {names}", field, ((*path, "fields"),))
            continue
        shape = type_code_shape(fields[field])
        if shape is not None and (shape[0] not in "ui" or (key == "time" and shape[1] != 8)):
            problem = f'the field has type "{fields[field]}"; it must be {wanted}'
            yield Fault((*path, key), problem, field, ((*path, "fields"),))


def _size_faults(path: KeyPath, size: int | None, fields: Mapping[str, Any]) -> Iterator[Fault]:
    shapes = [type_code_shape(code) for code in fields.values()]
    least = sum(shape[1] if shape else 1 for shape in shapes)
    if size is None or size == least or (None in shapes and size > least):
        return
    if None in shapes:
        problem = f"its fields take at least {least} bytes; raise it, or mend the fields"
    else:
        problem = f"its fields take {least} bytes; write {least}, or mend the fields"
    yield Fault((*path, "size"), problem, size, ((*path, "fields"),))
