"""How an event becomes text: escaping, quoting, bounds, the journal's own format, and the limiter of repeats.

Pure: no clock, no files, no logging. What a peer chose may stand in any value, so no value can end a line, start a
field, or move a terminal's cursor.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Any

from mpserverd import limits

_SIMPLE_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\", '"': '\\"'}
_CUT = "..."


def escaped(text: str) -> str:
    """``text`` on one line: everything that is not printable becomes an escape (also what reorders text)."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else _SIMPLE_ESCAPES.get(character) or _code(character)
        for character in text
    )


def _code(character: str) -> str:
    number = ord(character)
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def _text_value(text: str) -> str:
    if len(text) > limits.LOG_VALUE_CHARACTERS_MAX:
        text = text[: limits.LOG_VALUE_CHARACTERS_MAX - len(_CUT)] + _CUT
    if text and text.isprintable() and not any(character in text for character in ' "=\\'):
        return text
    return '"' + escaped(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'


def plain_value(value: Any) -> str:
    """A value in words, not yet quoted. Reasons and states give the word that people read."""
    word = getattr(value, "word", None)
    if isinstance(word, str):
        return word
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value[: limits.LOG_VALUE_CHARACTERS_MAX]).decode("latin-1")
    if isinstance(value, (list, tuple, set, frozenset)):
        return ",".join(plain_value(item) for item in value)
    return str(value)


def event_text(text: str, fields: Mapping[str, Any]) -> str:
    """The constant text, then ``key=value`` for each field, as one line."""
    values = "".join(f" {key}={_text_value(plain_value(value))}" for key, value in fields.items())
    return escaped(text) + values


def cut(line: str, bytes_max: int) -> bytes:
    """``line`` in UTF-8, at most so many bytes, never ending inside a character."""
    encoded = line.encode(errors="backslashreplace")
    if len(encoded) <= bytes_max:
        return encoded
    whole = encoded[: bytes_max - len(_CUT)].decode(errors="ignore")
    return whole.encode() + _CUT.encode()


def lines_of(message: str, traceback: str | None) -> list[str]:
    """What one event prints: its line, and under it the last lines of a traceback, each escaped."""
    lines = [escaped(message)]
    if traceback:
        kept = traceback.splitlines()[-limits.LOG_TRACEBACK_LINES_MAX :]
        lines += [f"  | {escaped(line)}" for line in kept]
    return lines


def journal_entry(fields: Iterable[tuple[str, str]]) -> bytes:
    """A datagram for /run/systemd/journal/socket.

    Values on one line are ``KEY=value``; others carry their length as a little-endian u64 in front, as systemd's
    "Native Journal Protocol" says. Too long ones are cut: the datagram must stay below the socket's send buffer.
    """
    parts = []
    for key, value in fields:
        encoded = cut(value, 2 * limits.LOG_LINE_BYTES_MAX)
        if b"\n" in encoded:
            parts.append(key.encode() + b"\n" + struct.pack("<Q", len(encoded)) + encoded + b"\n")
        else:
            parts.append(key.encode() + b"=" + encoded + b"\n")
    return b"".join(parts)


_RESERVED = frozenset({"MESSAGE", "MESSAGE_ID", "PRIORITY", "SYSLOG_IDENTIFIER", "SYSLOG_PID", "ERRNO", "PROCESS"})


def journal_key(name: str) -> str:
    """A field's name in the journal: upper case; one that journald gives a meaning of its own gets a prefix."""
    key = "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in name.upper()).lstrip("_")
    if not key or key[0].isdigit() or key in _RESERVED or key.startswith(("CODE_", "OBJECT_", "COREDUMP_")):
        key = f"MPSERVERD_{key}"
    return key[:64]


class RateLimiter:
    """Lets ``burst`` events through in each interval, and says how many it held back.

    The interval begins with the first event in it. Time is monotonic seconds, given by the caller.
    """

    def __init__(self, interval_s: float, burst: int) -> None:
        if interval_s <= 0 or burst < 1:
            raise ValueError(f"interval of {interval_s} s with {burst} events; both must be positive")
        self._interval_s = interval_s
        self._burst = burst
        self._started_s = float("-inf")
        self._count = 0
        self._suppressed = 0

    def admit(self, now_s: float) -> int | None:
        """None: hold it back. Otherwise write it, with ``suppressed=N`` for the N > 0 held back before it."""
        if now_s - self._started_s >= self._interval_s:
            self._started_s, self._count = now_s, 0
        if self._count >= self._burst:
            self._suppressed += 1
            return None
        self._count += 1
        suppressed, self._suppressed = self._suppressed, 0
        return suppressed
