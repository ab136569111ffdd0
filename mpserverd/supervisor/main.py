"""The supervisor process: puts its parts together, starts, serves, and leaves with an exit code.

It is single-threaded, never blocks once it serves, and never reads a packet. What each part does stands in its own
module: children, connections, accepting, leases, stats_tick, commands, reload, stopping.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping

from mpserverd import log
from mpserverd.arena.counters import Role
from mpserverd.arena.state import SUPERVISOR_SLOT, Slot
from mpserverd.config.schema import Config
from mpserverd.errors import StartError
from mpserverd.net.channel import Kind, Message
from mpserverd.supervisor.accepting import Accepting
from mpserverd.supervisor.awaiting_ready import AwaitingReady
from mpserverd.supervisor.child import Child
from mpserverd.supervisor.children import Children
from mpserverd.supervisor.commands import Commands
from mpserverd.supervisor.connections import Connections
from mpserverd.supervisor.connections_lock import lock
from mpserverd.supervisor.control_server import ControlServer, open_control_socket
from mpserverd.supervisor.core import hush
from mpserverd.supervisor.ending import Ending
from mpserverd.supervisor.fd_store import FdStore, inherited
from mpserverd.supervisor.keeping import Keeping
from mpserverd.supervisor.leases import Leases
from mpserverd.supervisor.loop import READ
from mpserverd.supervisor.making_core import make_core, take_memory
from mpserverd.supervisor.rebalancing import Rebalancing
from mpserverd.supervisor.reload import Reload
from mpserverd.supervisor.remembered import Remembered, listener_facts
from mpserverd.supervisor.spawn import Program
from mpserverd.supervisor.spool_lock import try_lock_spool
from mpserverd.supervisor.states import ChildState
from mpserverd.supervisor.stats_tick import StatsTick
from mpserverd.supervisor.stored_memory import FACTS, GUARD_FACT, memory_names
from mpserverd.supervisor.takeover import look_through
from mpserverd.supervisor.taking_up import TakingUp
from mpserverd.supervisor.totals import read_totals
from mpserverd.systemd import Notifier

logger = logging.getLogger(__name__)

TICK_S = 1.0
HELD_UP_S = 2.0
"""A tick that comes so late says that the supervisor was held up, maybe the whole machine with it ..."""
JUDGE_AFTER_S = 5.0
"""... and then the children get so much time to beat again before anybody is judged by it."""
STATUS_INTERVAL_S = 10.0
LEFTOVER_S = 2.0

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)


def run(
    config: Config,
    *,
    reload_config: Callable[[], Config],
    programs: Mapping[str, Program],
    on_ready: Callable[[], None] | None = None,
) -> int:
    """Serve until told to stop, and return the exit code: 0, or 1 when something was at risk or nobody could work.

    ``programs["worker"]`` and ``programs["storer"]`` are called with a Launch in forked children. Must be called in the
    main thread. Raises StartError when the start fails; then nothing is left behind.
    """
    log.setup(config.log, process="supervisor")
    supervisor = Supervisor(config, reload_config, programs)
    with contextlib.closing(supervisor):
        try:
            return supervisor.serve(on_ready)
        except StartError:
            supervisor.leave_for_later()  # what must be put right is outside; that is no crash
            raise


class Supervisor:
    """Wires the parts and routes what happens between them; decisions are theirs."""

    def __init__(self, config: Config, reload_config: Callable[[], Config], programs: Mapping[str, Program]) -> None:
        self._store = FdStore()
        self._inherited = look_through(inherited(), self._store, time.monotonic_ns())
        memory = take_memory(self._inherited, config, self._store)
        self._memory_names = memory_names(memory.generation if memory is not None else 1)
        self._core = core = make_core(config, memory)
        core.connections_lock_fd = memory.lock_fd if memory is not None else lock(core.state.fd)
        self._facts = memory.facts if memory is not None else Remembered.create()
        self._notifier = Notifier()
        self._children = Children(core, programs)
        self._connections = Connections(core, self._children)
        self._keeping = Keeping(core, self._store, self._connections.dups)
        self._connections.on_gone = self._keeping.ended
        self._keeping.on_guard = self._write_facts
        self._connections.suspecting.on_change = self._write_facts
        self._accepting = Accepting(core, self._connections)
        self._accepting.on_change = self._listeners_changed
        self._accepting.carry = self._keeping.carry
        self._accepting.has_room = self._keeping.has_room
        self._leases = Leases(core)
        self._stats = StatsTick(core, self._children, self._connections)
        self._rebalancing = Rebalancing(core, self._children, self._connections)
        self._taking_up = (
            TakingUp(core, self._facts, self._connections, self._accepting, self._start_storer)
            if memory is not None
            else None
        )
        self._reload = Reload(core, self._children, self._connections, self._accepting, reload_config)
        self._reload.on_news = lambda: self._say_status(time.monotonic())
        self._ending = Ending(core, self._children, self._connections, self._accepting, self._keeping, self._notifier)
        commands = Commands(
            core,
            self._children,
            self._connections,
            self._accepting,
            self._reload,
            self._ending.leave,
            self._write_facts,
        )
        self._answer = commands.answer
        self._control: ControlServer | None = None
        self._tick_due_s = 0.0
        self._judge_after_s = 0.0
        self._status_s = 0.0
        self._status = ""
        self._recheck_pending = False
        self._ready = False
        self._children.on_message = self._obey
        self._children.on_ready = self._child_ready
        self._children.on_drained = self._children.let_leave
        self._children.on_death = self._child_died
        self._children.on_gone = self._child_gone

    # -- life

    def serve(self, on_ready: Callable[[], None] | None) -> int:
        loop = self._core.loop
        with loop.signals(SIGNALS, self._signalled):
            self._open()
            self._start_children()
            loop.watch(self._core.bells.supervisor, READ, lambda _: self._doorbell())
            self._tick_due_s = time.monotonic()
            self._tick()
            self._start_watchdog()
            ending = self._ending
            AwaitingReady(self._core, self._children, self._notifier, self._awaited).run(lambda: ending.begun)
            if not ending.begun:
                self._say_ready()
                if on_ready is not None:
                    on_ready()
            while not ending.over:
                loop.run()
        return 0 if ending.leaving else ending.say_goodbye()

    def _open(self) -> None:
        path = self._core.config.server.control_socket
        control = open_control_socket(path)
        self._control = ControlServer(self._core, path, control, self._answer)
        taking_up = self._taking_up
        if taking_up is not None:
            taking_up.know_listeners()
        self._keeping.know_listeners({name: sock.fileno() for name, sock in self._inherited.listeners.items()})
        self._accepting.open_all(self._core.config, self._inherited.listeners)
        self._inherited.close_listeners()
        if taking_up is not None:
            taking_up.take_up(self._inherited, self._store, self._keeping)
        else:
            self._core.spool_lock_fd = try_lock_spool(self._core.config.spool.path)
        core = self._core
        fds = (core.state.fd, core.arena.table.fd, core.arena.data_fd)
        self._keeping.keep_memory({**dict(zip(self._memory_names, fds, strict=True)), FACTS: self._facts.fd})
        self._keeping.begin()

    # -- what the next supervisor must know

    def _write_facts(self) -> None:
        core = self._core
        facts = listener_facts(core.config, core.listeners, self._accepting.next_id)
        quarantine = self._connections.quarantine.facts()
        kept = {"quarantine": quarantine, "draining": core.draining, GUARD_FACT: self._keeping.guard_pid}
        self._facts.write({**facts, **kept})

    def _listeners_changed(self) -> None:
        self._write_facts()
        self._keeping.keep_listeners(self._accepting.fds())

    # -- children

    def _start_children(self) -> None:
        if self._taking_up is not None:
            self._taking_up.await_spool()
        else:
            self._start_storer()
        for index in range(self._core.config.server.workers):
            self._children.fork(self._children.add_worker(index))

    def _start_storer(self) -> None:
        self._children.fork(self._children.add_storer())

    def _awaited(self) -> list[Child]:
        """Connections that were taken up are served before the storer has looked through the spool."""
        return list(self._children) if self._taking_up is None else self._children.workers()

    def _say_ready(self) -> None:
        core = self._core
        self._ready = True
        self._connections.house()
        core.show_phase()
        self._accepting.serve()
        if self._control is not None:
            self._control.serve()
        core.note(
            logger,
            logging.INFO,
            "ready",
            message_id=log.MessageId.DAEMON_READY,
            pid=os.getpid(),
            listeners=",".join(f"{each.config.name}={each.bound}" for each in self._accepting.listeners()),
            workers=len(self._children.workers()),
            max_clients=core.max_clients,
            control=core.config.server.control_socket,
        )
        log.event(
            logger,
            logging.INFO,
            "what to do next",
            look="mpserverctl stats",
            send=f"mpload run --host HOST --port {_first_port(self._accepting)}",
            read="mpserverctl streams",
        )
        self._notifier.ready("serving")
        self._ending.dropped_before = read_totals(core.state).dropped_bytes

    def leave_for_later(self) -> None:
        """The start failed, and the next one takes up what waits."""
        self._ending.leave_everything()

    def close(self) -> None:
        """Leave nothing behind, whatever happened."""
        self._core.stopping = True
        if self._taking_up is not None:
            self._taking_up.give_up()
        self._accepting.close_all()
        leftovers = self._children.alive()
        for child in leftovers:
            child.wanted = False
            if not self._ending.leaving:  # else their parent's death ends them, as it does when it is killed
                self._children.kill(child, "the supervisor leaves")
        deadline_s = time.monotonic() + (0.0 if self._ending.leaving else LEFTOVER_S)
        while self._children.alive() and time.monotonic() < deadline_s:
            self._core.loop.run_once()
        for_good = self._ending.stopping or not self._keeping.present
        if self._ending.stopping:
            self._keeping.forget_all()
        self._connections.close_all(for_good=for_good)
        self._keeping.close()
        if self._control is not None:
            self._control.close()
        self._notifier.close()
        self._core.close()

    # -- what children say and do

    def _obey(self, child: Child, message: Message) -> None:
        kind = message.kind
        if kind is Kind.NEED:
            self._leases.need(child, message.value, time.monotonic())
        elif kind is Kind.ENDED:
            self._connections.ended(message.row)
        elif kind is Kind.GREETED and message.payload is not None:
            self._connections.greeted(message.row, child, message.payload)
        elif kind is Kind.RELEASED:
            self._connections.released(message.row)
        elif kind in (Kind.OPENED, Kind.FREED):
            self._recheck_soon()
        elif kind is Kind.EVENT and message.payload is not None:
            fields = {key: value for key, value in message.payload.items() if key not in ("event", "source")}
            self._core.events.add(str(message.payload.get("event", "event")), source=child.name, **fields)

    def _recheck_soon(self) -> None:
        """A thousand streams may open or end at once; they are looked at together."""
        if not self._recheck_pending:
            self._recheck_pending = True
            self._core.loop.after(0.0, self._recheck)

    def _recheck(self) -> None:
        self._recheck_pending = False
        self._connections.recheck(time.monotonic())

    def _doorbell(self) -> None:
        hush(self._core.bells.supervisor)
        self._leases.retry()
        self._recheck()

    def _child_ready(self, child: Child) -> None:
        log.event(
            logger,
            logging.INFO,
            "child started",
            message_id=log.MessageId.CHILD_STARTED,
            child=child.name,
            pid=child.pid,
            restarts=child.restarts,
        )
        if child.role is Role.WORKER:
            # at the start not before all are there: the first one would get everything that was taken up
            if self._ready or all(worker.was_ready for worker in self._children.workers()):
                self._connections.house()
        else:
            self._core.ring_storer()

    def _child_died(self, child: Child) -> None:
        if child.role is Role.WORKER:
            self._leases.revoke(child)
            self._connections.orphan(child)

    def _child_gone(self, child: Child) -> None:
        if self._core.stopping or not self._ready:
            return
        if child.role is Role.STORER:
            self._start_storer()
        elif all(each.state is ChildState.GIVEN_UP for each in self._children.workers()):
            self._ending.exit_code = 1
            self._ending.stop("no worker can be started")

    # -- time and signals

    def _tick(self) -> None:
        now_ns = time.monotonic_ns()
        now_s = now_ns / 1e9
        if now_s - self._tick_due_s > HELD_UP_S:
            self._judge_after_s = now_s + JUDGE_AFTER_S
        self._tick_due_s = now_s + TICK_S
        self._core.loop.after(TICK_S, self._tick)
        slot = self._core.state.slots[SUPERVISOR_SLOT]
        slot[Slot.PID] = os.getpid()
        slot[Slot.HEARTBEAT_MONO_NS] = now_ns
        slot[Slot.CONNECTIONS] = len(self._connections)
        if now_s >= self._judge_after_s:
            self._children.check_heartbeats(now_ns)
        self._connections.scan()
        self._connections.finish_lost()
        self._connections.recheck(now_s)
        self._keeping.tick()
        self._leases.retry()
        self._stats.tick(now_ns)
        if self._ready and not self._core.stopping:
            self._rebalancing.tick(now_s)
        if self._control is not None:
            self._control.check_deadlines(now_s)
        if self._ready and now_s - self._status_s >= STATUS_INTERVAL_S:
            self._say_status(now_s)

    def _say_status(self, now_s: float) -> None:
        self._status_s = now_s
        rate = sum(int(self._core.state.slots[child.slot, Slot.RATE_MILLI]) for child in self._children.workers())
        status = f"{len(self._connections)} clients, {rate // 1000} packets/s"
        if self._reload.last_error:
            status = f"reload refused: {self._reload.last_error}"
        if self._reload.progress:
            status = self._reload.progress
        if status != self._status:
            self._status = status
            self._notifier.status(status)

    def _start_watchdog(self) -> None:
        interval_s = self._notifier.watchdog_interval_s()
        if interval_s is not None:
            self._notifier.watchdog()
            self._core.loop.after(interval_s, self._start_watchdog)

    def _signalled(self, number: int) -> None:
        actions: dict[int, Callable[[], None]] = {
            signal.SIGTERM: self._ending.terminate,
            signal.SIGINT: functools.partial(self._ending.stop, "SIGINT"),
            signal.SIGHUP: self._reload_on_signal,
            signal.SIGUSR1: self._log_summary,
            signal.SIGUSR2: self._reopen_logs,
            signal.SIGQUIT: self._ending.leave_on_signal,
        }
        actions[number]()

    def _reload_on_signal(self) -> None:
        if not self._ready:
            self._core.loop.after(TICK_S, self._reload_on_signal)
            return
        self._notifier.reloading()
        self._reload.request_quietly()
        self._notifier.ready(self._status or "serving")

    def _reopen_logs(self) -> None:
        log.reopen()
        self._children.broadcast(Kind.REOPEN_LOG)

    def _log_summary(self) -> None:
        slots = self._core.state.slots
        workers = self._children.workers()
        log.event(
            logger,
            logging.INFO,
            "status",
            message_id=log.MessageId.STATUS_SUMMARY,
            connections=len(self._connections),
            max_clients=self._core.max_clients,
            packets_per_s=sum(int(slots[child.slot, Slot.RATE_MILLI]) for child in workers) // 1000,
            free_chunks=self._core.arena.table.free_count(),
            chunks=self._core.arena.count,
        )
        for child in self._children:
            log.event(
                logger,
                logging.INFO,
                "status of a child",
                child=child.name,
                pid=child.pid,
                state=child.state.value,
                restarts=child.restarts,
                connections=len(child.rows),
                packets_per_s=int(slots[child.slot, Slot.RATE_MILLI]) // 1000,
                cpu_percent=int(slots[child.slot, Slot.CPU_MILLI]) / 10,
                rss_bytes=int(slots[child.slot, Slot.RSS_BYTES]),
            )


def _first_port(accepting: Accepting) -> str:
    return next((each.bound.rpartition(":")[2] for each in accepting.listeners()), "PORT")
