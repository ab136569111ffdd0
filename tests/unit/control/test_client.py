"""The asking side of the control socket: every way in which a daemon can fail to answer has a clear end."""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from pathlib import Path

import pytest

from mpserverd.control.client import DaemonRefusedError, request, request_state
from mpserverd.control.messages import REPLY_BYTES_MAX, Reply, Request
from mpserverd.errors import ProtocolError, UnreachableError, UsageError
from tests.unit.control.fake_server import replying, serving, silent


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


def descriptor_count() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_request_carries_its_arguments_and_gets_the_result(path: Path) -> None:
    with serving(path, replying(Reply(True, {"connections": []}).encode())) as requests:
        assert request(str(path), "kick", target="pump-7") == {"connections": []}
    assert requests == [Request("kick", {"target": "pump-7"})]


def test_an_answer_in_many_pieces_is_put_together(path: Path) -> None:
    def answer(sock: socket.socket, _: Request) -> None:
        for byte in Reply(True, list(range(100))).encode():
            sock.send(bytes([byte]))

    with serving(path, answer):
        assert request(str(path), "events") == list(range(100))


def test_a_long_answer_is_read_to_its_end(path: Path) -> None:
    text = "x" * 3_000_000
    with serving(path, replying(Reply(True, text).encode())):
        assert request(str(path), "events") == text


def test_what_the_daemon_refuses_comes_with_its_words_and_exit_code(path: Path) -> None:
    refusal = replying(Reply.fault("no connection is called 'x'", 2).encode())
    with serving(path, refusal), pytest.raises(DaemonRefusedError, match="no connection is called") as caught:
        request(str(path), "kick", target="x")
    assert caught.value.exit_code == 2


def test_a_missing_socket_asks_whether_the_daemon_runs(path: Path) -> None:
    with pytest.raises(UnreachableError, match="no such socket; is mpserverd running"):
        request(str(path), "ping")
    with pytest.raises(UnreachableError, match="no such socket"):
        request(str(path / "below"), "ping")


def test_a_socket_that_a_dead_daemon_left_says_so(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with pytest.raises(UnreachableError, match="not running") as caught:
        request(str(path), "ping")
    assert caught.value.exit_code == 3


def test_a_file_that_is_no_socket_says_that_nobody_listens(path: Path) -> None:
    path.write_text("")
    with pytest.raises(UnreachableError, match="nobody listens"):
        request(str(path), "ping")


def test_a_missing_permission_names_the_group(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Forbidden(socket.socket):
        def connect(self, _: object) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("mpserverd.control.client.socket.socket", Forbidden)
    with pytest.raises(UnreachableError, match="group mpserverd"):
        request(str(path), "ping")


def test_a_path_that_no_socket_can_have_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="at most 107 bytes"):
        request("/" + "x" * 107, "ping")


def test_a_silent_daemon_is_given_up_at_the_deadline(path: Path) -> None:
    with serving(path, silent):
        started_s = time.monotonic()
        with pytest.raises(UnreachableError, match=r"no answer within 0\.05 s"):
            request(str(path), "ping", deadline_s=0.05)
        assert time.monotonic() - started_s < 2


def test_a_daemon_that_dribbles_is_given_up_at_the_deadline_too(path: Path) -> None:
    def dribble(sock: socket.socket, _: Request) -> None:
        while not select.select([sock], [], [], 0.001)[0]:
            sock.sendall(b" ")

    with serving(path, dribble), pytest.raises(UnreachableError, match="no answer within"):
        request(str(path), "ping", deadline_s=0.05)


def test_a_daemon_that_hangs_up_is_unreachable(path: Path) -> None:
    with serving(path, lambda sock, _: None), pytest.raises(UnreachableError, match="without an answer"):
        request(str(path), "ping")
    with serving(path, replying(b'{"ok": true')), pytest.raises(UnreachableError, match="without an answer"):
        request(str(path), "ping")


@pytest.mark.parametrize("line", [b"\xff\xfe\n", b"[]\n", b'{"ok": false}\n', b"\n", b'{"ok": 1}\n'])
def test_nonsense_is_a_protocol_error(path: Path, line: bytes) -> None:
    with serving(path, replying(line)), pytest.raises(ProtocolError):
        request(str(path), "ping")


def test_an_endless_answer_is_cut_off(path: Path) -> None:
    with serving(path, replying(b" " * (REPLY_BYTES_MAX + 4096))), pytest.raises(ProtocolError, match="more than"):
        request(str(path), "ping")


def test_the_state_comes_with_two_descriptors_of_the_caller(path: Path, tmp_path: Path) -> None:
    files = [os.open(tmp_path, os.O_RDONLY) for _ in range(2)]
    before = descriptor_count()
    with serving(path, replying(Reply(True, {"version": "1"}).encode(), *files)):
        facts, one, other = request_state(str(path))
        assert facts == {"version": "1"}
        assert os.fstat(one).st_ino == os.fstat(other).st_ino == os.stat(tmp_path).st_ino
        assert not os.get_inheritable(one)
        for fd in (one, other):
            os.close(fd)
    assert descriptor_count() == before
    for fd in files:
        os.close(fd)


@pytest.mark.parametrize("count", [0, 1])
def test_a_state_without_its_descriptors_is_an_error_and_leaves_none_open(
    path: Path, tmp_path: Path, count: int
) -> None:
    files = [os.open(tmp_path, os.O_RDONLY) for _ in range(count)]
    before = descriptor_count()
    with serving(path, replying(Reply(True, {}).encode(), *files)), pytest.raises(ProtocolError, match="descriptors"):
        request_state(str(path))
    assert descriptor_count() == before
    for fd in files:
        os.close(fd)


def test_descriptors_that_nobody_asked_for_are_closed(path: Path, tmp_path: Path) -> None:
    file = os.open(tmp_path, os.O_RDONLY)
    before = descriptor_count()
    with serving(path, replying(Reply(True, {}).encode(), file)):
        request(str(path), "ping")
    with serving(path, replying(b"nonsense\n", file)), pytest.raises(ProtocolError):
        request_state(str(path))
    assert descriptor_count() == before
    os.close(file)
