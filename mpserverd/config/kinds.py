"""Kinds of values: each checks one value of a configuration and says what it wants in words.

``parse`` takes what TOML gave and returns the value for the settings, or raises ``WrongValueError`` whose text is the
problem, the bound, and what to do. ``wants`` says the same bound for listings. Nothing is looked up here: no files, no
names, no clock.
"""

from __future__ import annotations

import dataclasses
import enum
import ipaddress
import math
import re
from collections.abc import Iterator
from typing import Any, Protocol

from mpserverd import limits
from mpserverd.config.faults import key_text, quoted, value_text

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_SIZE = re.compile(r"\s*([0-9]{1,20})\s*(B|KiB|MiB|GiB|TiB)\s*")
_SIZE_UNITS = {"B": 1, "KiB": limits.KIB, "MiB": limits.MIB, "GiB": limits.GIB, "TiB": limits.TIB}
_PORT_MAX = 65_535


_MAPPED_PREFIX = 96
"""Bits of ``::ffff:0:0`` before the IPv4 address."""


class WrongValueError(ValueError):
    """``problems``: the texts of one fault or more, without file and key."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; and ".join(problems))
        self.problems = problems


class Kind(Protocol):
    """What a value may be."""

    def parse(self, value: Any) -> Any: ...

    def wants(self) -> str: ...


def size_text(size_bytes: int) -> str:
    """The size in the largest unit that divides it: ``64 MiB``; a plain number below 1 KiB."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size_bytes and size_bytes % _SIZE_UNITS[unit] == 0:
            return f"{size_bytes // _SIZE_UNITS[unit]} {unit}"
    return str(size_bytes)


def number_text(number: float) -> str:
    return str(int(number)) if number == int(number) else str(number)


def _within(value: float, kind: Integer | Size | Number) -> bool:
    return kind.least <= value <= kind.most or (kind.zero != "" and value == 0)


