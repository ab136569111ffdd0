"""The process of ``mpload chaos`` that all of its clients live in: a program of its own, with nothing of the daemon's.

    to it      plan {seed, targets, clients}    finish
    from it    progress {…}   pauses {…}   streams {…}   trouble {text}   result {…}; a result is the last one

It ends when whoever started it is gone.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import select
import signal
import socket
import sys
import time
from typing import Any

from mpserverd.load.chaos_client import ChaosClient, ClientState
from mpserverd.load.chaos_plan import ClientPlan, Habit
from mpserverd.load.messages import Message, MessageStream

PROGRESS_NS = 250_000_000
PAUSE_NS_MIN = 5_000_000
"""Shorter ones are the kernel's own, with the small buffers that clients have."""
PAUSES_MAX = 1_000
"""Of one report; more are merged into the longest ones."""
TROUBLES_MAX = 200


class ChaosClients:
    """Runs until every client is done; then says the result."""

    def __init__(self, control: MessageStream) -> None:
        self._control = control
        self._epoll = select.epoll()
        self._clients: list[ChaosClient] = []
        self._registered: dict[ChaosClient, tuple[socket.socket, int]] = {}
        self._by_fd: dict[int, ChaosClient] = {}
        self._wakes: list[tuple[int, int, ChaosClient]] = []
        self._order = itertools.count()
        self._pauses: list[tuple[int, int]] = []
        self._troubles = 0
        self._progress_ns = 0
        self._epoll.register(control.fileno(), select.EPOLLIN)

    def run(self) -> None:
        while not self._clients or any(client.state is not ClientState.DONE for client in self._clients):
            now_ns = time.monotonic_ns()
            self._wake_due(now_ns)
            if now_ns >= self._progress_ns + PROGRESS_NS:
                self._report(now_ns)
            for fd, events in self._epoll.poll(self._sleep_s()):
                if fd == self._control.fileno():
                    self._obey(self._control.receive())
                elif (client := self._by_fd.get(fd)) is not None:
                    client.serve(events, time.monotonic_ns())
                    self._settle(client)
        self._report(time.monotonic_ns())
        self._control.send("result", **self._totals())

    def _sleep_s(self) -> float:
        next_ns = self._progress_ns + PROGRESS_NS
        if self._wakes:
            next_ns = min(next_ns, self._wakes[0][0])
        return max(0, next_ns - time.monotonic_ns()) / 1e9

    def _wake_due(self, now_ns: int) -> None:
        due = []
        while self._wakes and self._wakes[0][0] <= now_ns:
            wake_ns, _, client = heapq.heappop(self._wakes)
            if client.wake_ns == wake_ns:
                due.append(client)
        for client in due:
            if client.wake_ns is not None:
                client.wake(now_ns)
                self._settle(client)

    def _settle(self, client: ChaosClient) -> None:
        """Make epoll and heap agree with what the client waits for, and take what it has to tell."""
        known = self._registered.get(client)
        if known is not None and known[0] is not client.sock:
            self._forget(client)  # it is closed, and epoll has let go of it by that
            known = None
        if client.sock is not None and (known is None or known[1] != client.wants):
            change = self._epoll.register if known is None else self._epoll.modify
            change(client.sock.fileno(), client.wants)
            self._by_fd[client.sock.fileno()] = client
            self._registered[client] = (client.sock, client.wants)
        if client.wake_ns is not None:
            heapq.heappush(self._wakes, (client.wake_ns, next(self._order), client))
        self._pauses += [pause for pause in client.pauses if pause[1] - pause[0] >= PAUSE_NS_MIN]
        client.pauses.clear()
        for text in client.troubles:
            self._troubles += 1
            if self._troubles <= TROUBLES_MAX:
                self._control.send("trouble", text=text)
        client.troubles.clear()

    def _forget(self, client: ChaosClient) -> None:
        del self._registered[client]
        self._by_fd = {fd: each for fd, each in self._by_fd.items() if each is not client}

    def _obey(self, messages: list[Message] | None) -> None:
        if messages is None:
            raise ConnectionAbortedError("mpload is gone")
        now_ns = time.monotonic_ns()
        for message in messages:
            if message["kind"] == "plan":
                self._begin(message)
            elif message["kind"] == "finish":
                for client in self._clients:
                    client.finish(now_ns)
                    self._settle(client)

    def _begin(self, message: Message) -> None:
        for fields in message["clients"]:
            plan = ClientPlan(**{**fields, "habit": Habit(fields["habit"])})
            target = message["targets"][str(plan.packet_size)]
            self._clients.append(ChaosClient(plan, (target[0], target[1]), message["seed"]))
            self._settle(self._clients[-1])

    def _report(self, now_ns: int) -> None:
        self._progress_ns = now_ns
        streams = [stream for client in self._clients for stream in client.streams]
        for client in self._clients:
            client.streams.clear()
        if streams:
            self._control.send("streams", streams=[dataclasses.asdict(stream) for stream in streams])
        if self._pauses:
            longest = sorted(self._pauses, key=lambda pause: pause[0] - pause[1])[:PAUSES_MAX]
            self._control.send("pauses", pauses=longest)
            self._pauses.clear()
        self._control.send("progress", **self._totals())

    def _totals(self) -> dict[str, Any]:
        now_ns = time.monotonic_ns()
        clients = self._clients
        names = [field.name for field in dataclasses.fields(clients[0].totals)] if clients else []
        totals = {name: sum(getattr(client.totals, name) for client in clients) for name in names}
        totals["longest_pause_ns"] = max([0, *(client.longest_pause_ns(now_ns) for client in clients)])
        totals["connected"] = sum(client.state is ClientState.OPEN for client in clients)
        return totals


def plan_message(plans: list[ClientPlan], targets: dict[int, tuple[str, int]], seed: int) -> dict[str, Any]:
    """The fields of ``plan``."""
    clients = [{**dataclasses.asdict(plan), "habit": plan.habit.value} for plan in plans]
    return {"clients": clients, "targets": {str(size): target for size, target in targets.items()}, "seed": seed}


def main(control_fd: int) -> None:
    """The program; it is given one end of a socket pair."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; mpload tells us what to do
    with socket.socket(fileno=control_fd) as control:
        try:
            ChaosClients(MessageStream(control)).run()
        except (BrokenPipeError, ConnectionError):
            sys.exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
