"""What the bytes of a packet mean: named fields, packed in order, as a numpy structured type.

Pure: no files, no clock. The configuration makes a layout, the worker checks packets by it, the catalog keeps it as
JSON beside the stream, and readers give it back as the type of their arrays. A packet may be longer than its fields;
the rest is carried along and has no name. Packets without a layout are *opaque*: one field-less block of bytes.

It does not look at packets; that is ``worker/checker.py`` and ``streams/``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from mpserverd.limits import LAYOUT_FIELDS_MAX, PACKET_BYTES_MAX

FIELD_NAME_CHARACTERS_MAX = 64
SEQUENCE_KINDS = "iu"
FIELD_SIZES: dict[str, tuple[int, ...] | None] = {
    "b": (1,),
    "i": (1, 2, 4, 8),
    "u": (1, 2, 4, 8),
    "f": (2, 4, 8),
    "S": None,
    "V": None,
}
"""numpy kinds a field may have, and their sizes in bytes; None: any. Objects, text and nested types are refused."""

FieldPairs = tuple[tuple[str, str], ...]


class LayoutSource(Protocol):
    """What ``from_config`` needs to find: the settings of one ``[layout.X]`` table."""

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def fields(self) -> Mapping[str, str] | Iterable[tuple[str, str]]: ...
    @property
    def sequence(self) -> str | None: ...
    @property
    def time(self) -> str | None: ...


@dataclass(frozen=True)
class PacketLayout:
    """One packet layout. Raises ValueError, with all faults, for one that makes no sense."""

    name: str
    size: int
    fields: FieldPairs = ()
    sequence: str | None = None
    time: str | None = None

    def __post_init__(self) -> None:
        found = faults(self.size, self.fields, self.sequence, self.time)
        if found:
            raise ValueError(f"packet layout {self.name!r}: " + "; ".join(found))

    @classmethod
    def opaque(cls, size: int) -> PacketLayout:
        """Packets of ``size`` bytes that nobody described."""
        return cls("", size)

    @classmethod
    def from_config(cls, config: LayoutSource) -> PacketLayout:
        return cls(config.name, config.size, field_pairs(config.fields), config.sequence or None, config.time or None)

    @classmethod
    def from_json(cls, text: str) -> PacketLayout:
        """The layout that ``to_json`` wrote. Raises ValueError for anything else."""
        try:
            found: dict[str, Any] = json.loads(text)
            pairs = field_pairs(found["fields"])
            return cls(found["name"], found["size"], pairs, found.get("sequence"), found.get("time"))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a packet layout: {text[:200]}") from error

    def to_json(self) -> str:
        return json.dumps(
            {
                "name": self.name,
                "size": self.size,
                "fields": dict(self.fields),
                "sequence": self.sequence,
                "time": self.time,
            }
        )

    @property
    def is_opaque(self) -> bool:
        return not self.fields

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """The numpy type of one packet; its itemsize is ``size``."""
        if self.is_opaque:
            return np.dtype(f"V{self.size}")
        names, formats, offsets, at = [], [], [], 0
        for name, code in self.fields:
            names.append(name)
            formats.append(code)
            offsets.append(at)
            at += np.dtype(code).itemsize
        return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": self.size})

    @cached_property
    def sequence_dtype(self) -> np.dtype[Any]:
        return self._field(self.sequence)[0]

    @cached_property
    def sequence_offset(self) -> int:
        """Bytes from the start of a packet to its sequence number."""
        return self._field(self.sequence)[1]

    @cached_property
    def time_dtype(self) -> np.dtype[Any]:
        return self._field(self.time)[0]

    @cached_property
    def time_offset(self) -> int:
        """Bytes from the start of a packet to its time."""
        return self._field(self.time)[1]

    def _field(self, name: str | None) -> tuple[np.dtype[Any], int]:
        table = self.dtype.fields
        if name is None or table is None:
            raise ValueError(f"packet layout {self.name!r} has no such field")
        found = table[name]
        return found[0], int(found[1])


def field_pairs(fields: Mapping[str, str] | Iterable[tuple[str, str]]) -> FieldPairs:
    """Fields in packet order, from a table or from pairs."""
    pairs = fields.items() if isinstance(fields, Mapping) else fields
    return tuple((name, code) for name, code in pairs)


def field_type(code: object) -> np.dtype[Any]:
    """The type of one field. Raises ValueError for what is no plain number or run of bytes."""
    if not isinstance(code, str):
        raise ValueError(f"type code {code!r} is not text; a numpy type code such as '<u8' is needed")
    try:
        kind = np.dtype(code)
    except (TypeError, ValueError, SyntaxError) as error:
        raise ValueError(
            f"{code!r} is not a numpy type code; one such as '<u8', '>i4', '<f4' or 'S8' is needed"
        ) from error
    sizes = FIELD_SIZES.get(kind.kind, ())
    plain = kind.fields is None and kind.subdtype is None and kind.itemsize > 0
    if not plain or (sizes is not None and kind.itemsize not in sizes):
        raise ValueError(f"{code!r} is not a plain number or a run of bytes")
    return kind


def faults(size: object, fields: FieldPairs, sequence: str | None, time: str | None) -> list[str]:
    """All that is wrong with a layout, a phrase each; empty when it is fine."""
    found: list[str] = []
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= PACKET_BYTES_MAX:
        return [f"size is {size!r}, it must be a number from 1 to {PACKET_BYTES_MAX}"]
    if len(fields) > LAYOUT_FIELDS_MAX:
        return [f"it has {len(fields)} fields, at most {LAYOUT_FIELDS_MAX} are possible"]
    kinds: dict[str, np.dtype[Any]] = {}
    for name, code in fields:
        if not _is_field_name(name):
            found.append(f"field name {name!r} must be 1 to {FIELD_NAME_CHARACTERS_MAX} printable characters")
        elif name in kinds:
            found.append(f"field {name!r} is there twice")
        try:
            kinds[name] = field_type(code)
        except ValueError as error:
            found.append(f"field {name!r}: {error}")
    used = sum(kind.itemsize for kind in kinds.values())
    if used > size:
        found.append(f"its fields take {used} bytes, size is {size}")
    if not found:
        found.extend(_role_faults(kinds, sequence, time))
    return found


def _is_field_name(name: object) -> bool:
    return isinstance(name, str) and 0 < len(name) <= FIELD_NAME_CHARACTERS_MAX and name.isprintable()


def _role_faults(kinds: Mapping[str, np.dtype[Any]], sequence: str | None, time: str | None) -> Iterable[str]:
    for role, name in (("sequence", sequence), ("time", time)):
        if name is None:
            continue
        if name not in kinds:
            yield f"{role} names the field {name!r}, which is not there"
        elif kinds[name].kind not in SEQUENCE_KINDS:
            yield f"{role} field {name!r} must be an integer"
        elif role == "time" and kinds[name].itemsize != 8:
            yield f"time field {name!r} must have 8 bytes (unix nanoseconds)"
