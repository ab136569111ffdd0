"""The control socket: JSON lines over a unix stream socket, answered from the supervisor's loop.

Rules: nothing blocks; a connection has a deadline, a bound on its line, and there is a bound on connections. Who may
connect is a matter of the socket file's mode (0660, group of the operators). What the commands do stands in
commands.py.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import fcntl
import grp
import json
import logging
import os
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator

from mpserverd import log
from mpserverd.control.messages import Reply, Request
from mpserverd.errors import ProtocolError, StartError
from mpserverd.limits import CONTROL_LINE_BYTES_MAX
from mpserverd.supervisor.core import Core
from mpserverd.supervisor.loop import READ, WRITE

logger = logging.getLogger(__name__)

CONNECTIONS_MAX = 32
DEADLINE_S = 5.0
"""From one request to the next, and for taking a reply."""
LINES_A_TURN = 16
"""Of one peer that sends many at once; then it is the turn of everything else."""
OPERATORS_GROUP = "mpserverd"
_MODE = 0o660
_LOCK_WAIT_S = 2.0
_PROBE_TIMEOUT_S = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Peer:
    """Who asks (SO_PEERCRED)."""

    pid: int
    uid: int


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """``fds`` are read-only descriptors to pass with the reply; they are closed once they are sent."""

    reply: Reply
    fds: tuple[int, ...] = ()


Answering = Callable[[Request, Peer], Answer]


def open_control_socket(path: str) -> socket.socket:
    """Bind and listen. A file that a dead daemon left is replaced. Raises StartError when a live one answers there.

    The directory is locked meanwhile, so that of two daemons that start at once the second sees the first.
    """
    directory = os.path.dirname(path) or "."
    try:
        os.makedirs(directory, mode=0o755, exist_ok=True)
        with _locked(directory):
            _remove_stale(path)
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                old_mask = os.umask(0o777 & ~_MODE)
                try:
                    sock.bind(path)
                finally:
                    os.umask(old_mask)
                _give_to_operators(path)
                sock.listen(CONNECTIONS_MAX)
                sock.setblocking(False)
            except BaseException:
                sock.close()
                raise
            return sock
    except OSError as error:
        raise StartError(f"control socket {path}: {error.strerror or error}; see server.control_socket") from error


@contextlib.contextmanager
def _locked(directory: str) -> Iterator[None]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline_s = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.01)
        yield
    finally:
        os.close(fd)


def _remove_stale(path: str) -> None:
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise StartError(
            f"control socket {path}: there is a file that is no socket; remove it, or change server.control_socket"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_TIMEOUT_S)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except (TimeoutError, BlockingIOError):
            raise StartError(f"control socket {path}: somebody listens there and does not answer") from None
        raise StartError(
            f"mpserverd runs already: pid {peer_of(probe).pid} answers on {path}; stop it, or use another "
            "server.control_socket"
        )


def _give_to_operators(path: str) -> None:
    """To the operators' group where there is one and we may."""
    with contextlib.suppress(KeyError, PermissionError):
        os.chown(path, -1, grp.getgrnam(OPERATORS_GROUP).gr_gid)


