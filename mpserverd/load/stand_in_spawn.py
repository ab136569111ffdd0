"""Starts a service process the way a service manager does: descriptors from 3 on, LISTEN_* and a session of its own.

LISTEN_PID must be the pid of the program itself, which nobody knows before the fork: a shell sets it and becomes the
program. ``setpriv``, where there is one, makes the service die with the thread that started it.
"""

from __future__ import annotations

import fcntl
import os
import pathlib
import shutil
import signal
from collections.abc import Mapping, Sequence

FIRST_FD = 3
_SHELL = "/bin/sh"
_OURS = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID", "WATCHDOG_USEC", "NOTIFY_SOCKET")


def spawn(
    command: Sequence[str], environ: Mapping[str, str], *, names: Sequence[str], fds: Sequence[int], output: int
) -> tuple[int, int]:
    """Start ``command``; pid and pidfd. The descriptors stay open here too."""
    variables = {name: value for name, value in environ.items() if name not in _OURS or name == "NOTIFY_SOCKET"}
    exports = []
    if fds:
        variables |= {"LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": ":".join(names)}
        exports.append("LISTEN_PID=$$")
    if "WATCHDOG_USEC" in environ:
        variables["WATCHDOG_USEC"] = environ["WATCHDOG_USEC"]
        exports.append("WATCHDOG_PID=$$")
    script = "".join(f"export {each}; " for each in exports) + 'exec "$@"'
    # above all numbers that are written to, so that no dup2 runs over the source of a later one
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_FD + len(fds)) for fd in fds]
    actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = [
        (os.POSIX_SPAWN_DUP2, output, 1),
        (os.POSIX_SPAWN_DUP2, output, 2),
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        *((os.POSIX_SPAWN_DUP2, fd, FIRST_FD + place) for place, fd in enumerate(moved)),
    ]
    words = [*_dying_with_us(), _SHELL, "-c", script, "sh", *command]
    try:
        pid = os.posix_spawn(
            words[0],
            words,
            variables,
            file_actions=actions,
            setsid=True,
            setsigmask=(),
            setsigdef=(signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
        )
    finally:
        for fd in moved:
            os.close(fd)
    return pid, os.pidfd_open(pid)


def _dying_with_us() -> list[str]:
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL"] if setpriv else []


def reap(pid: int) -> int:
    """Of a process that has ended: its exit status, or minus the signal that ended it."""
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def session_pids(session: int) -> list[int]:
    """Processes of that session that run, from /proc; zombies left out."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, _, _, own = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue  # it has ended meanwhile
        if int(own) == session and state not in "ZX":
            found.append(int(entry.name))
    return found
