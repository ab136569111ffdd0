"""What the directory of a stream says about itself, so that a catalog can be rebuilt from files alone.

``stream.json`` is one JSON object: whose packets these are. It is written with the directory, durable before the first
position is committed, and never changed. ``<first>.holes`` beside a segment has 24 bytes for each hole that reaches
into it (first u64, end u64, kind u64, little endian), durable before the position that passes it. An entry may be
there twice, and the last ones may be ahead of the catalog, as in the time index.

Format and reading only; the storer writes them (storer/sidecar.py).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from struct import Struct

from mpserverd.limits import PACKET_BYTES_MAX, STREAM_NAME_BYTES_MAX

IDENTITY_FILE = "stream.json"
RETIRED_FILE = "stream.retired"
"""What the identity is called when retention gave up all of the stream: such a directory is about to go."""
IDENTITY_VERSION = 1
IDENTITY_BYTES_MAX = 1 << 20
HOLE_ENTRY = Struct("<QQQ")
HOLE_KINDS = ("dropped", "lost")
OFFSET_MAX = 2**63 - 1
_EPOCH = re.compile(r"[0-9a-f]{16}")

HoleRow = tuple[int, int, str]
"""(first, end, kind)."""


@dataclass(frozen=True)
class Identity:
    """Whose packets lie in a directory. ``start`` is where its files began, ``number`` the id in the catalog."""

    number: int
    name: str
    epoch: str
    packet_size: int
    layout: str | None
    named: bool
    created_unix_ns: int
    start: int

    def encode(self) -> bytes:
        return json.dumps({"version": IDENTITY_VERSION, **asdict(self)}).encode() + b"\n"


def decode(content: bytes) -> Identity:
    """Raises ValueError, with the reason, for anything that this version did not write."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    if found.pop("version", None) != IDENTITY_VERSION:
        raise ValueError(f"it is not of version {IDENTITY_VERSION}")
    try:
        identity = Identity(**{key: found[key] for key in Identity.__dataclass_fields__})
    except KeyError as error:
        raise ValueError(f"it has no {error.args[0]}") from None
    _check(identity)
    return identity


def _check(identity: Identity) -> None:
    numbers = (identity.number, identity.packet_size, identity.created_unix_ns, identity.start)
    if any(type(value) is not int or not 0 <= value <= OFFSET_MAX for value in numbers):
        raise ValueError("a number of it makes no sense")
    if not 1 <= identity.packet_size <= PACKET_BYTES_MAX:
        raise ValueError(f"packets of {identity.packet_size} bytes make no sense")
    if type(identity.name) is not str or not 1 <= len(identity.name.encode(errors="replace")) <= STREAM_NAME_BYTES_MAX:
        raise ValueError("its name makes no sense")
    if type(identity.epoch) is not str or not _EPOCH.fullmatch(identity.epoch):
        raise ValueError("its epoch makes no sense")
    if type(identity.named) is not bool or not (identity.layout is None or type(identity.layout) is str):
        raise ValueError("its kind or layout makes no sense")


def read_identity(directory: Path) -> Identity | None:
    """None where there is none. Raises ValueError for one that makes no sense, OSError for one that cannot be read."""
    try:
        with (directory / IDENTITY_FILE).open("rb") as file:
            return decode(file.read(IDENTITY_BYTES_MAX))
    except FileNotFoundError:
        return None


# -- holes


def holes_name(first: int) -> str:
    return f"{first:020d}.holes"


def encode_holes(holes: Iterable[tuple[int, int, int]]) -> bytes:
    """``kind`` is an index into HOLE_KINDS."""
    return b"".join(HOLE_ENTRY.pack(first, end, kind) for first, end, kind in holes)


def decode_holes(content: bytes) -> list[HoleRow]:
    """In order of their offsets, each once. Raises ValueError for what is no hole; a torn last entry is passed over."""
    found: dict[int, HoleRow] = {}
    for at in range(0, len(content) - len(content) % HOLE_ENTRY.size, HOLE_ENTRY.size):
        first, end, kind = HOLE_ENTRY.unpack_from(content, at)
        if not (first < end <= OFFSET_MAX and kind < len(HOLE_KINDS)):
            raise ValueError(f"entry {at // HOLE_ENTRY.size} is no hole")
        known = found.get(first)
        if known is None or known[1] < end:
            found[first] = (first, end, HOLE_KINDS[kind])
    return [found[first] for first in sorted(found)]


def read_holes(directory: Path, first: int) -> list[HoleRow]:
    """The holes that reach into a segment; none where there is no such file. Raises ValueError, OSError."""
    try:
        content = (directory / holes_name(first)).read_bytes()
    except FileNotFoundError:
        return []
    return decode_holes(content)


def is_stream_directory(path: str) -> bool:
    """Whether a directory has what only a stream's has: its identity, or a segment."""
    try:
        with os.scandir(path) as entries:
            return any(entry.name == IDENTITY_FILE or entry.name.endswith(".seg") for entry in entries)
    except OSError:
        return False


def is_lost_and_found(path: str) -> bool:
    """What ext4 makes where streams have a file system of their own. The directory of a stream of that name is none."""
    return os.path.basename(path) == "lost+found" and not is_stream_directory(path)
