"""A message arrives whole or says that it could not leave; what it carries is the receiver's."""

from __future__ import annotations

import fcntl
import os
import resource
import socket
import threading
from collections.abc import Iterator

import pytest

from mpserverd.net.channel import MESSAGE_BYTES_MAX, Channel, Kind, Message


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    one, other = (Channel(end) for end in Channel.pair())
    yield one, other
    one.close()
    other.close()


def test_a_message_arrives_as_it_was_sent(ends: tuple[Channel, Channel]) -> None:
    sent = Message(Kind.ENDED, row=7, value=1 << 63, reason=3, payload={"text": "naïve", "count": 5})
    assert ends[0].send(sent)
    assert ends[1].receive() == sent
    assert ends[1].receive() is None


def test_a_descriptor_becomes_one_of_the_receiver(ends: tuple[Channel, Channel]) -> None:
    read_fd, write_fd = os.pipe()
    assert ends[0].send(Message(Kind.ATTACH, row=1, fd=read_fd))
    message = ends[1].receive()
    assert message is not None
    assert message.fd not in {-1, read_fd}
    os.write(write_fd, b"x")
    assert os.read(message.fd, 1) == b"x"
    for fd in (read_fd, write_fd, message.fd):
        os.close(fd)


@pytest.mark.parametrize("length", [MESSAGE_BYTES_MAX - 100, MESSAGE_BYTES_MAX, 100_000])
@pytest.mark.parametrize("letter", ["a", "é", '"'])
def test_a_text_that_is_too_long_is_cut_and_stays_readable(
    ends: tuple[Channel, Channel], length: int, letter: str
) -> None:
    assert ends[0].send(Message(Kind.EVENT, payload={"text": letter * length, "stream": "press-7"}))
    message = ends[1].receive()
    assert message is not None
    assert message.payload is not None
    assert message.payload["stream"] == "press-7"
    assert message.payload["text"].startswith(letter * 60)


def test_a_full_queue_is_said_and_loses_nothing(ends: tuple[Channel, Channel]) -> None:
    count = 0
    while ends[0].send(Message(Kind.NEED, value=count)):
        count += 1
    got = [ends[1].receive() for _ in range(count)]
    assert [message.value for message in got if message is not None] == list(range(count))


def test_the_end_of_the_peer_is_an_error_of_its_own(ends: tuple[Channel, Channel]) -> None:
    ends[0].close()
    with pytest.raises(EOFError):
        ends[1].receive()
    with pytest.raises(OSError, match="pipe"):
        ends[1].send(Message(Kind.READY))


def drained(channel: Channel) -> None:
    while channel.receive() is not None:
        pass


def test_room_is_awaited_on_a_number_that_is_past_those_of_select() -> None:
    """With 1,000 clients the supervisor gives its next child such a number."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2048, limit[1]), limit[1]))
    near, far = Channel.pair()
    try:
        channel = Channel(socket.socket(fileno=fcntl.fcntl(near, fcntl.F_DUPFD_CLOEXEC, 1024)))
        while channel.send(Message(Kind.DRAINED)):
            pass
        channel.await_room(0.01)
        assert not channel.send(Message(Kind.DRAINED))
        reader = threading.Thread(target=drained, args=(Channel(far),))
        reader.start()
        channel.await_room(60)
        assert channel.send(Message(Kind.DRAINED))
        reader.join()
        channel.close()
    finally:
        near.close()
        far.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
