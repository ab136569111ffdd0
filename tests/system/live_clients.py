"""Clients outside the machine: a process of the host that shares its network only. Nothing here is the project's.

    nsenter -t LEADER -n -- python tests/system/live_clients.py PORT FAST STEADY SLOW

FAST clients send 4 MB/s each, STEADY ones 160,800 bytes/s, SLOW ones some packets a second. One thread, plain sockets.
Pieces are cut anywhere, hashed as the kernel takes them. Whatever the server says or closes before the end is a
disconnect. Orders come by stdin, one word a line, and each is answered by a line of JSON:

    mark   answered once each has sent another piece: longest pause of any since the last mark, and what went wrong
    end    whole packets, FIN, and the server's FIN awaited: hash of every client's bytes, and what went wrong

A pause is the time from the first byte that the kernel would not take to the next one that it took. Send buffers are
small, so that a FAST client notices within some 40 ms that nobody reads.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import random
import resource
import selectors
import socket
import sys
import time

PACKET_BYTES = 16
KINDS = ((80_000, 0.02), (3_216, 0.02), (48, 1.0))
"""Bytes a piece on average, and seconds between two."""
SEND_BUFFER_BYTES = 16_384
SETTLE_S = 60.0
"""So long the server may take to close what has ended."""


class Client:
    def __init__(self, number: int, port: int, piece_bytes: int, interval_s: float) -> None:
        self.piece_bytes, self.interval_s = piece_bytes, interval_s
        self.sent_bytes, self.pieces = 0, 0
        self.digest, self.failure, self.over = hashlib.sha256(), "", False
        self.unsent = memoryview(b"")
        self.blocked_s = 0.0
        """Since when the kernel takes no more; 0 when it does."""
        self.chance = random.Random(number)
        self.sock = socket.socket()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self.sock.connect(("127.0.0.1", port))
        self.sock.setblocking(False)
        self.port = self.sock.getsockname()[1]

    def due(self, now_s: float) -> float:
        """Make the next piece, unless the last one is not sent yet; when the one after it is due."""
        if not self.unsent:
            self.unsent = memoryview(self.chance.randbytes(self.chance.randrange(1, 2 * self.piece_bytes)))
        return now_s + self.interval_s

    def pad(self) -> None:
        """After what is unsent, so much that the last packet is whole."""
        size = self.sent_bytes + len(self.unsent)
        self.unsent = memoryview(bytes(self.unsent) + self.chance.randbytes(-size % PACKET_BYTES))

    def send(self, now_s: float) -> float:
        """Give the kernel what it takes; how long it had taken nothing."""
        try:
            count = self.sock.send(self.unsent)
        except BlockingIOError:
            count = 0
        pause_s = now_s - self.blocked_s if count and self.blocked_s else 0.0
        if count:
            self.digest.update(self.unsent[:count])
            self.unsent, self.sent_bytes, self.blocked_s = self.unsent[count:], self.sent_bytes + count, 0.0
        if self.unsent:
            self.blocked_s = self.blocked_s or now_s
        else:
            self.pieces += 1
        return pause_s


class Clients:
    """``_told``: the last turn found something on stdin."""

    def __init__(self, port: int, counts: list[int]) -> None:
        self._told = False
        kinds = [kind for kind, count in zip(KINDS, counts, strict=True) for _ in range(count)]
        self.all = [Client(number, port, *kind) for number, kind in enumerate(kinds)]
        self.poll = selectors.DefaultSelector()
        self.poll.register(sys.stdin.fileno(), selectors.EVENT_READ)
        for client in self.all:
            self.poll.register(client.sock, selectors.EVENT_READ, client)
        self.longest_pause_s = 0.0
        now_s = time.monotonic()
        self.times = [(now_s + each.chance.random() * each.interval_s, n) for n, each in enumerate(self.all)]
        heapq.heapify(self.times)

    def run(self) -> None:
        """Until stdin ends."""
        orders, marked = "", list[int]()
        self._answer(connected=len(self.all))
        while True:
            self._turn()
            if marked and all(each.pieces > was or each.failure for each, was in zip(self.all, marked, strict=True)):
                self._answer(longest_pause_s=self._take_longest_pause(), failures=self._failures())
                marked = []
            if not self._told:
                continue
            text = os.read(sys.stdin.fileno(), 4096).decode()
            if not text:
                return
            *words, orders = (orders + text).split("\n")
            for word in words:
                if word == "mark":
                    marked = [each.pieces for each in self.all]
                elif word == "end":
                    self._end()

    def _turn(self, ending: bool = False) -> None:
        self._told = False
        now_s = time.monotonic()
        while not ending and self.times[0][0] <= now_s:
            _, number = self.times[0]
            client = self.all[number]
            heapq.heapreplace(self.times, (client.due(now_s), number))
            if not client.blocked_s:
                self._send(client)
        for key, events in self.poll.select(0.002):
            if key.data is None:
                self._told = True
            elif events & selectors.EVENT_READ:
                self._hear(key.data)
            else:
                self._send(key.data)

    def _send(self, client: Client) -> None:
        if client.failure or client.over:
            return
        was_blocked = client.blocked_s > 0
        try:
            pause_s = client.send(time.monotonic())
        except OSError as error:
            self._lost(client, str(error))
            return
        self.longest_pause_s = max(self.longest_pause_s, pause_s)
        if was_blocked != (client.blocked_s > 0):
            write = selectors.EVENT_WRITE if client.blocked_s else 0
            self.poll.modify(client.sock, selectors.EVENT_READ | write, client)

    def _hear(self, client: Client) -> None:
        try:
            said = client.sock.recv(100)
        except OSError as error:
            self._lost(client, str(error))
            return
        if client.over and not said:
            self.poll.unregister(client.sock)
            client.sock.close()
        else:
            self._lost(client, f"the server said {said!r}" if said else "the server closed the connection")

    def _lost(self, client: Client, why: str) -> None:
        client.failure = f"port {client.port} after {client.sent_bytes} bytes: {why}"
        client.unsent = memoryview(b"")
        self.poll.unregister(client.sock)
        client.sock.close()

    def _failures(self) -> list[str]:
        return [each.failure for each in self.all if each.failure]

    def _take_longest_pause(self) -> float:
        now_s = time.monotonic()
        present_s = [now_s - each.blocked_s for each in self.all if each.blocked_s and not each.failure]
        longest_s, self.longest_pause_s = max([self.longest_pause_s, *present_s]), 0.0
        return longest_s

    def _end(self) -> None:
        end_s = time.monotonic() + SETTLE_S
        for client in self.all:
            if not client.failure:
                client.pad()
                self._send(client)
        while time.monotonic() < end_s and any(each.sock.fileno() >= 0 for each in self.all):
            for client in self.all:
                if not client.unsent and not client.over and not client.failure:
                    client.over = True
                    client.sock.shutdown(socket.SHUT_WR)
            self._turn(ending=True)
        late = [f"port {each.port}: the server does not close it" for each in self.all if each.sock.fileno() >= 0]
        self._answer(
            digests=[each.digest.hexdigest() for each in self.all],
            sent_bytes=sum(each.sent_bytes for each in self.all),
            failures=self._failures() + late,
        )

    def _answer(self, **answer: object) -> None:
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    Clients(int(sys.argv[1]), [int(each) for each in sys.argv[2:]]).run()
