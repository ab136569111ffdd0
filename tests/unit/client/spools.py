"""Servers as docs/protocol.md describes them, as far as a client can tell: what they keep, and what they answer.

Written from the table in *The hello*, and sharing nothing with the client. A packet is a number that says who it is.
"""

from __future__ import annotations

import dataclasses
import re
import struct

from mpserverd.client.buffer import PacketBuffer
from mpserverd.client.servers import Servers
from mpserverd.client.session import CONNECTED_STATES, Session, State, Terms

SIZE = 8
HOLE = -1
HELLO = re.compile(rb"MPS/1 press-7 8(?: epoch=([0-9a-f]{16}))?(?: first=([0-9]+))?( new=1)?\n")


def packed(numbers: range) -> memoryview:
    return memoryview(struct.pack(f"<{len(numbers)}q", *numbers))


@dataclasses.dataclass
class Spool:
    """``epochs`` has the packets of each epoch, the present one last; ``synced`` is what a death leaves of them."""

    name: int = 1
    epochs: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    synced: int = 0
    made: int = 0
    hellos: list[bytes] = dataclasses.field(default_factory=list)

    def add_epoch(self, count: int, epoch: str | None = None) -> None:
        """Packets of somebody else."""
        self.made += 1
        self.epochs[epoch or f"{self.name:08x}{self.made:08x}"] = [HOLE] * count
        self.synced = count

    @property
    def epoch(self) -> str:
        return list(self.epochs)[-1]

    @property
    def packets(self) -> list[int]:
        return self.epochs[self.epoch]

    def answer(self, hello: bytes) -> bytes:
        self.hellos.append(hello)
        found = HELLO.fullmatch(hello)
        assert found is not None, hello
        epoch = None if found[1] is None else found[1].decode()
        first, is_new = int(found[2] or 0), found[3] is not None
        if is_new and (not self.epochs or epoch != self.epoch):
            self.add_epoch(0)
            first = 0
        elif not self.epochs:
            if epoch is not None and (first > 0 or found[2] is None):
                return b"ERR epoch nothing is known of this id\n"
            self.add_epoch(first, epoch)
        elif epoch is not None and epoch != self.epoch:
            return b"ERR epoch another one\n"
        self.packets.extend([HOLE] * (first - len(self.packets)))
        self.synced = len(self.packets)
        return f"OK {len(self.packets)} durable {self.epoch}\n".encode()

    def take(self, content: bytes) -> None:
        self.packets.extend(struct.unpack(f"<{len(content) // SIZE}q", content[: len(content) // SIZE * SIZE]))

    def ack(self) -> bytes:
        self.synced = len(self.packets)
        return f"ACK {self.synced}\n".encode()

    def die(self) -> None:
        if self.epochs:
            del self.packets[self.synced :]


class Wire:
    """A session, its servers, and a clock. ``spools`` has one for each address; ``down`` are not reached."""

    def __init__(self, spools: list[Spool], on_epoch: str = "raise", capacity: int = 100) -> None:
        self.spools, self.now, self.made = spools, 0.0, 0
        self.down: set[int] = set()
        self.buffer = PacketBuffer(SIZE, capacity * SIZE)
        addresses = [("server", number + 1) for number in range(len(spools))]
        servers = Servers(addresses, (0.1, 10.0), 1)
        self.session = Session(Terms("press-7", SIZE, on_epoch=on_epoch), self.buffer, servers)
        self.at = 0
        self.sent = b""

    @property
    def spool(self) -> Spool:
        return self.spools[self.at]

    def put(self, count: int) -> None:
        self.session.make_room(count, self.now)
        self.buffer.append(packed(range(self.made, self.made + count)))
        self.made += count

    def dial(self) -> bytes | None:
        """The next attempt: the hello, or None if the server is down."""
        at = self.session.dial_at
        assert at is not None
        self.now = max(self.now, at)
        self.at = self.session.dial(self.now)[1] - 1
        self.sent = b""
        if self.at in self.down:
            self.session.lost("unreachable", "down", self.now)  # type: ignore[arg-type]
            return None
        return self.session.connected(self.now)

    def greet(self) -> None:
        """One attempt, with an answer if the server is up."""
        hello = self.dial()
        if hello is not None:
            self.hear(self.spool.answer(hello))

    def connect(self) -> State:
        """Until packets may be sent, or the client has given up."""
        for _ in range(20):
            if self.session.state is State.WAITING:
                self.greet()
        return self.session.state

    def hear(self, line: bytes) -> None:
        self.session.receive(line, self.now)

    def send(self, count_bytes: int = 1 << 20) -> None:
        """The server takes what whole packets come of it."""
        while count_bytes and (piece := bytes(self.session.outgoing(count_bytes))):
            self.session.sent(len(piece), self.now)
            self.sent, count_bytes = self.sent + piece, count_bytes - len(piece)
        whole = len(self.sent) // SIZE * SIZE
        if self.session.state is State.STREAMING:
            self.spool.take(self.sent[:whole])
            self.sent = self.sent[whole:]

    def ack(self) -> None:
        self.hear(self.spool.ack())

    def cut(self) -> None:
        if self.session.state in CONNECTED_STATES:
            self.hear(b"")
