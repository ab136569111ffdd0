"""Who holds a pidfile: a running daemon, or nobody any more.

A pid alone proves nothing, since numbers come back; so the process must also be a mpserverd. Making and removing the
file is python-daemon's job.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
from pathlib import Path

from mpserverd.errors import StartError

_PROGRAM = "mpserverd"
_BYTES_MAX = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Stale:
    """A pidfile that nobody holds. ``why`` completes "the pidfile ..."."""

    why: str


def examine(path: Path, proc: Path = Path("/proc")) -> Stale | int | None:
    """None without a file, the pid of the daemon that runs, or why the file is stale. Raises StartError."""
    try:
        with open(path, "rb") as file:
            text = file.read(_BYTES_MAX).strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StartError(f"cannot read the pidfile {path}: {error.strerror}") from error
    if not text.isdigit() or not 0 < int(text) < 1 << 31:
        return Stale("names no process")
    pid = int(text)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return Stale(f"named process {pid}, which is gone")
    except PermissionError:
        pass  # it lives and is somebody else's
    try:
        arguments = (proc / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return pid  # it lives and nobody may look: the safe answer
    if any(_is_program(os.path.basename(argument).decode(errors="replace")) for argument in arguments[:3]):
        return pid
    return Stale(f"named process {pid}, which is another program")


def _is_program(name: str) -> bool:
    return name == _PROGRAM or name.startswith(f"{_PROGRAM}.")


def lock_starts(path: Path) -> int:
    """Hold off other starts with the same pidfile: a descriptor that is to be closed once the file is written.

    The lock is one on the directory, and lasts until every copy of the descriptor is closed; so the daemon that writes
    the file inherits it. Raises StartError when somebody else holds it.
    """
    try:
        fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise StartError(f"cannot open {path.parent} for the pidfile: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise StartError(f"another start with the pidfile {path} is under way") from None
    return fd
