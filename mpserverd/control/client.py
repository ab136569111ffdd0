"""The asking side of the control socket: one request, one reply, within a deadline.

Rules: a daemon that is not there, is not ours to ask or does not answer is an UnreachableError whose text says what to
do; what the daemon refuses is raised with the daemon's words and exit code. Descriptors that come with a reply belong
to the caller, and those of a failed exchange are closed.

What the replies mean is not known here.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
import time
from typing import Any

from mpserverd.control.messages import REPLY_BYTES_MAX, STATE_DESCRIPTORS, Reply, Request
from mpserverd.errors import MpserverdError, ProtocolError, UnreachableError, UsageError
from mpserverd.limits import SOCKET_PATH_BYTES_MAX

DEADLINE_S = 5.0
GROUP = "mpserverd"
_READ_BYTES = 256 * 1024


class DaemonRefusedError(MpserverdError):
    """The daemon understood and said no; its text, and the exit code that it asked for."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def request(socket_path: str, command: str, *, deadline_s: float = DEADLINE_S, **arguments: Any) -> Any:
    """The result of one command. Raises UnreachableError, DaemonRefusedError or ProtocolError."""
    result, fds = exchange(socket_path, Request(command, arguments), deadline_s)
    _close(fds)
    return result


def request_state(socket_path: str, *, deadline_s: float = DEADLINE_S) -> tuple[dict[str, Any], int, int]:
    """Facts, and descriptors of the state table and of the chunk table, both read-only. The caller closes them."""
    facts, fds = exchange(socket_path, Request("state"), deadline_s)
    if len(fds) != STATE_DESCRIPTORS or not isinstance(facts, dict):
        _close(fds)
        raise ProtocolError(f"{socket_path}: the answer to state has {len(fds)} descriptors, not {STATE_DESCRIPTORS}")
    return facts, fds[0], fds[1]


def exchange(socket_path: str, message: Request, deadline_s: float) -> tuple[Any, list[int]]:
    """Send the request and read its reply to the end of the line."""
    line = message.encode()
    if len(os.fsencode(socket_path)) > SOCKET_PATH_BYTES_MAX:
        raise UsageError(f"{socket_path}: a socket's path has at most {SOCKET_PATH_BYTES_MAX} bytes")
    until_s = time.monotonic() + deadline_s
    fds: list[int] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            _wait_at_most(sock, until_s)
            sock.connect(socket_path)
            sock.sendall(line)
            reply = Reply.decode(_read_line(sock, until_s, fds))
            if not reply.ok:
                raise DaemonRefusedError(reply.error, reply.exit_code)
        except TimeoutError:
            _close(fds)
            raise UnreachableError(f"{socket_path}: mpserverd gave no answer within {deadline_s:g} s") from None
        except OSError as error:
            _close(fds)
            raise UnreachableError(f"{socket_path}: {_explain(error)}") from error
        except MpserverdError:
            _close(fds)
            raise
    return reply.result, fds


def _read_line(sock: socket.socket, until_s: float, fds: list[int]) -> bytes:
    """Everything up to the newline; descriptors are appended to ``fds``."""
    parts: list[bytes] = []
    length = 0
    while True:
        _wait_at_most(sock, until_s)
        content, rights, _, _ = sock.recvmsg(
            _READ_BYTES, socket.CMSG_SPACE(STATE_DESCRIPTORS * 4), socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, raw in rights:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(raw[: len(raw) - len(raw) % received.itemsize])
                fds.extend(received)
        if not content:
            raise UnreachableError("mpserverd closed the connection without an answer; it may be stopping")
        head, newline, _ = content.partition(b"\n")
        parts.append(head)
        length += len(head)
        if newline:
            return b"".join(parts)
        if length > REPLY_BYTES_MAX:
            raise ProtocolError(f"a reply of more than {REPLY_BYTES_MAX} bytes")


def _wait_at_most(sock: socket.socket, until_s: float) -> None:
    left_s = until_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    sock.settimeout(left_s)


def _explain(error: OSError) -> str:
    if error.errno in {errno.ENOENT, errno.ENOTDIR}:
        return "no such socket; is mpserverd running? (--socket PATH names another one)"
    if error.errno in {errno.ECONNREFUSED, errno.ENOTSOCK}:
        return "nobody listens there; mpserverd is not running"
    if error.errno in {errno.EACCES, errno.EPERM}:
        return f"no permission; be root or a member of the group {GROUP}"
    if error.errno in {errno.ECONNRESET, errno.EPIPE}:
        return "mpserverd broke the connection off; it may be stopping"
    if error.errno == errno.EAGAIN:
        return "mpserverd has too many requests waiting; try again"
    return error.strerror or str(error)


def _close(fds: list[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
