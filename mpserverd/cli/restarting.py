"""Does systemd end the unit for good, or to start it again at once? The daemon says goodbye in the first case only.

The job that systemd works on tells: ``restart`` for ``systemctl restart`` and package upgrades, ``stop`` for
``systemctl stop``, power-off and reboot (systemd 252; FileDescriptorStorePreserve, which would say it otherwise, needs
254). Where systemd does not answer it is taken for a stop, which loses nothing.
"""

from __future__ import annotations

import subprocess

SYSTEMCTL_TIMEOUT_S = 5.0
_RESTARTS = frozenset({"restart", "try-restart"})


def is_restart(job_lines: str, unit: str) -> bool:
    """Whether a line of ``systemctl list-jobs`` (number, unit, type, state) says that ``unit`` is being restarted."""
    for line in job_lines.splitlines():
        words = line.split()
        if len(words) >= 3 and words[1] == unit:
            return words[2] in _RESTARTS
    return False


def is_restarting(unit: str) -> bool:
    command = ["systemctl", "list-jobs", "--no-legend", "--no-pager", "--full", "--plain"]
    try:
        answer = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=SYSTEMCTL_TIMEOUT_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return is_restart(answer.stdout, unit)
