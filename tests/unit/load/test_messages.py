"""Messages between mpload and its senders survive being cut anywhere, and tell of the other side's end."""

from __future__ import annotations

import socket

from mpserverd.load.messages import MessageStream


def test_messages_arrive_whole_and_in_order_however_they_are_cut() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        stream = MessageStream(theirs)
        received = []
        for byte in b'{"kind":"a","n":1}\n{"kind":"b"}\n':
            ours.send(bytes([byte]))
            received += stream.receive() or []
        assert received == [{"kind": "a", "n": 1}, {"kind": "b"}]


def test_the_end_comes_after_everything_that_was_said() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            MessageStream(ours).send("result", clients=[1, 2])
        stream = MessageStream(theirs)
        assert stream.receive() == [{"kind": "result", "clients": [1, 2]}]
        assert stream.receive() is None


def test_progress_is_left_out_when_nobody_reads() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        stream = MessageStream(ours)
        sent = 0
        while stream.try_send("progress", text="x" * 1000):
            sent += 1
        assert 0 < sent < 100_000
        assert len(MessageStream(theirs).receive() or []) == sent
