"""A daemon of another version: the package copied, its shared memory laid out in another way, under another number.

Columns that are used one by one change places, rows grow, the chunk table's columns come in another order. What is used
as a block (holes, check records, counters) stays one.
"""

from __future__ import annotations

import pathlib
import shutil
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
_STATE = """

STATE_VERSION += 1
CONNECTION_WORDS += 8
STREAM_WORDS += 16
SLOT_WORDS += 8
NAME_BYTES += 64
for _holder, _swaps in (
    (Con, "COOKIE STREAM  STREAM_NUMBER FLAGS  OFFSET_AT_ATTACH ADOPTIONS  SOCKET_BYTES ERRNO"),
    (Str, "NUMBER PACKET_SIZE  FLAGS EPOCH  POSITION TRUNCATED  OFFERED SOCKET  LET_GO HANDSHAKE  DURABLE RETIRED"),
    (Slot, "PID RSS_BYTES  RECEIVED_BYTES CONNECTIONS"),
    (Head, "NEXT_NUMBER LEFT  CRASH_COUNT TOTAL_CONNECTIONS"),
):
    _names = _swaps.split()
    for _one, _other in zip(_names[::2], _names[1::2], strict=True):
        _at, _there = getattr(_holder, _one), getattr(_holder, _other)
        setattr(_holder, _one, _there)
        setattr(_holder, _other, _at)
"""


def daemon_of_another_layout(directory: pathlib.Path) -> list[str]:
    """Its command, to be followed by options."""
    package = directory / "other" / "mpserverd"
    shutil.copytree(ROOT / "mpserverd", package, ignore=shutil.ignore_patterns("__pycache__"))
    give_another_layout(package)
    program = f"import sys; sys.path.insert(0, {str(package.parent)!r}); "
    return [sys.executable, "-c", program + "from mpserverd.cli.daemon import main; sys.exit(main())"]


def give_another_layout(package: pathlib.Path) -> None:
    """Change the files of this copy of the package."""
    with (package / "arena/state.py").open("a") as state:
        state.write(_STATE)
    _replace(package / "arena/chunks.py", "TABLE_VERSION = 1", "TABLE_VERSION = 2")
    _replace(package / "arena/chunks.py", "for i in range(4)]", "for i in (2, 0, 3, 1)]")
    _replace(
        package / "arena/layouts.py",
        'CHUNK_COLUMNS = ("words", "bases", "firsts", "serials")',
        'CHUNK_COLUMNS = ("bases", "serials", "words", "firsts")',
    )


def _replace(path: pathlib.Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{path} has {old!r} {text.count(old)} times"
    path.write_text(text.replace(old, new))
