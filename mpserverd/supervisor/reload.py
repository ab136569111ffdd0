"""A new configuration without a restart: take over what differs, then move every connection to fresh processes.

A configuration that is wrong, a listener or a log file that cannot be opened, changes nothing. What needs a restart is
kept as it was and named. Fresh workers start beside the old ones; when they are ready the old ones hand over their
connections, one by one and without a gap, and leave. The storer is replaced by itself: one writer at a time.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from mpserverd import log
from mpserverd.arena.counters import Role
from mpserverd.arena.state import Str, StreamState
from mpserverd.config.schema import Config
from mpserverd.errors import ConfigError, StartError
from mpserverd.net.channel import Kind
from mpserverd.supervisor.accepting import Accepting
from mpserverd.supervisor.child import Child
from mpserverd.supervisor.children import Children
from mpserverd.supervisor.connections import Connections
from mpserverd.supervisor.core import WORKER_SLOTS, Core
from mpserverd.supervisor.resources import check_spool
from mpserverd.supervisor.settings import effective
from mpserverd.supervisor.states import ChildState

logger = logging.getLogger(__name__)

STEP_INTERVAL_S = 0.05
FRESH_TIMEOUT_S = 20.0
"""Fresh workers that are not ready by then: go on with those that are, or give the move up if none is."""
STORER_TIMEOUT_S = 30.0
"""After that the reload is over, whatever an old storer does."""


class Reload:
    """One after the other: while processes are being replaced a command is refused, and a signal is remembered."""

    def __init__(
        self,
        core: Core,
        children: Children,
        connections: Connections,
        accepting: Accepting,
        read_config: Callable[[], Config],
    ) -> None:
        self._core = core
        self._children = children
        self._connections = connections
        self._accepting = accepting
        self._read_config = read_config
        self._fresh: list[Child] = []
        self._old: list[Child] = []
        self._since_s = 0.0
        self._again = False
        self.last_error = ""
        """Why the last one was refused, on one line; "" when it was not."""
        self.on_news: Callable[[], None] = _nothing
        """Called when ``last_error`` or ``progress`` may have changed."""

    @property
    def under_way(self) -> bool:
        return bool(self._fresh or self._old)

    @property
    def progress(self) -> str:
        """For people; empty when nothing is under way."""
        if self._fresh:
            return f"reloading: {len(self._fresh)} fresh workers start"
        return f"reloading: {len(self._old)} old processes hand over" if self._old else ""

    def request(self) -> dict[str, Any]:
        """Reload, and say what came of it. Raises ConfigError or StartError; then nothing has changed."""
        if self._core.stopping:
            raise StartError("the daemon stops")
        if self.under_way:
            raise StartError("a reload is under way; try again when the old processes have left")
        try:
            config, kept, targets, changed = self._prepare()
        except (ConfigError, StartError) as error:
            self._refused(error)
            raise
        changed += self._take_over(config, targets)
        self._accepting.on_change()
        for key in kept:
            log.event(
                logger, logging.WARNING, "needs a restart", message_id=log.MessageId.SETTING_NEEDS_RESTART, key=key
            )
        self._core.count("reloads")
        self._core.note(
            logger,
            logging.INFO,
            "configuration reloaded",
            message_id=log.MessageId.RELOAD_DONE,
            changed="; ".join(changed) or "nothing",
            needs_restart=", ".join(kept) or "nothing",
        )
        self.last_error = ""
        self._replace_processes()
        return {"changed": changed, "needs_restart": kept}

    def _prepare(self) -> tuple[Config, list[str], log.Prepared, list[str]]:
        """Everything that can fail. The listeners come last: once they are taken over, nothing fails any more."""
        config, kept = effective(self._core.config, self._read(), self._core.clients_max)
        check_spool(config)
        self._check_places(config.server.workers)
        targets = log.prepare(config.log, process="supervisor")
        try:
            return config, kept, targets, self._accepting.change(config)
        except StartError:
            targets.close()
            raise
        except OSError as error:
            targets.close()
            raise StartError(f"the listeners cannot be changed: {error}") from error

    def _check_places(self, count: int) -> None:
        """Fresh workers start beside the old ones, and beside those that hang in the kernel."""
        here = sum(child.state is not ChildState.GIVEN_UP for child in self._children.workers())
        if here + count > WORKER_SLOTS:
            raise StartError(
                f"{count} fresh workers find no place: {here} of {WORKER_SLOTS} are taken until old ones have left; "
                "lower server.workers, or restart"
            )

    def _read(self) -> Config:
        """Read the new configuration. Whatever goes wrong there is no reason to end the daemon: raises ConfigError."""
        try:
            return self._read_config()
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError([f"the configuration cannot be read: {type(error).__name__}: {error}"]) from error

    def _refused(self, error: ConfigError | StartError) -> None:
        self.last_error = str(error).replace("\n", "; ")
        self.on_news()
        self._core.count("reloads_refused")
        self._core.note(
            logger,
            logging.ERROR,
            "reload refused",
            message_id=log.MessageId.RELOAD_REFUSED,
            error=self.last_error,
            goes_on="with the configuration in use",
        )

    def _take_over(self, config: Config, targets: log.Prepared) -> list[str]:
        core = self._core
        changed = [
            f"{section}.{field.name}"
            for section in ("server", "spool", "log")
            for field in dataclasses.fields(getattr(config, section))
            if getattr(getattr(config, section), field.name) != getattr(getattr(core.config, section), field.name)
        ]
        if config.clients != core.config.clients:
            changed.append("clients")
        core.config = config
        core.max_clients = min(config.server.max_clients, core.clients_max)
        self._connections.use_clients()
        core.log_level = ""
        log.install(targets)
        self._children.broadcast(Kind.LOG_LEVEL, {"level": config.log.level})
        self._forget_unused_listeners()
        return changed

    def _forget_unused_listeners(self) -> None:
        """Settings of closed listeners are needed as long as a row names them."""
        streams = self._core.state.streams
        used = set(np.unique(streams[streams[:, Str.STATE] != StreamState.FREE, Str.LISTENER]).tolist())
        used |= {listener.id for listener in self._accepting.listeners()}
        used |= {connection.listener for connection in self._connections.all()}
        for number in [number for number in self._core.listeners if number not in used]:
            del self._core.listeners[number]

    # -- fresh processes

    def _replace_processes(self) -> None:
        children = self._children
        for child in [child for child in children.workers() if child.state is ChildState.GIVEN_UP]:
            children.forget(child)
        self._old = children.workers()
        self._fresh = [children.add_worker(index) for index in range(self._core.config.server.workers)]
        for child in self._fresh:
            children.fork(child)
        self._since_s = time.monotonic()
        self._step()

    def _step(self) -> None:
        if self._core.stopping:
            self._fresh, self._old = [], []
            return
        if self._fresh:
            self._await_fresh()
        elif self._old:
            self._await_old()
        self.on_news()
        if self.under_way:
            self._core.loop.after(STEP_INTERVAL_S, self._step)
        elif self._again:
            self._again = False
            self.request_quietly()

    def request_quietly(self) -> None:
        """For signals: what is wrong has been logged, and one that comes too early is taken up later."""
        if self.under_way:
            self._again = True
            return
        try:
            self.request()
        except (ConfigError, StartError):
            return

    def _await_fresh(self) -> None:
        ready = [child for child in self._fresh if child.state is ChildState.RUNNING]
        late = time.monotonic() - self._since_s > FRESH_TIMEOUT_S
        if len(ready) == len(self._fresh) or (late and ready):
            self._fresh = []
            self._since_s = time.monotonic()
            for child in self._old:
                self._children.tell_to_stop(child, Kind.DETACH_ALL)
            storer = self._children.storer()
            if storer is not None:
                self._children.tell_to_stop(storer, Kind.DETACH_ALL)
                self._old.append(storer)
            self._release_listeners()
        elif late:
            self._core.note(
                logger,
                logging.ERROR,
                "fresh workers do not start",
                goes_on="with the old ones, which cannot serve listeners that are new; they wait for the next reload",
            )
            for child in self._fresh:
                child.wanted = False
                if child.state.alive:
                    self._children.kill(child, "the reload was given up")
                elif child.state is ChildState.GIVEN_UP:
                    self._children.forget(child)
                else:
                    self._children.tell_to_stop(child, Kind.DETACH_ALL)
            self._fresh, self._old = [], []

    def _await_old(self) -> None:
        """Gone ones leave the list; those that take too long are killed, and what they own is adopted."""
        waited_s = time.monotonic() - self._since_s
        self._old = [child for child in self._old if self._is_waited_for(child, waited_s)]
        self._release_listeners()
        retire_s = self._core.config.server.reload_timeout_s
        for child in self._old:
            if child.role is Role.WORKER and waited_s > retire_s and child.state is ChildState.STOPPING:
                self._children.kill(child, f"did not hand over within {retire_s:g} s")
        if not self._old:
            log.event(logger, logging.INFO, "processes replaced", workers=len(self._children.workers()))

    def _release_listeners(self) -> None:
        """Old workers get no newcomers any more; an old storer would open streams of a layout that it does not know."""
        if not any(child.role is Role.STORER for child in self._old):
            self._accepting.release()

    def _is_waited_for(self, child: Child, waited_s: float) -> bool:
        """A storer that writes to a slow disk is never killed; the next one starts when it has left."""
        if child not in list(self._children) or child.state is ChildState.STUCK:
            return False
        if child.state is ChildState.GIVEN_UP:
            self._children.forget(child)
            return False
        if child.role is Role.STORER and waited_s > STORER_TIMEOUT_S:
            self._core.note(logger, logging.WARNING, "storer takes long to leave", pid=child.pid, then="it is replaced")
            return False
        return True


def _nothing() -> None:
    """Nobody wants to know."""
