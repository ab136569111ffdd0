"""The child processes: forked, listened to, watched by pidfd and heartbeat, killed, reaped and forked again.

Rules: what a child owned is touched only after its pidfd has fired. A worker whose heart stops is killed; the storer is
not: it is called stuck and waited for, also when its heart beats (a thread of its own) but its turn does not end,
because the disk is slow or hangs.
Messages that do not fit into a child's channel wait here, in order.

What to do with a dead worker's connections and leases is not decided here: see ``on_death``.
"""

from __future__ import annotations

import collections
import errno
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mpserverd import log
from mpserverd.arena.counters import COUNTERS, Role
from mpserverd.arena.launch import Launch
from mpserverd.arena.state import FIRST_WORKER_SLOT, STORER_SLOT, Slot
from mpserverd.errors import ProtocolError, StartError
from mpserverd.net.channel import Channel, Kind, Message
from mpserverd.supervisor.child import Child, child_name
from mpserverd.supervisor.core import WORKER_SLOTS, Core
from mpserverd.supervisor.loop import READ, WRITE
from mpserverd.supervisor.policy import GIVE_UP_DEATHS, GIVE_UP_WINDOW_S, RestartPolicy
from mpserverd.supervisor.spawn import Program, spawn
from mpserverd.supervisor.states import ChildEvent, ChildState, next_state

logger = logging.getLogger(__name__)

START_TIMEOUT_S = {Role.WORKER: 30.0, Role.STORER: 300.0}
"""From fork to READY. A storer may have a large spool to recover; as long as its heart beats it may take its time."""
UNKILLABLE_S = 5.0
"""A process that SIGKILL has not ended after so long hangs in the kernel."""
LEAVE_TIMEOUT_S = 3.0
"""From DRAINED to the exit; by then the child holds nothing that counts."""
FORK_AGAIN_S = 1.0
SEND_AGAIN_S = 0.1
MESSAGES_A_WAKE = 256
_SPARE_MESSAGES = 1024
_MAY_WRITE = frozenset({ChildState.RUNNING, ChildState.STOPPING})
_PEER_GONE = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.ECONNREFUSED})


