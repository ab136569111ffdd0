"""One sender process: many load clients on one event loop, on one absolute schedule.

Rules: the loop sleeps until the next batch is due, to the microsecond; it learns from the kernel which clients can send
again. Before the run it connects, then says ready and waits for the common start time. When nothing is left to send it
says sent, and closes the connections when told.

It prints nothing; ``crew.py`` runs several of them.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import os
import select
import selectors
import signal
import socket
import sys
import time
from collections import deque
from enum import Enum
from typing import Any

from mpserverd.client.pacing import NS_PER_S
from mpserverd.client.packets import PacketBlock, count_for_bytes
from mpserverd.load.histogram import Histogram
from mpserverd.load.link import READ, WRITE, Link, LinkState
from mpserverd.load.messages import Message, MessageStream
from mpserverd.load.mps_link import MpsLink
from mpserverd.load.scenario import FLAT_OUT_BLOCK_BYTES, Scenario

PROGRESS_NS = NS_PER_S // 4
TURN_BLOCKS_PACED = 16
TURN_BYTES_FLAT_OUT = 128 << 10
"""What one client may send before the others have their turn: late batches, or about one send buffer."""
IDLE_NS_MAX = NS_PER_S
CONNECTING_MAX = 512
"""Attempts in progress at once in one process: a listen queue is some 4,096 long, and shared by all of them."""
ATTEMPTING = (LinkState.CONNECTING, LinkState.GREETING)


class Phase(Enum):
    CONNECTING = "connecting"
    READY = "ready"
    RUNNING = "running"
    SENT = "sent"
    CLOSING = "closing"
    DONE = "done"


class Sender:
    """Drives the links of ``clients``. Call ``run`` once; it returns when every connection is over."""

    def __init__(self, scenario: Scenario, clients: range, control: MessageStream) -> None:
        self.scenario, self.control = scenario, control
        self.phase = Phase.CONNECTING
        shared = not scenario.flat_out
        blocks = self._blocks(scenario, clients, shared)
        kind = MpsLink if scenario.protocol == "mps" else Link
        self.links: list[Link] = [
            kind(scenario, client, block, shared_block=shared) for client, block in zip(clients, blocks, strict=False)
        ]
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, READ)
        self._drain_ns = int(scenario.drain_timeout_s * NS_PER_S)
        self._close_ns = int(scenario.close_timeout_s * NS_PER_S)
        self._registered: dict[Link, tuple[socket.socket, int]] = {}
        self._wakes: list[tuple[int, int, Link]] = []
        self._order = itertools.count()
        self._untried = deque(self.links)
        self._unresolved: set[Link] = set()
        self._unfinished: set[Link] = set()
        self._unclosed: set[Link] = set()
        self._stop_ns: int | None = None
        self._give_up_ns: int | None = None
        self._progress_ns = 0
        self._moved: tuple[int, int] = (0, 0)
        block_bytes = blocks[0].count_max * scenario.packet_size
        self._turn_blocks = max(1, TURN_BYTES_FLAT_OUT // block_bytes) if scenario.flat_out else TURN_BLOCKS_PACED

    @staticmethod
    def _blocks(scenario: Scenario, clients: range, shared: bool) -> list[PacketBlock]:
        count = min(scenario.batch_packets(len(clients)), count_for_bytes(scenario.packet_size, FLAT_OUT_BLOCK_BYTES))
        blocks = [PacketBlock(scenario.packet_size, count, scenario.seed) for _ in range(1 if shared else len(clients))]
        return blocks * len(clients) if shared else blocks

    def run(self) -> None:
        self._begin_first_attempts(time.monotonic_ns())
        try:
            while self.phase is not Phase.DONE:
                self._turn()
        finally:
            self._selector.close()

    # --- one turn of the loop

    def _turn(self) -> None:
        now_ns = time.monotonic_ns()
        self._wake_due(now_ns)
        self._advance(now_ns)
        if self.phase is Phase.DONE:
            return
        for key, mask in self._poll(self._sleep_s(time.monotonic_ns())):
            if key.fileobj is self.control:
                self._obey(self.control.receive())
            else:
                self._serve(key.data, mask)

    def _sleep_s(self, now_ns: int) -> float:
        wake_ns = min(now_ns + IDLE_NS_MAX, self._progress_ns + PROGRESS_NS)
        if self._wakes:
            wake_ns = min(wake_ns, self._wakes[0][0])
        return max(0, wake_ns - now_ns) / NS_PER_S

    def _poll(self, timeout_s: float) -> list[tuple[selectors.SelectorKey, int]]:
        """epoll counts in whole milliseconds, and select() in microseconds; so select() waits for the epoll."""
        fileno = getattr(self._selector, "fileno", None)
        if fileno is None or timeout_s == 0 or self.scenario.flat_out:
            return self._selector.select(timeout_s)
        select.select([fileno()], [], [], timeout_s)
        return self._selector.select(0)

    def _wake_due(self, now_ns: int) -> None:
        """Each link has one turn; what is late still is due again at once, after the others and the kernel."""
        due: list[Link] = []
        while self._wakes and self._wakes[0][0] <= now_ns:
            wake_ns, _, link = heapq.heappop(self._wakes)
            if link.queued_ns == wake_ns:
                link.queued_ns = None
            if link.wake_ns == wake_ns:
                link.wake_ns = None
                due.append(link)
        for link in due:
            if link.state is LinkState.OPEN:
                link.send_due(now_ns, self._turn_blocks)
            elif link.state is not LinkState.WAITING or not self._nothing_to_send(link):
                link.on_timeout(now_ns)
            self._settle(link)

    def _nothing_to_send(self, link: Link) -> bool:
        """A link that has nothing to send is not connected again."""
        return self.phase in (Phase.SENT, Phase.CLOSING) or (self.phase is Phase.RUNNING and link.finished)

    def _serve(self, link: Link, mask: int) -> None:
        now_ns = time.monotonic_ns()
        if link.state is LinkState.CONNECTING:
            link.end_connect(now_ns)
        elif mask & READ:
            link.on_readable(now_ns)
        if mask & WRITE and self.phase is Phase.RUNNING and link.state is LinkState.OPEN:
            link.send_due(now_ns, self._turn_blocks)
        self._settle(link)

    def _settle(self, link: Link) -> None:
        """Make selector and heap agree with what the link waits for."""
        known = self._registered.get(link)
        if known is not None and known[0] is not link.sock:
            self._selector.unregister(known[0])
            del self._registered[link]
            known = None
        if link.sock is not None and (known is None or known[1] != link.wants):
            change = self._selector.register if known is None else self._selector.modify
            change(link.sock, link.wants, link)
            self._registered[link] = (link.sock, link.wants)
        if link.wake_ns is not None and link.wake_ns != link.queued_ns:
            link.queued_ns = link.wake_ns
            heapq.heappush(self._wakes, (link.wake_ns, next(self._order), link))
        if link in self._unresolved and link.state not in ATTEMPTING:
            self._unresolved.discard(link)
            self._begin_first_attempts(time.monotonic_ns())
        if self.phase is Phase.RUNNING and (link.finished or link.state is LinkState.DONE):
            self._unfinished.discard(link)
        elif link.state is LinkState.DONE:
            self._unclosed.discard(link)

    def _begin_first_attempts(self, now_ns: int) -> None:
        while len(self._unresolved) < CONNECTING_MAX and self._untried:
            link = self._untried.popleft()
            link.begin_connect(now_ns)
            if link.state in ATTEMPTING:
                self._unresolved.add(link)
            self._settle(link)

    # --- phases

    def _advance(self, now_ns: int) -> None:
        if now_ns >= self._progress_ns + PROGRESS_NS:
            self._progress_ns = now_ns
            self.control.try_send("progress", **self._progress())
        if self.phase is Phase.CONNECTING and not self._unresolved:
            self.phase = Phase.READY
            self.control.send("ready", **self._progress())
        elif self.phase is Phase.RUNNING:
            self._look_for_end(now_ns)
        elif self.phase is Phase.CLOSING and not self._unclosed:
            self.phase = Phase.DONE
            self.control.send("result", **self._result())

    def _look_for_end(self, now_ns: int) -> None:
        if not self._unfinished or (self._give_up_ns is not None and now_ns >= self._give_up_ns):
            self._say_sent()
        elif self._stop_ns is not None and now_ns >= self._stop_ns:
            self._stop(now_ns)
        elif self._stop_ns is None and self._give_up_ns is None:
            # packets without a time: the end is when nothing has moved for too long
            sent_bytes = sum(link.sent_bytes for link in self.links)
            if sent_bytes != self._moved[0]:
                self._moved = (sent_bytes, now_ns)
            elif now_ns > self._moved[1] + self._drain_ns:
                self._stop(now_ns)
        if self._give_up_ns is None and self._unfinished and all(link.all_sent for link in self._unfinished):
            # nothing is missing but acknowledgements
            self._stop_ns, self._give_up_ns = None, now_ns + self._close_ns

    def _obey(self, messages: list[Message] | None) -> None:
        if messages is None:
            raise ConnectionAbortedError("mpload is gone")
        for message in messages:
            now_ns = time.monotonic_ns()
            if message["kind"] == "start":
                self._start(message["start_ns"], message["unix_offset_ns"], now_ns)
            elif message["kind"] == "stop":
                self._stop(now_ns)
            elif message["kind"] == "close":
                self._close(now_ns)

    def _start(self, start_ns: int, unix_offset_ns: int, now_ns: int) -> None:
        self.phase, self._moved = Phase.RUNNING, (0, start_ns)
        scenario = self.scenario
        for link in self.links:
            link.start(start_ns, unix_offset_ns)
            if link.state is LinkState.OPEN:
                link.wake_ns = start_ns
            self._settle(link)
        self._unfinished = {link for link in self.links if not link.finished and link.state is not LinkState.DONE}
        ends_ns = [link.schedule.end_ns + self._drain_ns for link in self.links if link.schedule is not None]
        if ends_ns:
            self._stop_ns = max(ends_ns)
        elif scenario.duration_s is not None:
            self._stop_ns = start_ns + int(scenario.duration_s * NS_PER_S)

    def _stop(self, now_ns: int) -> None:
        """Let each link complete its packet, and no more."""
        patience_ns = self._close_ns if self.scenario.protocol == "mps" else self._drain_ns
        self._stop_ns, self._give_up_ns = None, now_ns + patience_ns
        for link in self.links:
            link.stop(now_ns)
            self._settle(link)
        if self.phase is not Phase.RUNNING:
            self._say_sent()

    def _say_sent(self) -> None:
        """Everything is with the kernel; the connections that are open stay so until we are told to close them."""
        self.phase = Phase.SENT
        open_records = [link.records[-1] for link in self.links if link.state is LinkState.OPEN]
        self.control.send("sent", open={record.local_address: record.sent_bytes for record in open_records})

    def _close(self, now_ns: int) -> None:
        self.phase = Phase.CLOSING
        self._unclosed = set(self.links)
        for link in self.links:
            link.begin_close(now_ns)
            self._settle(link)

    # --- what is told

    def _progress(self) -> dict[str, Any]:
        links = self.links
        last_errors = [link.last_error for link in links if link.last_error]
        return {
            "at_ns": time.monotonic_ns(),
            "packets": sum(link.packets for link in links),
            "bytes": sum(link.sent_bytes for link in links),
            "acked": sum(link.acked for link in links),
            "connected": sum(link.state is LinkState.OPEN for link in links),
            "ever_connected": sum(bool(link.records) for link in links),
            "errors": sum(link.errors for link in links),
            "last_error": last_errors[-1] if last_errors else None,
        }

    def _result(self) -> dict[str, Any]:
        lateness, connect, acknowledging = Histogram(), Histogram(), Histogram()
        for link in self.links:
            lateness.merge(link.lateness)
            connect.merge(link.connect)
            acknowledging.merge(link.acknowledging)
        user_s, system_s = cpu_times_s()
        return {
            "clients": [dataclasses.asdict(link.result()) for link in self.links],
            "lateness": lateness.to_json(),
            "connect": connect.to_json(),
            "acknowledging": acknowledging.to_json(),
            "cpu_user_s": user_s,
            "cpu_system_s": system_s,
        }


def cpu_times_s() -> tuple[float, float]:
    """User and kernel time of this process; os.times() would count in hundredths of a second."""
    if sys.platform == "win32":
        times = os.times()
        return times.user, times.system
    import resource  # noqa: PLC0415 - not there on every OS

    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime, usage.ru_stime


def run_sender(scenario: Scenario, clients: range, control: socket.socket, inherited: list[socket.socket]) -> None:
    """The body of a sender process. ``inherited``: the other side's ends of all socket pairs, when it was forked."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; mpload tells us what to do
    for sock in inherited:
        sock.close()
    if sys.platform != "win32":
        from mpserverd.net.fdlimit import raise_descriptor_limit  # noqa: PLC0415 - not there on every OS

        raise_descriptor_limit()
    try:
        Sender(scenario, clients, MessageStream(control)).run()
    except (BrokenPipeError, ConnectionError):
        sys.exit(1)  # whoever wanted the result is gone
