"""The start until everybody who is waited for is ready, with its progress; then clients may be let in."""

from __future__ import annotations

import time
from collections.abc import Callable

from mpserverd.arena.counters import Role
from mpserverd.errors import StartError
from mpserverd.supervisor.child import Child
from mpserverd.supervisor.children import Children
from mpserverd.supervisor.core import Core
from mpserverd.supervisor.states import ChildState
from mpserverd.systemd import Notifier

START_DEATHS_MAX = 3
"""A worker that dies so often before it is ready will not start; nor will the daemon."""
READY_TIMEOUT_S = 60.0
STATUS_INTERVAL_S = 1.0


class AwaitingReady:
    """``awaited`` are the children without whom clients cannot be served; how others fare does not matter here."""

    def __init__(self, core: Core, children: Children, notifier: Notifier, awaited: Callable[[], list[Child]]) -> None:
        self._core = core
        self._children = children
        self._notifier = notifier
        self._awaited = awaited
        self._status_due_s = 0.0

    def run(self, is_ending: Callable[[], bool]) -> None:
        """Raises StartError when one of them cannot start. An end that is told meanwhile ends the wait."""
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while not is_ending() and (missing := self._missing()):
            self._core.loop.run_once()
            for child in self._missing():
                if child.restarts >= (1 if child.role is Role.STORER else START_DEATHS_MAX):
                    raise StartError(f"{child.name} cannot start: {child.last_words or 'see its lines above'}")
            storer = self._children.storer()
            recovering = storer is not None and storer.state is ChildState.STARTING
            if time.monotonic() > deadline_s and not recovering:
                raise StartError(f"not ready after {READY_TIMEOUT_S:.0f} s: {_names(missing)}")
            self._say_progress(missing)

    def _missing(self) -> list[Child]:
        return [child for child in self._awaited() if not child.was_ready]

    def _say_progress(self, missing: list[Child]) -> None:
        now_s = time.monotonic()
        if now_s >= self._status_due_s:
            self._status_due_s = now_s + STATUS_INTERVAL_S
            self._notifier.progress(f"starting: waits for {_names(missing)}")


def _names(children: list[Child]) -> str:
    return ", ".join(child.name for child in children)
