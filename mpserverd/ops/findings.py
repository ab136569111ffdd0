"""What a check of ``doctor`` says: how bad, what was found with both numbers, and what to type. Pure."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from mpserverd.errors import MpserverdError

if TYPE_CHECKING:
    from mpserverd.ops.site import Site


class Level(enum.StrEnum):
    """The values are the words that people see, the worst first."""

    FAULT = "fault"
    WARNING = "warning"
    NOTE = "note"
    OK = "ok"


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """``text`` has what was found beside what is wanted; ``command`` is what to type, "" where nothing is to be
    done."""

    level: Level
    text: str
    command: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """One row: ``look`` yields at least one finding. ``looks_at`` is one line for the manual."""

    name: str
    looks_at: str
    look: Callable[[Site], Iterable[Finding]]


def ok(text: str) -> Finding:
    return Finding(Level.OK, text)


def note(text: str, command: str = "") -> Finding:
    return Finding(Level.NOTE, text, command)


def warning(text: str, command: str = "") -> Finding:
    return Finding(Level.WARNING, text, command)


def fault(text: str, command: str = "") -> Finding:
    return Finding(Level.FAULT, text, command)


def report(site: Site, checks: Iterable[Check]) -> dict[str, Any]:
    """All findings of all checks, worst first; ``counts`` by level."""
    order = list(Level)
    found = [
        {"check": check.name, "level": finding.level.value, "text": finding.text, "command": finding.command}
        for check in checks
        for finding in _looked(site, check)
    ]
    found.sort(key=lambda finding: order.index(Level(finding["level"])))
    return {
        "schema_version": 1,
        "fine": not any(finding["level"] == Level.FAULT for finding in found),
        "counts": {level.value: sum(finding["level"] == level for finding in found) for level in Level},
        "findings": found,
    }


def _looked(site: Site, check: Check) -> Iterator[Finding]:
    """What the machine refuses to tell is said, and ends this check only."""
    try:
        yield from check.look(site)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        yield note(f"could not be looked at: {where}{error.strerror or error}")
    except MpserverdError as error:
        yield note(f"could not be looked at: {error}")