class Children:
    """``on_message(child, message)`` gets everything but READY and DRAINED; ``on_ready`` and ``on_drained`` get those.

    ``on_death(child)`` is called when the process is gone for certain, before its successor is forked.
    """

    def __init__(self, core: Core, programs: Mapping[str, Program]) -> None:
        self._core = core
        self._programs = programs
        self._all: list[Child] = []
        self._restarts: collections.Counter[str] = collections.Counter()
        """By name: a reload makes new children under the old names."""
        self.on_message: Callable[[Child, Message], None] = _ignore
        self.on_ready: Callable[[Child], None] = _ignore
        self.on_drained: Callable[[Child], None] = _ignore
        self.on_death: Callable[[Child], None] = _ignore
        self.on_gone: Callable[[Child], None] = _ignore
        """The child will not be forked again: it stopped as told, or was given up."""

    # -- who there is

    def __iter__(self) -> Iterator[Child]:
        return iter(self._all)

    def workers(self) -> list[Child]:
        return [child for child in self._all if child.role is Role.WORKER]

    def storer(self) -> Child | None:
        return next((child for child in self._all if child.role is Role.STORER), None)

    def by_slot(self, slot: int) -> Child | None:
        return next((child for child in self._all if child.slot == slot), None)

    def alive(self) -> list[Child]:
        return [child for child in self._all if child.state.alive]

    # -- starting

    def add_storer(self) -> Child:
        return self._add(Role.STORER, 0, STORER_SLOT)

    def add_worker(self, index: int) -> Child:
        """A place for a worker, in a slot that nobody has. Raises StartError when stuck ones have them all."""
        taken = {child.slot for child in self._all}
        for slot in range(FIRST_WORKER_SLOT, FIRST_WORKER_SLOT + WORKER_SLOTS):
            if slot not in taken:
                return self._add(Role.WORKER, index, slot)
        raise StartError(f"all {WORKER_SLOTS} places for workers are taken")

    def _add(self, role: Role, index: int, slot: int) -> Child:
        policy = RestartPolicy(self._core.config.server.restart_backoff_s_max, may_give_up=role is Role.WORKER)
        if role is Role.STORER:  # always the same slot, so its count outlives the supervisor
            self._restarts[child_name(role, index)] = int(self._core.state.slots[slot, Slot.RESTARTS])
        child = Child(role, index, slot, policy)
        child.restarts = self._restarts[child.name]
        self._all.append(child)
        self._set(child, Slot.RESTARTS, child.restarts)
        return child

    def fork(self, child: Child) -> None:
        """Start a new incarnation. Its channel is new, its lease number is new, its slot's counters go on."""
        core = self._core
        child.lease = core.state.next_lease()
        child.listeners = frozenset(core.listeners)
        child.forked_ns = time.monotonic_ns()
        child.drained = child.was_ready = False
        child.killed_why = child.last_words = ""
        self._prepare_slot(child)
        try:
            self._fork(child)
        except OSError as error:
            log.event(logger, logging.ERROR, "cannot fork", child=child.name, error=error.strerror)
            child.timer = core.loop.after(FORK_AGAIN_S, lambda: self.fork(child))
            return
        core.loop.watch(child.pidfd, READ, lambda _: self._exited(child))
        self._watch_channel(child)
        self._set(child, Slot.PID, child.pid)
        self._apply(child, ChildEvent.FORKED)

    def _fork(self, child: Child) -> None:
        """Everything of it or nothing. Raises OSError."""
        cpus = self._core.config.server.cpu_affinity
        ours, theirs = Channel.pair()
        try:
            child.pid = spawn(
                self._launch(child, theirs.fileno()),
                self._programs[child.role.value],
                cpus=[cpus[child.index % len(cpus)]] if cpus and child.role is Role.WORKER else None,
            )
            try:
                child.pidfd = os.pidfd_open(child.pid)
            except OSError:
                os.kill(child.pid, signal.SIGKILL)  # not reaped yet, so it is still this process
                os.waitpid(child.pid, 0)
                raise
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        child.channel = Channel(ours)

    def _launch(self, child: Child, channel_fd: int) -> Launch:
        core = self._core
        return Launch(
            role=child.role,
            name=child.name,
            index=child.index,
            slot=child.slot,
            lease=child.lease,
            parent_pid=os.getpid(),
            config=core.config_for_children(),
            listeners=dict(core.listeners),
            state_fd=core.state.fd,
            table_fd=core.arena.table.fd,
            data_fd=core.arena.data_fd,
            channel_fd=channel_fd,
            doorbell_fd=core.bells.of_slot(child.slot),
            supervisor_doorbell_fd=core.bells.supervisor,
            storer_doorbell_fd=core.bells.storer,
            worker_doorbell_fds=core.bells.workers,
            lock_fd=core.spool_lock_fd if child.role is Role.STORER else core.connections_lock_fd,
        )

    def _prepare_slot(self, child: Child) -> None:
        """The slot has no owner now. Gauges of the last one are zeroed; counters go on, so that sums never fall."""
        row = self._core.state.slots[child.slot]
        row[[Slot.CONNECTIONS, Slot.WANTS, Slot.DOZING, Slot.RATE_MILLI, Slot.CPU_MILLI, Slot.RSS_BYTES]] = 0
        for counter in COUNTERS:
            if counter.role is child.role and counter.gauge:
                row[counter.column] = 0
        if child.role is Role.WORKER:
            row[Slot.IN_HAND] = 0
        row[Slot.LEASE] = child.lease
        row[Slot.STARTED_MONO_NS] = row[Slot.HEARTBEAT_MONO_NS] = row[Slot.PROGRESS_MONO_NS] = child.forked_ns

    # -- talking

    def send(self, child: Child, message: Message) -> None:
        """Queue a message. A child that is gone gets nothing: whoever sent it hears of the death."""
        if child.channel is None:
            return
        if not child.outbox and not child.held and self._try_send(child, message):
            return
        child.outbox.append(message)
        if len(child.outbox) > 2 * self._core.clients_max + _SPARE_MESSAGES:
            self.kill(child, "does not read its messages")
        self._watch_channel(child)

    def broadcast(self, kind: Kind, payload: dict[str, Any] | None = None) -> None:
        for child in self.alive():
            self.send(child, Message(kind, payload=payload))

    def _try_send(self, child: Child, message: Message) -> bool:
        """True when the message needs no more care: sent, or its receiver is dying."""
        if child.channel is None:
            return True
        try:
            return child.channel.send(message)
        except OSError as error:
            if error.errno not in _PEER_GONE:
                self._hold(child, error)
                return False
            log.event(
                logger, logging.DEBUG, "message lost", child=child.name, kind=message.kind.name, error=error.strerror
            )
            return True

    def _hold(self, child: Child, error: OSError) -> None:
        """The kernel has no room for the message (descriptors in flight, memory); EPOLLOUT would not say so."""
        child.held = True
        log.event(logger, logging.WARNING, "message waits", child=child.name, error=error.strerror)
        self._core.loop.after(SEND_AGAIN_S, lambda: self._flush(child))

    def _flush(self, child: Child) -> None:
        child.held = False
        while child.outbox and self._try_send(child, child.outbox[0]):
            child.outbox.popleft()
        self._watch_channel(child)

    def _watch_channel(self, child: Child) -> None:
        if child.channel is not None:
            events = READ | WRITE if child.outbox and not child.held else READ
            self._core.loop.watch(child.channel.fileno(), events, lambda events: self._talk(child, events))

    def _talk(self, child: Child, events: int) -> None:
        if events & WRITE:
            self._flush(child)
        if events & ~WRITE:
            self._listen(child)

    def _listen(self, child: Child) -> None:
        for _ in range(MESSAGES_A_WAKE):
            if child.channel is None:
                return
            try:
                message = child.channel.receive()
            except EOFError:
                self._core.loop.unwatch(child.channel.fileno())  # its pidfd says the rest
                return
            except (ProtocolError, ValueError, OSError) as error:
                log.event(logger, logging.ERROR, "child speaks nonsense", child=child.name, error=error)
                self.kill(child, "speaks nonsense")
                return
            if message is None:
                return
            if message.fd >= 0:
                os.close(message.fd)  # children have no reason to send descriptors
            self._heard(child, message)

    def _heard(self, child: Child, message: Message) -> None:
        if message.kind is Kind.READY:
            self._apply(child, ChildEvent.SAID_READY)
            child.was_ready = True
            child.policy.ran()
            self.on_ready(child)
        elif message.kind is Kind.DRAINED:
            child.drained = True
            self.on_drained(child)
        else:
            if message.kind is Kind.EVENT and message.payload:
                child.last_words = str(message.payload.get("text", ""))
            self.on_message(child, message)

    # -- ending

    def tell_to_stop(self, child: Child, kind: Kind) -> None:
        """``kind`` is DRAIN or DETACH_ALL. The child is not forked again."""
        child.wanted = False
        if child.timer is not None:
            child.timer.cancel()
        if child.state is ChildState.BACKOFF:
            self._apply(child, ChildEvent.TOLD_TO_STOP)
            self._gone(child)
        elif child.state.alive:
            self._apply(child, ChildEvent.TOLD_TO_STOP)
            self.send(child, Message(kind))
        elif child.state is ChildState.DEAD:  # it could not even be forked
            self._gone(child)

    def let_leave(self, child: Child) -> None:
        """It is drained and holds nothing: close its channel, and make sure that it goes."""
        if child.channel is not None:
            self._drop_channel(child)
            incarnation = child.lease
            self._core.loop.after(LEAVE_TIMEOUT_S, lambda: self._hurry(child, incarnation))

    def _hurry(self, child: Child, lease: int) -> None:
        if child.lease == lease and child.state.alive:
            self.kill(child, "did not leave after it was drained")

    def kill(self, child: Child, why: str) -> None:
        """SIGKILL. What it owned stays its own until the pidfd fires."""
        if not child.state.alive:
            return
        first = child.state is not ChildState.KILLED
        self._apply(child, ChildEvent.SIGKILLED)
        if first:
            child.killed_why, child.killed_ns = why, time.monotonic_ns()
            log.event(
                logger,
                logging.WARNING,
                "child killed",
                message_id=log.MessageId.CHILD_HUNG,
                child=child.name,
                pid=child.pid,
                why=why,
            )
        signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)

    def _exited(self, child: Child) -> None:
        """The pidfd fired: every thread of the process is gone."""
        pid, status = os.waitpid(child.pid, os.WNOHANG)
        if pid == 0:
            return
        self._listen(child)  # what it said before it died
        self._core.loop.unwatch(child.pidfd)
        os.close(child.pidfd)
        child.pidfd = -1
        self._drop_channel(child)
        self._apply(child, ChildEvent.EXITED)
        self._set(child, Slot.PID, 0)
        for column in (Slot.CONNECTIONS, Slot.WANTS, Slot.DOZING, Slot.RATE_MILLI, Slot.CPU_MILLI, Slot.RSS_BYTES):
            self._set(child, column, 0)
        child.exit_status = status
        lived_s = (time.monotonic_ns() - child.forked_ns) / 1e9
        self._tell_death(child, status, lived_s)
        if child.wanted:
            self._core.count("child_deaths")
        self.on_death(child)
        if child.wanted:
            self._retry(child, lived_s)
        else:
            self._gone(child)

    def _tell_death(self, child: Child, status: int, lived_s: float) -> None:
        regular = not child.wanted and (status == 0 or child.drained)
        self._core.note(
            logger,
            logging.INFO if regular else logging.ERROR,
            "child left" if regular else "child died",
            message_id=None if regular else log.MessageId.CHILD_DIED,
            child=child.name,
            pid=child.pid,
            how=_how_it_ended(os.waitstatus_to_exitcode(status)),
            age_s=round(lived_s, 3),
            restarts=child.restarts,
            connections=len(child.rows),
            **({"killed_because": child.killed_why} if child.killed_why else {}),
            **({"last_words": child.last_words} if child.last_words and not regular else {}),
        )

    def _retry(self, child: Child, lived_s: float) -> None:
        wait_s = child.policy.died(time.monotonic(), lived_s, was_ready=child.was_ready)
        if wait_s is None:
            self._apply(child, ChildEvent.GAVE_UP)
            self._core.note(
                logger,
                logging.ERROR,
                "child given up",
                message_id=log.MessageId.CHILD_GIVEN_UP,
                child=child.name,
                why=f"died {GIVE_UP_DEATHS} times within {GIVE_UP_WINDOW_S:.0f} s before it was ready",
                last_words=child.last_words or None,
            )
            self._gone(child)
            return
        self._restarts[child.name] += 1
        child.restarts = self._restarts[child.name]
        self._set(child, Slot.RESTARTS, child.restarts)
        self._apply(child, ChildEvent.WILL_RETRY)
        child.timer = self._core.loop.after(wait_s, lambda: self.fork(child))

    def _gone(self, child: Child) -> None:
        if child.state is not ChildState.GIVEN_UP:  # that one stays for all to see
            self._all.remove(child)
        self.on_gone(child)

    def forget(self, child: Child) -> None:
        """A child that was given up is not wanted any more."""
        self._all.remove(child)
        self._set(child, Slot.STATE, ChildState.DEAD.number)

    def _drop_channel(self, child: Child) -> None:
        if child.channel is not None:
            self._core.loop.unwatch(child.channel.fileno())
            child.channel.close()
            child.channel = None
        child.outbox.clear()

    # -- watching

    def check_heartbeats(self, now_ns: int) -> None:
        """Once a second. The caller leaves it out after the supervisor itself was held up."""
        timeout_ns = int(self._core.config.server.heartbeat_timeout_s * 1e9)
        for child in self.alive():
            age_ns = now_ns - int(self._core.state.slots[child.slot, Slot.HEARTBEAT_MONO_NS])
            turn_ns = self._turn_ns(child, now_ns)
            if child.state is ChildState.KILLED:
                if now_ns - child.killed_ns > UNKILLABLE_S * 1e9:
                    self._call_stuck(child, "SIGKILL does not end it; it hangs in the kernel and keeps what it owns")
            elif child.state is ChildState.STUCK:
                if child.role is Role.STORER and max(age_ns, turn_ns) <= timeout_ns:
                    self._apply(child, ChildEvent.BEAT_SEEN)
                    if not child.wanted:
                        self._apply(child, ChildEvent.TOLD_TO_STOP)
                    self._core.note(logger, logging.INFO, "child recovered", child=child.name, pid=child.pid)
            elif age_ns > timeout_ns and child.role is Role.WORKER:
                self.kill(child, f"gave no sign of life for {age_ns / 1e9:.1f} s")
            elif age_ns > timeout_ns and child.state in _MAY_WRITE:
                self._call_stuck(child, f"gave no sign of life for {age_ns / 1e9:.1f} s; slow I/O is waited for")
            elif turn_ns > timeout_ns and child.state in _MAY_WRITE:
                self._call_stuck(child, f"has been writing for {turn_ns / 1e9:.1f} s; a slow disk is waited for")
            elif (
                child.state is ChildState.STARTING
                and age_ns > timeout_ns
                and now_ns - child.forked_ns > START_TIMEOUT_S[child.role] * 1e9
            ):
                self.kill(child, f"was not ready after {START_TIMEOUT_S[child.role]:.0f} s")

    def _turn_ns(self, child: Child, now_ns: int) -> int:
        """Since the storer began its last turn, which it does at least once a second when the disk lets it."""
        if child.role is not Role.STORER:
            return 0
        return now_ns - int(self._core.state.slots[child.slot, Slot.PROGRESS_MONO_NS])

    def _call_stuck(self, child: Child, why: str) -> None:
        self._apply(child, ChildEvent.BEAT_MISSED)
        self._core.note(
            logger,
            logging.WARNING,
            "child stuck",
            message_id=log.MessageId.CHILD_STUCK,
            child=child.name,
            pid=child.pid,
            why=why,
        )

    def _apply(self, child: Child, event: ChildEvent) -> None:
        new = next_state(child.state, event)
        if new is not child.state:
            log.event(logger, logging.DEBUG, "child state", child=child.name, was=child.state.value, now=new.value)
            child.state = new
            self._set(child, Slot.STATE, new.number)

    def _set(self, child: Child, column: int, value: int) -> None:
        state = self._core.state
        state.words[state.slot_base(child.slot) + column] = value


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"exit_code={code}"
    try:
        return f"signal={signal.Signals(-code).name}"
    except ValueError:
        return f"signal={-code}"


def _ignore(*_: object) -> None:
    """Nobody wants to know yet."""