def peer_of(sock: socket.socket) -> Peer:
    pid, uid, _ = struct.unpack("iii", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return Peer(pid, uid)


@dataclasses.dataclass(eq=False, slots=True)
class _Client:
    sock: socket.socket
    peer: Peer
    deadline_s: float
    received: bytearray = dataclasses.field(default_factory=bytearray)
    unsent: bytearray = dataclasses.field(default_factory=bytearray)
    fds: tuple[int, ...] = ()
    is_last: bool = False
    """Nothing is taken from it after the reply that is on its way."""

    @property
    def has_line(self) -> bool:
        """A line to answer; one that is too long is answered before it has an end."""
        return b"\n" in self.received or len(self.received) > CONTROL_LINE_BYTES_MAX


class ControlServer:
    """Serves until ``close``. ``answer`` is called in the loop and must not block."""

    def __init__(self, core: Core, path: str, sock: socket.socket, answer: Answering) -> None:
        self._core = core
        self._path = path
        self._sock = sock
        self._inode = os.stat(path).st_ino
        self._answer = answer
        self._clients: dict[int, _Client] = {}

    def serve(self) -> None:
        self._core.loop.watch(self._sock.fileno(), READ, lambda _: self._accept())

    def close(self) -> None:
        for client in list(self._clients.values()):
            self._drop(client)
        self._core.loop.unwatch(self._sock.fileno())
        self._sock.close()
        with contextlib.suppress(OSError):
            if os.stat(self._path).st_ino == self._inode:
                os.unlink(self._path)

    def check_deadlines(self, now_s: float) -> None:
        """Once a second."""
        for client in list(self._clients.values()):
            if now_s > client.deadline_s:
                self._drop(client)

    def _accept(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except OSError:
            return
        if len(self._clients) >= CONNECTIONS_MAX:  # who has had the longest time makes place
            self._drop(min(self._clients.values(), key=lambda client: client.deadline_s))
        sock.setblocking(False)
        client = _Client(sock, peer_of(sock), time.monotonic() + DEADLINE_S)
        self._clients[sock.fileno()] = client
        self._watch(client)

    def _watch(self, client: _Client) -> None:
        """A peer that does not take its reply gets no other."""
        events = WRITE if client.unsent or client.has_line else READ
        self._core.loop.watch(client.sock.fileno(), events, lambda _: self._serve(client))

    def _drop(self, client: _Client) -> None:
        self._core.loop.unwatch(client.sock.fileno())
        del self._clients[client.sock.fileno()]
        for fd in client.fds:
            os.close(fd)
        client.sock.close()

    def _serve(self, client: _Client) -> None:
        try:
            if client.unsent:
                self._flush(client)
            elif not client.has_line and not self._receive(client):
                self._drop(client)
                return
            self._take_lines(client)
        except BlockingIOError:
            self._watch(client)
        except OSError:
            self._drop(client)

    def _receive(self, client: _Client) -> bool:
        """False at its end."""
        received = client.sock.recv(CONTROL_LINE_BYTES_MAX)
        client.received += received
        return bool(received)

    def _take_lines(self, client: _Client) -> None:
        """Answer a few lines, each when the reply before it is out; the loop comes back for the others. Raises
        BlockingIOError when the peer's buffer is full."""
        for _ in range(LINES_A_TURN):
            if client.is_last or not client.has_line:
                break
            line, _, rest = client.received.partition(b"\n")
            client.received = rest
            client.deadline_s = time.monotonic() + DEADLINE_S
            client.unsent, client.fds = self._reply_to(client, bytes(line))
            self._flush(client)
        if client.is_last:
            self._drop(client)
        else:
            self._watch(client)

    def _reply_to(self, client: _Client, line: bytes) -> tuple[bytearray, tuple[int, ...]]:
        try:
            answer = self._answer(Request.decode(line), client.peer)
            return bytearray(answer.reply.encode()), answer.fds
        except ProtocolError as error:
            fault = Reply.fault(str(error), error.exit_code)
        except Exception:  # our fault, in one command: no reason to end the daemon
            log.event(logger, logging.ERROR, "command failed", message_id=log.MessageId.OUR_FAULT, exc_info=True)
            fault = Reply.fault("the daemon failed over this command; its log says how")
            client.is_last = True
        return bytearray(fault.encode()), ()

    def _flush(self, client: _Client) -> None:
        """Raises BlockingIOError when the peer's buffer is full; the loop comes back."""
        while client.unsent:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", client.fds))] if client.fds else []
            sent = client.sock.sendmsg([client.unsent], rights, socket.MSG_NOSIGNAL)
            for fd in client.fds:
                os.close(fd)
            client.fds = ()
            del client.unsent[:sent]


def tell_change(request: Request, peer: Peer) -> None:
    """Commands that change something leave a line."""
    arguments = json.dumps(request.arguments)
    log.event(
        logger,
        logging.INFO,
        "command",
        command=request.command,
        arguments=arguments,
        by_uid=peer.uid,
        by_pid=peer.pid,
    )
