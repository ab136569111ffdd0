"""One thing that is wrong with a configuration, said as ``FILE: key.path = value: problem; bound; what to do``.

Pure. Values are cut and escaped, so that each fault is one line whatever a file contains.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Set
from typing import Any

KeyPath = tuple[str | int, ...]
"""Keys and array positions, such as ("listener", 0, "address")."""

ABSENT: Any = object()
"""In place of a value that is not there."""

_VALUE_CHARACTERS_MAX = 80
_DECIMAL_BITS_MAX = 512
"""Python refuses to write integers of thousands of digits in decimal; TOML can bring them as 0x…."""
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """``problem`` ends with what to do. ``involves``: other keys that it is about."""

    path: KeyPath
    problem: str
    value: Any = ABSENT
    involves: tuple[KeyPath, ...] = ()

    def touches(self, refused: Set[KeyPath]) -> bool:
        """Whether any of its keys was refused already, so that this fault may only be an echo."""
        return any(is_refused(path, refused) for path in (self.path, *self.involves))


def is_refused(path: KeyPath, refused: Set[KeyPath]) -> bool:
    """Whether the key or its table was refused. A section's own fault (too many tables) condemns no key."""
    return any(path[:length] in refused for length in range(min(2, len(path)), len(path) + 1))


def key_text(path: KeyPath) -> str:
    """``listener.0.address``; keys that are not bare are quoted."""
    return ".".join(str(part) if isinstance(part, int) or _BARE_KEY.fullmatch(part) else quoted(part) for part in path)


def quoted(text: str) -> str:
    """``text`` as a TOML string on one line, cut when long."""
    cut = text if len(text) <= _VALUE_CHARACTERS_MAX else text[: _VALUE_CHARACTERS_MAX - 3] + "..."
    return json.dumps(cut, ensure_ascii=not cut.isprintable())


def value_text(value: Any) -> str:
    """A value as TOML would write it, cut to one short line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, list):
        return _cut("[" + ", ".join(value_text(item) for item in value[:_VALUE_CHARACTERS_MAX]) + "]")
    if isinstance(value, dict):
        return _cut("{" + ", ".join(f"{key_text((key,))} = {value_text(item)}" for key, item in value.items()) + "}")
    if isinstance(value, int) and value.bit_length() > _DECIMAL_BITS_MAX:
        return _cut(hex(value))
    return _cut(str(value))


def _cut(text: str) -> str:
    return text if len(text) <= _VALUE_CHARACTERS_MAX else text[: _VALUE_CHARACTERS_MAX - 3] + "..."


def render(fault: Fault, origin: str) -> str:
    """The line that people read. ``origin`` is the file, or ``--set``."""
    key = key_text(fault.path)
    subject = key if fault.value is ABSENT else f"{key} = {value_text(fault.value)}"
    return f"{origin}: {subject}: {fault.problem}" if subject else f"{origin}: {fault.problem}"
