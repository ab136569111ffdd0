"""Plays systemd for one service process: notify socket, descriptor store, restart. Much faster than the real one.

    with StandIn([sys.executable, "-m", "mpserverd.cli.daemon", ...], directory=tmp) as unit:
        unit.kill(signal.SIGKILL)               # comes back after ``restart_delay_s``, with what it had stored
        unit.wait_ready(start=2)

What systemd 252 does with ``Type=notify, NotifyAccess=main, Restart=always, KillMode=process`` is done here: only the
main process is heard; a message is taken whole or not at all; BARRIER=1 closes its descriptor when everything before it
was taken; the store is handed to every start, and outlives every end but ``stop``. A message that came before the
process died is taken before its death is. A watchdog, when asked for, kills. ``systemctl list-jobs`` tells the service
what is done to it.

One thread does all of it; the methods are for other threads. The service gets a session of its own, by which what it
leaves behind is found at the end. It dies with this process. Nothing here knows what the service is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import select
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Self

from mpserverd.errors import StartError
from mpserverd.load.stand_in_jobs import Jobs
from mpserverd.load.stand_in_socket import Notification, NotifySocket
from mpserverd.load.stand_in_spawn import reap, session_pids, spawn
from mpserverd.load.stand_in_store import FdStore

READY_S = 60.0
FAILED_STARTS_MAX = 3
"""Deaths in a row without READY=1, and not by ``kill``, after which waiting for it is given up."""
IDLE_S = 1.0


@dataclasses.dataclass(frozen=True)
class UnitSettings:
    """What a unit file would say. ``restart_signal`` is what ``restart`` sends; with ``SIGTERM`` it is as systemd
    restarts a unit that starts or reloads, or whose ``ExecStop=`` did not end it."""

    name: str = "stand-in.service"
    store_max: int = 256
    restart_delay_s: float = 0.1
    restart_signal: int = signal.SIGTERM
    stop_timeout_s: float = 30.0
    watchdog_s: float | None = None
    seed: int = 0


@dataclasses.dataclass
class UnitState:
    """What is so now; ``starts`` counts from 1. Read it under the lock, or accept that it moves on."""

    pid: int = 0
    starts: int = 0
    ready: bool = False
    stopping: bool = False
    status: str = ""
    deaths: int = 0
    deaths_before_ready: int = 0
    last_exit: int | None = None
    store_messages: int = 0
    barriers: int = 0
    watchdog_kills: int = 0


class StandIn:
    """Entering starts the service and waits until it is ready; leaving stops it and kills what is left of it."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        directory: pathlib.Path,
        settings: UnitSettings = UnitSettings(),
        environ: Mapping[str, str] = os.environ,
        output: int = 2,
        on_event: Callable[[str], None] = lambda text: None,
    ) -> None:
        """``directory`` is for the notify socket; ``output`` is where the service's own output goes."""
        self.command, self.settings, self.state = list(command), settings, UnitState()
        self._environ, self._output, self._on_event = dict(environ), output, on_event
        self._changed = threading.Condition()
        self._socket = NotifySocket(directory / "notify.sock")
        self._jobs = Jobs(directory / "stand-in", settings.name)
        self._store = FdStore(settings.store_max, settings.seed)
        self._pidfd = -1
        self._sessions: set[int] = set()
        self._start_due_s: float | None = None
        self._watchdog_due_s: float | None = None
        self._ending = ""
        self._killed = False
        self._over = False
        self._fault: BaseException | None = None
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        for fd in (self._wake_fd, self._socket.fileno(), self._store.fileno()):
            self._epoll.register(fd, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="stand-in", daemon=True)

    # -- for other threads

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        self._start_due_s = time.monotonic()
        self._thread.start()

    def wait_ready(self, deadline_s: float = READY_S, *, start: int = 1) -> int:
        """Wait for READY=1 of the ``start``-th start or a later one; its pid. Raises StartError."""
        until_s = time.monotonic() + deadline_s
        with self._changed:
            while not (self.state.ready and self.state.starts >= start):
                self._check_thread()
                if self.state.deaths_before_ready >= FAILED_STARTS_MAX or self._over:
                    raise StartError(f"the service does not start: exit status {self.state.last_exit}")
                left_s = until_s - time.monotonic()
                if left_s <= 0:
                    raise StartError(f"not ready after {deadline_s:g} s; it last said {self.state.status!r}")
                self._changed.wait(left_s)
            return self.state.pid

    def wait_for(self, condition: Callable[[UnitState], bool], deadline_s: float = READY_S) -> bool:
        """Whether the condition came true in time; looked at after every change."""
        with self._changed:
            return self._changed.wait_for(lambda: condition(self.state) or self._fault is not None, deadline_s)

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Signal the main process. Returns the number of the start that follows if it dies of it."""
        with self._changed:
            if self._pidfd >= 0:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, number)
                self._killed |= number == signal.SIGKILL
            return self.state.starts + 1

    def restart(self) -> int:
        """As ``systemctl restart``: end it with the restart signal, start it again at once, keep what is stored."""
        with self._changed:
            self._ending = "restart"
            self._jobs.show("restart")
            return self.kill(self.settings.restart_signal)

    def stop(self) -> int | None:
        """As ``systemctl stop``: SIGTERM, SIGKILL after the timeout; then the store is dropped. The exit status."""
        with self._changed:
            self._ending = "stop"
            self._jobs.show("stop")
            self._start_due_s = None
            self.kill(signal.SIGTERM)
        if not self.wait_for(lambda state: state.pid == 0, self.settings.stop_timeout_s):
            self.kill(signal.SIGKILL)
            self.wait_for(lambda state: state.pid == 0)
        with self._changed:
            self._store.clear()
            return self.state.last_exit

    def close(self) -> list[int]:
        """Stop it if it runs, end what is left of it, and end the thread. Returns the pids of what was left."""
        if self._thread.is_alive():
            self.stop()
            self._over = True
            os.eventfd_write(self._wake_fd, 1)
            self._thread.join()
        left = [pid for session in self._sessions for pid in session_pids(session)]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._release()
        return left

    def stored_names(self) -> list[str]:
        with self._changed:
            return self._store.names()

    def store_counts(self) -> dict[str, int]:
        with self._changed:
            store = self._store
            return {"entries": len(store), "dropped_full": store.dropped_full, "dropped_dead": store.dropped_dead}

    def _check_thread(self) -> None:
        if self._fault is not None:
            raise RuntimeError("the stand-in itself failed") from self._fault

    def _release(self) -> None:
        if self._wake_fd < 0:
            return
        self._epoll.close()
        self._socket.close()
        self._store.close()
        self._jobs.close()
        os.close(self._wake_fd)
        self._wake_fd = -1

    # -- the thread

    def _run(self) -> None:
        try:
            while not self._over:
                events = dict(self._epoll.poll(self._sleep_s()))
                with self._changed:
                    self._turn(events)
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._fault = error
                self._changed.notify_all()
            raise

    def _turn(self, events: Mapping[int, int]) -> None:
        # messages first: what a process said before it died counts
        while (message := self._socket.receive()) is not None:
            self._hear(message)
        if self._store.fileno() in events:
            self._store.drop_dead()
        if self._pidfd in events:
            self._died()
        if self._wake_fd in events:
            os.eventfd_read(self._wake_fd)
        now_s = time.monotonic()
        if self._watchdog_due_s is not None and now_s >= self._watchdog_due_s:
            self._watchdog_due_s = None
            self.state.watchdog_kills += 1
            self._on_event("watchdog: the main process gave no sign of life")
            self.kill(signal.SIGKILL)
        if self._start_due_s is not None and now_s >= self._start_due_s:
            self._spawn()

    def _sleep_s(self) -> float:
        dues = [due for due in (self._start_due_s, self._watchdog_due_s) if due is not None]
        return max(0.0, min([IDLE_S, *(due - time.monotonic() for due in dues)]))

    def _spawn(self) -> None:
        self._start_due_s = None
        self._store.drop_dead()
        settings, state = self.settings, self.state
        self._jobs.show("start")
        environ = {"NOTIFY_SOCKET": self._socket.name, "PATH": self._jobs.path(self._environ.get("PATH", ""))}
        if settings.watchdog_s is not None:
            environ["WATCHDOG_USEC"] = str(int(settings.watchdog_s * 1e6))
            self._watchdog_due_s = time.monotonic() + settings.watchdog_s
        entries = self._store.hand_back()
        state.pid, self._pidfd = spawn(
            self.command,
            {**self._environ, **environ},
            names=[entry.name for entry in entries],
            fds=[entry.fd for entry in entries],
            output=self._output,
        )
        self._sessions.add(state.pid)
        state.starts += 1
        state.ready = state.stopping = False
        state.status = ""
        self._epoll.register(self._pidfd, select.EPOLLIN)

    def _died(self) -> None:
        state = self.state
        self._epoll.unregister(self._pidfd)
        state.last_exit = reap(state.pid)
        os.close(self._pidfd)
        self._pidfd = -1
        self._watchdog_due_s = None
        if not session_pids(state.pid):
            self._sessions.discard(state.pid)
        state.deaths += 1
        state.deaths_before_ready += not state.ready and not self._killed
        self._killed = False
        state.pid, state.ready = 0, False
        if self._ending != "stop":
            delay_s = 0.0 if self._ending == "restart" else self.settings.restart_delay_s
            self._start_due_s = time.monotonic() + delay_s
            self._ending = ""

    def _hear(self, message: Notification) -> None:
        """Takes over the message's descriptors."""
        state, fds = self.state, list(message.fds)
        try:
            if message.is_barrier:
                state.barriers += 1  # whoever waits sees the close, whatever pid it has
                return
            if message.pid != state.pid or state.pid == 0:
                return
            self._note(message)
            name = message.value("FDNAME")
            if message.says("FDSTOREREMOVE=1"):
                if name is not None:
                    self._store.remove(name)
            elif message.says("FDSTORE=1"):
                state.store_messages += 1
                self._store.push(fds, name, polled=not message.says("FDPOLL=0"))
                fds = []
        finally:
            for fd in fds:
                os.close(fd)

    def _note(self, message: Notification) -> None:
        state = self.state
        state.status = message.value("STATUS") or state.status
        if message.says("RELOADING=1"):
            state.ready = False
        if message.says("READY=1"):
            state.ready, state.deaths_before_ready = True, 0
            if self._jobs.kind == "start":
                self._jobs.show("")
        if message.says("STOPPING=1"):
            state.stopping, state.ready = True, False
        if message.says("WATCHDOG=1") and self.settings.watchdog_s is not None:
            self._watchdog_due_s = time.monotonic() + self.settings.watchdog_s