@dataclasses.dataclass(frozen=True, slots=True)
class Integer:
    """``zero``: what 0 means, when 0 is allowed beside the range."""

    least: int
    most: int
    zero: str = ""

    def parse(self, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise WrongValueError(f"not a whole number; {self.wants()}")
        if not _within(value, self):
            raise WrongValueError(f"out of range; {self.wants()}")
        return value

    def wants(self) -> str:
        return f"{self.least} to {self.most}" + (f", or 0 = {self.zero}" if self.zero else "")


@dataclasses.dataclass(frozen=True, slots=True)
class Size:
    """A number of bytes: an integer, or text such as "64 MiB"."""

    least: int
    most: int
    zero: str = ""
    multiple_of: int = 1

    def parse(self, value: Any) -> int:
        if isinstance(value, str):
            match = _SIZE.fullmatch(value)
            if match is None:
                raise WrongValueError(f'not a size; write bytes, or text such as "64 MiB"; {self.wants()}')
            value = int(match[1]) * _SIZE_UNITS[match[2]]
        if isinstance(value, bool) or not isinstance(value, int):
            raise WrongValueError(f"not a whole number; {self.wants()}")
        size_bytes = value
        if not _within(size_bytes, self):
            raise WrongValueError(f"out of range; {self.wants()}")
        if size_bytes % self.multiple_of:
            below = size_bytes - size_bytes % self.multiple_of
            nearest = max(below, -(-self.least // self.multiple_of) * self.multiple_of)
            raise WrongValueError(f"not a multiple of {self.multiple_of}; write {nearest}")
        return size_bytes

    def wants(self) -> str:
        text = f"{size_text(self.least)} to {size_text(self.most)}"
        text += f", or 0 = {self.zero}" if self.zero else ""
        return text + (f", a multiple of {size_text(self.multiple_of)}" if self.multiple_of > 1 else "")


@dataclasses.dataclass(frozen=True, slots=True)
class Number:
    least: float
    most: float
    zero: str = ""

    def parse(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise WrongValueError(f"not a number; {self.wants()}")
        if isinstance(value, float) and not math.isfinite(value):
            raise WrongValueError(f"not a number; {self.wants()}")
        if not _within(value, self):
            raise WrongValueError(f"out of range; {self.wants()}")
        return float(value)

    def wants(self) -> str:
        return f"{number_text(self.least)} to {number_text(self.most)}" + (f", or 0 = {self.zero}" if self.zero else "")


@dataclasses.dataclass(frozen=True, slots=True)
class Flag:
    def parse(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise WrongValueError("neither true nor false; write it without quotes")
        return value

    def wants(self) -> str:
        return "true or false"


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """One word of an enum."""

    words: type[enum.StrEnum]

    def parse(self, value: Any) -> enum.StrEnum:
        if not isinstance(value, str) or value not in {str(word) for word in self.words}:
            raise WrongValueError(f"unknown word; write {self.wants()}")
        return self.words(value)

    def wants(self) -> str:
        return " or ".join(f'"{word}"' for word in self.words)


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    """``pattern`` must match all of it; ``shape`` is the same in words. ``empty``: what "" means, where it may be."""

    pattern: str
    shape: str
    bytes_max: int
    empty: str = ""

    def parse(self, value: Any) -> str:
        if not isinstance(value, str):
            raise WrongValueError(f"not a text; {self.wants()}")
        if value == "" and self.empty:
            return value
        if len(value.encode(errors="replace")) > self.bytes_max:
            raise WrongValueError(f"{len(value.encode(errors='replace'))} bytes long; at most {self.bytes_max}")
        if re.fullmatch(self.pattern, value) is None:
            raise WrongValueError(f"has a form that is not allowed; {self.wants()}")
        return value

    def wants(self) -> str:
        return f"{self.shape}, at most {self.bytes_max} bytes" + (f', or "" = {self.empty}' if self.empty else "")


@dataclasses.dataclass(frozen=True, slots=True)
class AbsolutePath:
    """The daemon's working directory is no promise, so a path begins with a slash."""

    bytes_max: int = limits.PATH_BYTES_MAX

    def parse(self, value: Any) -> str:
        if not isinstance(value, str):
            raise WrongValueError("not a text; write a path that begins with /")
        if not value.startswith("/") or "\0" in value:
            raise WrongValueError("not an absolute path; write a path that begins with /")
        if len(value.encode(errors="replace")) > self.bytes_max:
            raise WrongValueError(f"{len(value.encode(errors='replace'))} bytes long; at most {self.bytes_max}")
        return value

    def wants(self) -> str:
        return "a path that begins with /" + (f", at most {self.bytes_max} bytes" if self.bytes_max < 4000 else "")


@dataclasses.dataclass(frozen=True, slots=True)
class Endpoint:
    """``1.2.3.4:8888`` or ``[2001:db8::1]:8888``; port 0 lets the kernel choose."""

    def parse(self, value: Any) -> str:
        if not isinstance(value, str):
            raise WrongValueError(f"not a text; write {self.wants()}")
        host, port = split_endpoint(value)
        return f"[{host}]:{port}" if host.version == 6 else f"{host}:{port}"

    def wants(self) -> str:
        return 'ADDRESS:PORT, such as "0.0.0.0:8888" or "[::]:8888"'


def split_endpoint(text: str) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]:
    """The address and port of ``text``. Raises WrongValueError."""
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > _PORT_MAX:
        raise WrongValueError(f"has no port from 0 to {_PORT_MAX}; write {Endpoint().wants()}")
    try:
        address = ipaddress.ip_address(host[1:-1] if bracketed else host)
    except ValueError:
        raise WrongValueError(f"has no IP address (names are not looked up); write {Endpoint().wants()}") from None
    if bracketed != (address.version == 6):
        raise WrongValueError(f"IPv6 addresses stand in brackets, others do not; write {Endpoint().wants()}")
    return address, int(port)


def plain_network(network: Network) -> Network:
    """The IPv4 network for one written v4-mapped (``::ffff:192.0.2.0/120``), because peers are judged as IPv4 then."""
    if isinstance(network, ipaddress.IPv6Network) and network.prefixlen >= _MAPPED_PREFIX:
        mapped = network.network_address.ipv4_mapped
        if mapped is not None:
            return ipaddress.IPv4Network((mapped, network.prefixlen - _MAPPED_PREFIX))
    return network


@dataclasses.dataclass(frozen=True, slots=True)
class AddressOrNetwork:
    def parse(self, value: Any) -> Network:
        if not isinstance(value, str):
            raise WrongValueError(f"not a text; write {self.wants()}")
        if "%" in value:
            raise WrongValueError("has a zone, which is not compared; leave out % and what follows")
        try:
            return plain_network(ipaddress.ip_network(value))
        except ValueError:
            pass
        try:
            network = ipaddress.ip_network(value, strict=False)
        except ValueError:
            raise WrongValueError(f"neither address nor network; write {self.wants()}") from None
        raise WrongValueError(f'has bits below its prefix; write "{network}", or the address alone')

    def wants(self) -> str:
        return 'an address or a network, such as "192.0.2.7", "10.0.0.0/8" or "fd00::/8"'


@dataclasses.dataclass(frozen=True, slots=True)
class ListOf:
    """A TOML array of one kind, without repeats; a tuple in the settings. Every wrong entry is a problem of its own."""

    item: Kind
    length_max: int
    empty: str = ""

    def parse(self, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise WrongValueError(f"not a list; write [{self.item.wants()}]")
        if not value and not self.empty:
            raise WrongValueError(f"empty; write at least one of {self.item.wants()}")
        problems = [f"{len(value)} entries; at most {self.length_max}"] if len(value) > self.length_max else []
        first_at: dict[Any, int] = {}
        for index, entry in enumerate(value[: self.length_max]):
            shown = f"entry {index} ({value_text(entry)})"
            try:
                parsed = self.item.parse(entry)
            except WrongValueError as wrong:
                problems.append(f"{shown}: {wrong}")
                continue
            if first_at.setdefault(parsed, index) != index:
                problems.append(f"{shown}: the same as entry {first_at[parsed]}; write it once")
        if problems:
            raise WrongValueError(*problems)
        return tuple(first_at)

    def wants(self) -> str:
        return f"a list of: {self.item.wants()}" + (f"; [] = {self.empty}" if self.empty else "")


_TYPE_CODE = re.compile(r"([<>|]?)([uif]|b|S|V)([1-9][0-9]{0,4})")
_CODE_BYTES = {"u": (1, 2, 4, 8), "i": (1, 2, 4, 8), "f": (2, 4, 8), "b": (1,)}


def type_code_bytes(code: str) -> int:
    """Size of a numpy type code. Raises WrongValueError for one that packets may not use."""
    match = _TYPE_CODE.fullmatch(code)
    if match is None:
        raise WrongValueError(f'{quoted(code)} is no type code; write one such as "<u8", ">i4", "<f8", "u1", "S8"')
    order, letter, size_bytes = match[1], match[2], int(match[3])
    if letter in _CODE_BYTES and size_bytes not in _CODE_BYTES[letter]:
        sizes = ", ".join(str(size) for size in _CODE_BYTES[letter])
        raise WrongValueError(f'"{code}" has a size that numpy lacks; {letter} takes {sizes} bytes')
    if letter in "uif" and size_bytes > 1 and order not in ("<", ">"):
        raise WrongValueError(f'"{code}" has no byte order; write "<{letter}{size_bytes}" or ">{letter}{size_bytes}"')
    return size_bytes


def type_code_shape(code: Any) -> tuple[str, int] | None:
    """Letter and bytes as far as a code tells them, also one that lacks its byte order; None where it does not."""
    match = _TYPE_CODE.fullmatch(code) if isinstance(code, str) else None
    if match is None or int(match[3]) not in _CODE_BYTES.get(match[2], (int(match[3]),)):
        return None
    return match[2], int(match[3])


@dataclasses.dataclass(frozen=True, slots=True)
class Fields:
    """Field names and numpy type codes, packed in the order in which they stand."""

    def parse(self, value: Any) -> dict[str, str]:
        if not isinstance(value, dict) or not value:
            raise WrongValueError(f"not a table of fields; write {self.wants()}")
        if len(value) > limits.LAYOUT_FIELDS_MAX:
            raise WrongValueError(f"{len(value)} fields; at most {limits.LAYOUT_FIELDS_MAX}")
        problems = [problem for name, code in value.items() for problem in self._problems(name, code)]
        if problems:
            raise WrongValueError(*problems)
        return dict(value)

    def _problems(self, name: str, code: Any) -> Iterator[str]:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", name):
            yield f"field name {quoted(name)} is no identifier of at most 64 letters, digits and _"
        shown = key_text((name,))
        if not isinstance(code, str):
            yield f'the type of {shown} is not a text; write one such as "<u8"'
            return
        try:
            type_code_bytes(code)
        except WrongValueError as wrong:
            yield f"the type of {shown}: {wrong}"

    def wants(self) -> str:
        return 'names and numpy type codes in order, such as { sequence = "<u8", time = "<u8" }'
