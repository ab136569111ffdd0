"""A control server that misbehaves on purpose, for what no healthy daemon does. One connection at a time."""

from __future__ import annotations

import array
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from mpserverd.control.messages import Request

Answer = Callable[[socket.socket, Request], None]


@contextlib.contextmanager
def serving(path: Path, answer: Answer) -> Iterator[list[Request]]:
    """Calls ``answer`` with each connection and its request; gives the list of requests so far."""
    requests: list[Request] = []
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            with sock, contextlib.suppress(OSError):
                line = sock.makefile("rb").readline()
                if not line:
                    continue
                requests.append(Request.decode(line))
                answer(sock, requests[-1])

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield requests
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()
        path.unlink()


def replying(content: bytes, *fds: int) -> Answer:
    """An answer of exactly these bytes, with these descriptors."""

    def answer(sock: socket.socket, _: Request) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = sock.sendmsg([content], rights)
        sock.sendall(content[sent:])

    return answer


def silent(sock: socket.socket, _: Request) -> None:
    """Says nothing until the other side gives up."""
    sock.recv(1)
