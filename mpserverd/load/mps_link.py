"""One load client of an mps server: it says hello, keeps what is not acknowledged, and goes on where the server says.

    CONNECTING -> GREETING -> OPEN: the hello is sent, the server says OK, packets follow from the index that it named

Rules: nothing is stored here, because a packet can be made again from its index; an unacknowledged packet that is sent
once more has the bytes that it had the first time (flat out: all but its time). The first hello asks for a new epoch at
0, so that a run has streams of its own; every later one names the epoch and the oldest packet that is not
acknowledged. The latency of an acknowledgement is taken from when the batch was due, whatever delayed it since.

A server that asks for an acknowledged packet again has broken its promise: counted, and sent again.
"""

from __future__ import annotations

from collections import deque

from mpserverd.client.pacing import NS_PER_S
from mpserverd.client.packets import PacketBlock
from mpserverd.load.link import READ, ClientResult, ConnectionRecord, Link, LinkState, error_name
from mpserverd.load.scenario import Scenario
from mpserverd.protocol.mps import Ack, Answer, AnswerError, AnswerReader, Bye, Hello, Ok, Refusal

LAST_WORDS_READS_MAX = 64
"""What a server said before it broke the connection: a few lines, however much more it has sent."""


class MpsLink(Link):
    """The client ``client`` of a scenario with ``protocol`` mps."""

    def __init__(self, scenario: Scenario, client: int, block: PacketBlock, *, shared_block: bool) -> None:
        super().__init__(scenario, client, block, shared_block=shared_block)
        self.client_id = scenario.client_id(client)
        self.epoch: int | None = None
        self.level: str | None = None
        self.resent, self.withdrawn = 0, 0
        self.acked_ns: int | None = None
        self._answers = AnswerReader()
        self._made, self._batch = 0, 0
        self._blocks: deque[tuple[int, int]] = deque()
        """Flat out: (index after it, when it was made) of each block that is not acknowledged."""

    # --- the hello and what comes back

    def _on_connected(self, now_ns: int) -> None:
        assert self.sock is not None
        self._move(LinkState.GREETING)
        self.wants, self._answers = READ, AnswerReader()  # wake_ns stays: one deadline for the whole attempt
        first = None if self.epoch is None else self.acked
        hello = Hello(self.client_id, self.scenario.packet_size, epoch=self.epoch, first=first, new=self.epoch is None)
        line = hello.to_line()
        try:
            if self.sock.send(line) == len(line):
                return
            reason = "hello_stalled"  # a fresh connection takes 512 bytes
        except OSError as error:
            reason = error_name(error)
        self._break(now_ns, reason)

    def on_timeout(self, now_ns: int) -> None:
        if self.state is LinkState.GREETING:
            self._lose_greeting(now_ns, "hello_timeout")
        else:
            super().on_timeout(now_ns)

    def _on_received(self, received: bytes, now_ns: int) -> None:
        try:
            for answer in self._answers.feed(received):
                self._hear(answer, now_ns)
                if self.sock is None:
                    return
        except AnswerError:
            self._break(now_ns, "protocol")

    def _hear(self, answer: Answer, now_ns: int) -> None:
        if isinstance(answer, Ack) and self.state in (LinkState.OPEN, LinkState.CLOSING):
            if answer.next_packet > self._sent_packets():
                raise AnswerError(f"an acknowledgement of packet {answer.next_packet - 1}, which was never sent")
            self._acknowledge(answer.next_packet, now_ns)
            self._backoff.reset()  # this server does its work, so the next pause is short again
        elif isinstance(answer, Ok) and self.state is LinkState.GREETING:
            self._go_on(answer, now_ns)
        elif isinstance(answer, Bye):
            self._leave(answer, now_ns)
        elif isinstance(answer, Refusal):
            self._be_refused(answer, now_ns)
        else:
            raise AnswerError(f"{answer} to a client that is {self.state.value}")

    def _go_on(self, ok: Ok, now_ns: int) -> None:
        """Packets follow from the one that the server wants next."""
        wrong = self._what_is_wrong(ok)
        if wrong is not None:
            self._count_error(wrong)
            self._end(LinkState.DONE)
            return
        self.epoch, self.level = ok.epoch, ok.level.value
        if ok.next_packet < self.acked:
            self.withdrawn += self.acked - ok.next_packet
            self._count_error("acknowledged_is_gone")
            self.acked = ok.next_packet
        self._acknowledge(ok.next_packet, now_ns)
        self.index, self._pending = ok.next_packet, None
        self._open(now_ns, ok.next_packet)
        if self.begin_ns:
            self.wake_ns = now_ns

    def _what_is_wrong(self, ok: Ok) -> str | None:
        """A reason to have nothing to do with this server; it would answer the same again."""
        if self.epoch is None:
            return "not_a_new_stream" if ok.next_packet else None
        if ok.epoch != self.epoch:
            return "other_epoch"
        return "beyond_what_was_sent" if ok.next_packet > self.packets else None

    def _acknowledge(self, next_packet: int, now_ns: int) -> None:
        if next_packet <= self.acked:
            return
        self.acked, self.acked_ns = next_packet, now_ns
        while self._blocks and self._blocks[0][0] <= next_packet:
            self.acknowledging.add(now_ns - self._blocks.popleft()[1])
        if self.schedule is not None:
            while self._batch < next_packet and self.schedule.batch_end(self._batch) <= next_packet:
                self.acknowledging.add(now_ns - self.schedule.due_ns(self._batch))
                self._batch = self.schedule.batch_end(self._batch)

    def _be_refused(self, refusal: Refusal, now_ns: int) -> None:
        """For good when the same hello would be refused again."""
        self._lose_greeting(now_ns, f"refused_{refusal.code}", final=refusal.is_final)

    def _lose_greeting(self, now_ns: int, reason: str, *, final: bool = False) -> None:
        self._count_error(reason)
        if self.state is not LinkState.GREETING and self.records:
            self.records[-1].broken = reason
        self._pending = None
        self._end(LinkState.DONE if final or self.state is LinkState.CLOSING else LinkState.WAITING)
        if self.state is LinkState.WAITING:
            self.wake_ns = now_ns + self._backoff.next_ns()

    def _leave(self, bye: Bye, now_ns: int) -> None:
        """The server ends the connection in order: come back later, not before it says so."""
        if self.state is not LinkState.GREETING:
            self.records[-1].bye = bye.reason
        self._pending = None
        self._end(LinkState.DONE if self.state is LinkState.CLOSING else LinkState.WAITING)
        if self.state is LinkState.WAITING:
            self.wake_ns = now_ns + max(self._backoff.next_ns(), (bye.retry_s or 0) * NS_PER_S)

    # --- a connection that breaks

    def _break(self, now_ns: int, reason: str, then: LinkState = LinkState.WAITING) -> None:
        """What the server said before counts: it may have been a goodbye, or why it refused."""
        if reason != "protocol" and self._heard_the_end(now_ns):
            return
        if self.state is LinkState.GREETING:
            self._lose_greeting(now_ns, "hello_unanswered" if reason == "closed_by_peer" else f"connect_{reason}")
        else:
            super()._break(now_ns, reason, then)

    def _heard_the_end(self, now_ns: int) -> bool:
        """Read what is left of the server's words; True when they ended the connection."""
        for _ in range(LAST_WORDS_READS_MAX):
            try:
                received = self.sock.recv(1 << 16) if self.sock is not None else b""
            except OSError:
                break
            if not received:
                break
            self._on_received(received, now_ns)
        return self.sock is None

    def _drop_torn(self, record: ConnectionRecord) -> None:
        self._pending = None

    def begin_close(self, now_ns: int) -> None:
        if self.state is LinkState.OPEN and not self.finished:
            self._break(now_ns, "unacknowledged", LinkState.DONE)
        else:
            super().begin_close(now_ns)

    # --- sending

    @property
    def finished(self) -> bool:
        return self._pending is None and self.acked >= self.index_end

    def stop(self, now_ns: int) -> None:
        """Send no more than what completes the packet in progress, and what was sent before and must be sent again."""
        if self.state is not LinkState.OPEN:
            self._pending = None
            self.index = min(self.index, self.packets)
        index_end = self.index_end
        super().stop(now_ns)
        self.index_end = min(max(self.index, self.packets), index_end)

    def _note_block(self, end: int, stamp_ns: int) -> None:
        if end <= self._made:
            self._pending_due_ns = None  # its lateness was counted the first time
            return
        self._made = end
        if self.schedule is None:
            self._blocks.append((end, stamp_ns))

    def _sent_packets(self) -> int:
        """Index after the last packet that this connection has carried whole."""
        record = self.records[-1]
        return record.first_index + record.sent_bytes // self.scenario.packet_size

    def _count_sent(self, sent: memoryview) -> None:
        """A packet that is sent again is counted as such, not as one more."""
        before, known = self._sent_packets(), self.packets
        super()._count_sent(sent)
        self.packets = max(known, self._sent_packets())
        self.resent += self._sent_packets() - before - (self.packets - known)

    def result(self) -> ClientResult:
        self.index = max(self.index, self.packets)
        result = super().result()
        result.client_id, result.level = self.client_id, self.level
        result.epoch = None if self.epoch is None else f"{self.epoch:016x}"
        result.packets_acked, result.packets_resent, result.packets_withdrawn = self.acked, self.resent, self.withdrawn
        result.acked_s = None if self.acked_ns is None else max(0, self.acked_ns - self.begin_ns) / NS_PER_S
        return result
