"""Tells systemd how the daemon is: ready, stopping, alive. Without NOTIFY_SOCKET every call does nothing.

Only the main process may call this (``NotifyAccess=main``). Nothing blocks: a message that cannot leave now is dropped
and the call answers False, so that the caller may say it again at its next turn.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping

import sdnotify

from mpserverd.log_text import escaped

EXTEND_S = 10.0
_STATUS_CHARACTERS_MAX = 1_000
_WATCHDOG_SHARE = 0.5
"""systemd kills after WATCHDOG_USEC without a sign; its manual says to give one at half of that."""


class Notifier:
    """One connection to NOTIFY_SOCKET. After a fork the child calls ``abandon``, before it closes what it inherited."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._environ = environ
        self._notifier: sdnotify.SystemdNotifier | None = None
        if not environ.get("NOTIFY_SOCKET"):
            return
        with warnings.catch_warnings():
            # When it cannot connect the library drops its socket without closing it.
            warnings.simplefilter("ignore", ResourceWarning)
            try:
                self._notifier = sdnotify.SystemdNotifier(debug=True)
            except OSError:
                return
        self._notifier.socket.setblocking(False)

    def ready(self, status: str) -> bool:
        return self._send(f"READY=1\n{_status(status)}")

    def status(self, text: str) -> bool:
        return self._send(_status(text))

    def progress(self, text: str) -> bool:
        """What a start or a stop is at. Say it again within EXTEND_S: meanwhile systemd does not call it too late, be
        TimeoutStartSec and TimeoutStopSec as they may; how long it may take is the daemon's own to limit."""
        return self._send(f"{_status(text)}\nEXTEND_TIMEOUT_USEC={int(EXTEND_S * 1e6)}")

    def reloading(self) -> bool:
        """Follow it with ``ready``, also when the reload was refused."""
        return self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> bool:
        return self._send("STOPPING=1")

    def watchdog(self) -> bool:
        return self._send("WATCHDOG=1")

    def watchdog_interval_s(self) -> float | None:
        """How often to call ``watchdog``, or None when systemd does not ask this process for it."""
        microseconds = self._environ.get("WATCHDOG_USEC", "")
        pid = self._environ.get("WATCHDOG_PID", "")
        if not microseconds.isdecimal() or int(microseconds) == 0 or (pid and pid != str(os.getpid())):
            return None
        return int(microseconds) / 1e6 * _WATCHDOG_SHARE

    def fileno(self) -> int:
        """The socket's descriptor, -1 without one."""
        return -1 if self._notifier is None else int(self._notifier.socket.fileno())

    def close(self) -> None:
        if self._notifier is not None:
            self._notifier.socket.close()
            self._notifier = None

    def abandon(self) -> None:
        """Forget the descriptor without closing it: its number may already be another's."""
        if self._notifier is not None:
            self._notifier.socket.detach()
            self._notifier = None

    def _send(self, state: str) -> bool:
        """True when it left, or when nobody asked."""
        if self._notifier is None:
            return True
        try:
            self._notifier.notify(state)
        except OSError:
            return False
        return True


def _status(text: str) -> str:
    """One line of ASCII: the library encodes Latin-1, and a line break would begin another assignment."""
    line = escaped(text)[:_STATUS_CHARACTERS_MAX]
    return "STATUS=" + line.encode("ascii", "backslashreplace").decode()
