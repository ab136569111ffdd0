"""A network that breaks, between clients and a daemon: a proxy that splits, delays, stalls and cuts what it carries.

Rules: everything it does follows from the seed and the number of the connection. It never changes, adds or reorders a
byte, and forgets some only by ending a connection, as a network does. ``happened`` counts what it did, so that a test
can insist that it did everything. One thread; leaving the ``with`` block ends it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import random
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Self

_End = Callable[[socket.socket], object]

TURN_S = 0.005
CONNECT_S = 5.0
HELD_BYTES_MAX = 64 << 10
"""What lies on the way in one direction; more waits with its sender."""
PIECES = (1, 3, 17, 804, 1460, 65_536)
"""At most so many bytes are passed on at a time."""
HARMLESS = ("split", "delay", "stall")
CUTS = ("reset", "end", "half-dead", "silence")
"""Both ends reset; both closed; the client's end reset while the server's stays open without a word; nothing moves any
more and both are reset later."""


@dataclasses.dataclass
class Direction:
    """From ``source`` to ``target``; ``moved`` counts bytes that were passed on."""

    source: socket.socket
    target: socket.socket
    piece: int
    delay_s: float
    stalls: list[tuple[int, float]]
    """(after so many bytes, for so long), the next one last."""
    cut_after: int
    moved: int = 0
    held: collections.deque[tuple[float, memoryview]] = dataclasses.field(default_factory=collections.deque)
    still_until_s: float = 0.0
    at_end: bool = False
    end_told: bool = False

    @property
    def held_bytes(self) -> int:
        return sum(len(piece) for _, piece in self.held)


@dataclasses.dataclass
class Path:
    """A connection of a client and the one to the server that belongs to it."""

    client: socket.socket
    server: socket.socket
    directions: list[Direction]
    cut: str
    silent_until_s: float = 0.0
    """Nothing moves until then, and then both ends are reset."""


class Network:
    """Listens on ``port`` and connects to ``server_port``, both on 127.0.0.1. ``kinds``: what may happen."""

    def __init__(self, server_port: int, seed: int, kinds: Sequence[str] = (*HARMLESS, *CUTS)) -> None:
        self.happened: collections.Counter[str] = collections.Counter()
        self._server_port = server_port
        self._seed = seed
        self._kinds = set(kinds)
        self._count = 0
        self._paths: list[Path] = []
        self._left_open: list[tuple[float, socket.socket]] = []
        self._selector = selectors.DefaultSelector()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="network")
        self._fault: BaseException | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        if self._fault is not None:
            raise AssertionError(f"the network itself failed, seed {self._seed}") from self._fault

    def calm_down(self) -> None:
        """From now on connections are whole for as long as they like."""
        self._kinds = set()

    # -- the thread

    def _run(self) -> None:
        try:
            while not self._is_over.is_set():
                self._turn()
        except BaseException as fault:
            self._fault = fault
        finally:
            for path in self._paths:
                path.client.close()
                path.server.close()
            for _, sock in self._left_open:
                sock.close()
            self._listener.close()
            self._selector.close()

    def _turn(self) -> None:
        now_s = time.monotonic()
        self._selector.register(self._listener, selectors.EVENT_READ)
        for path in self._paths:
            for direction in path.directions if not path.silent_until_s else ():
                if self._may_read(direction, now_s):
                    self._selector.register(direction.source, selectors.EVENT_READ)
        ready = {key.fileobj for key, _ in self._selector.select(TURN_S)}
        for registered in [key.fileobj for key in self._selector.get_map().values()]:
            self._selector.unregister(registered)
        if self._listener in ready:
            self._accept()
        now_s = time.monotonic()
        for path in list(self._paths):
            self._serve(path, ready, now_s)
        for due in [due for due in self._left_open if due[0] <= now_s]:
            due[1].close()
            self._left_open.remove(due)

    @staticmethod
    def _may_read(direction: Direction, now_s: float) -> bool:
        return not direction.at_end and now_s >= direction.still_until_s and direction.held_bytes < HELD_BYTES_MAX

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        try:
            server = socket.create_connection(("127.0.0.1", self._server_port), CONNECT_S)
        except OSError:
            client.close()  # nobody is there, and the client hears that
            return
        for sock in (client, server):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._count += 1
        self._paths.append(self._path(client, server, random.Random(f"{self._seed} {self._count}")))

    def _path(self, client: socket.socket, server: socket.socket, choose: random.Random) -> Path:
        """Every choice is made whether or not its kind is wanted, so that a seed means the same."""
        cut = choose.choice(CUTS)
        cut_after = [0, 0]
        side = choose.randrange(2)  # lines of answers are short, and few
        cut_after[side] = choose.choice((choose.randrange(1, 60), choose.randrange(60, (400_000, 400)[side])))
        directions = []
        for number, (source, target) in enumerate([(client, server), (server, client)]):
            piece = choose.choice(PIECES)
            delay_s = choose.choice((0.0, choose.uniform(0.001, 0.2)))
            stalls = [(choose.randrange(100_000), choose.uniform(0.3, 2.0)) for _ in range(choose.randrange(3))]
            directions.append(
                Direction(
                    source,
                    target,
                    piece if "split" in self._kinds else HELD_BYTES_MAX,
                    delay_s if "delay" in self._kinds else 0.0,
                    sorted(stalls, reverse=True) if "stall" in self._kinds else [],
                    cut_after[number] if cut in self._kinds else 0,
                )
            )
            self.happened["delay"] += directions[-1].delay_s > 0
        return Path(client, server, directions, cut)

    def _serve(self, path: Path, ready: Collection[object], now_s: float) -> None:
        if path.silent_until_s:
            if now_s >= path.silent_until_s:
                self._end(path, _reset, _reset)
            return
        for direction in path.directions:
            try:
                if direction.source in ready:
                    self._read(direction, now_s)
                self._pass_on(direction, now_s)
            except OSError:  # one end is gone: the other one hears of it
                self._end(path, _reset, _reset)
                return
            if direction.cut_after and direction.moved >= direction.cut_after:
                self._cut(path, now_s)
                return
        if all(direction.end_told for direction in path.directions):
            self._end(path, socket.socket.close, socket.socket.close)

    def _read(self, direction: Direction, now_s: float) -> None:
        try:
            received = direction.source.recv(HELD_BYTES_MAX - direction.held_bytes)
        except BlockingIOError:
            return
        direction.at_end = not received
        if received:
            direction.held.append((now_s + direction.delay_s, memoryview(received)))

    def _pass_on(self, direction: Direction, now_s: float) -> None:
        while direction.held and direction.held[0][0] <= now_s and now_s >= direction.still_until_s:
            due_s, piece = direction.held[0]
            until_cut = direction.cut_after - direction.moved if direction.cut_after else len(piece)
            count = min(direction.piece, len(piece), max(1, until_cut))
            try:
                sent = direction.target.send(piece[:count])
            except BlockingIOError:
                return
            direction.moved += sent
            self.happened["split"] += sent < len(piece)
            direction.held[0] = (due_s, piece[sent:])
            if sent == len(piece):
                direction.held.popleft()
            if direction.stalls and direction.moved >= direction.stalls[-1][0]:
                direction.still_until_s = now_s + direction.stalls.pop()[1]
                self.happened["stall"] += 1
            if direction.cut_after and direction.moved >= direction.cut_after:
                return
        if direction.at_end and not direction.held and not direction.end_told:
            direction.end_told = True
            direction.target.shutdown(socket.SHUT_WR)

    def _cut(self, path: Path, now_s: float) -> None:
        self.happened[path.cut] += 1
        match path.cut:
            case "reset":
                self._end(path, _reset, _reset)
            case "end":
                self._end(path, socket.socket.close, socket.socket.close)
            case "half-dead":
                self._end(path, _reset, lambda server: self._left_open.append((now_s + 5.0, server)))
            case _:
                path.silent_until_s = now_s + 1.0

    def _end(self, path: Path, client_end: _End, server_end: _End) -> None:
        self._paths.remove(path)
        client_end(path.client)
        server_end(path.server)


def _reset(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
