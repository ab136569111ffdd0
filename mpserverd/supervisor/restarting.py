"""Does systemd end the unit for good, or to start it again at once? The daemon says goodbye in the first case only.

The job that systemd works on tells: ``restart`` for ``systemctl restart`` and package upgrades, ``stop`` for
``systemctl stop``, power-off and reboot (systemd 252; FileDescriptorStorePreserve, which would say it otherwise, needs
254). Where systemd does not answer it is taken for a stop, which loses nothing.

The unit's ``ExecStop=`` asks before anything is ended. But systemd leaves that out, and sends SIGTERM at once, while
the unit is being started or reloaded; so the supervisor asks again at SIGTERM, in a process of its own (``ask``).
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping

from mpserverd.supervisor.loop import READ, Loop

SYSTEMCTL_TIMEOUT_S = 5.0
ANSWER_S = 2.0
"""At a power-off the bus may be gone before the daemon is; so long a stop then waits for its answer."""
UNIT_VARIABLE = "MPSERVERD_UNIT"
"""The unit says its name there."""
_LIST_JOBS = ("systemctl", "list-jobs", "--no-legend", "--no-pager", "--full", "--plain")
_RESTARTS = frozenset({"restart", "try-restart"})


def is_restart(job_lines: str, unit: str) -> bool:
    """Whether a line of ``systemctl list-jobs`` (number, unit, type, state) says that ``unit`` is being restarted."""
    for line in job_lines.splitlines():
        words = line.split()
        if len(words) >= 3 and words[1] == unit:
            return words[2] in _RESTARTS
    return False


def is_restarting(unit: str) -> bool:
    """Blocks; for mpserverctl."""
    try:
        answer = subprocess.run(
            _LIST_JOBS,
            capture_output=True,
            text=True,
            timeout=SYSTEMCTL_TIMEOUT_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return is_restart(answer.stdout, unit)


def unit_name(environ: Mapping[str, str] = os.environ) -> str:
    """Empty where nobody can be asked."""
    return environ.get(UNIT_VARIABLE, "")


def ask(loop: Loop, unit: str, on_answer: Callable[[bool], None]) -> None:
    """Call ``on_answer`` once, from the loop, with whether the unit is being restarted. Does not block."""
    lines_fd = -1
    try:
        lines_fd = os.memfd_create("mpserverd-jobs", os.MFD_CLOEXEC)  # no pipe: nobody has to read it meanwhile
        process = subprocess.Popen(_LIST_JOBS, stdin=subprocess.DEVNULL, stdout=lines_fd, stderr=subprocess.DEVNULL)
    except OSError:
        if lines_fd >= 0:
            os.close(lines_fd)
        loop.after(0.0, lambda: on_answer(False))
        return
    pidfd = os.pidfd_open(process.pid)
    late = loop.after(ANSWER_S, process.kill)

    def ended(_: int) -> None:
        late.cancel()
        loop.unwatch(pidfd)
        os.close(pidfd)
        process.wait()
        with os.fdopen(lines_fd, "rb") as file:
            file.seek(0)
            text = file.read().decode(errors="replace")
        on_answer(process.returncode == 0 and is_restart(text, unit))

    loop.watch(pidfd, READ, ended)
