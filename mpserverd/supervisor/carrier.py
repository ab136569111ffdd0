"""A carrier holds connections in flight in an AF_UNIX pair, so that two descriptors in systemd's store keep thousands
alive.

systemd keeps what a service gave it while the service is down, but each entry costs PID 1 time and room in
LISTEN_FDNAMES. So connections travel as SCM_RIGHTS messages into a SEQPACKET pair that nobody reads, and only the two
ends are stored. A message's body names the cookies of its descriptors, in their order.

Rules: nothing is taken out of a carrier before it is in another one (``refill_from`` peeks, puts, then takes); so a
death anywhere leaves a connection in one or in both, and who adopts drops doubles by cookie. In-flight descriptors
count against RLIMIT_NOFILE of the user.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator

FDS_A_MESSAGE_MAX = 250
"""The kernel's SCM_MAX_FD is 253."""
SINGLES_MAX = 150
"""Past so many messages that were added one by one a carrier is packed anew."""
SEND_BUFFER_BYTES = 212_992
"""The stock limit (net.core.wmem_max). The kernel doubles what is asked for, and counts 768 bytes for a message with
one descriptor and 4,352 for one with 250: room for 554 or 97 of them."""
_SINGLE_COST_BYTES, _PACKED_COST_BYTES = 768, 4_352
_FULL_BYTES = 2 * SEND_BUFFER_BYTES - 8 * _SINGLE_COST_BYTES
SMALL_MAX = 16
"""A message of so many descriptors costs no more than one of a single one."""
_COOKIE_BYTES = 8
_BODY_BYTES_MAX = FDS_A_MESSAGE_MAX * _COOKIE_BYTES


class CarrierFullError(OSError):
    """The pair takes no more messages, or the user may have no more descriptors in flight."""


class Carrier:
    """Both ends of one pair. ``ends`` are the descriptors to store; the object owns them until ``close``."""

    def __init__(self, into: socket.socket, out_of: socket.socket) -> None:
        for end in (into, out_of):
            end.setblocking(False)
        self._into = into
        self._out_of = out_of
        into.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self._single_count = 0
        self._used_bytes = 0

    @classmethod
    def make(cls) -> Carrier:
        return cls(*socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))

    @classmethod
    def from_store(cls, ends: Iterable[int]) -> Carrier:
        """The pair that an earlier life stored, in the same order; takes the descriptors over."""
        into, out_of = (socket.socket(fileno=fd) for fd in ends)
        return cls(into, out_of)

    @property
    def ends(self) -> tuple[int, int]:
        return self._into.fileno(), self._out_of.fileno()

    @property
    def wants_packing(self) -> bool:
        return self._single_count >= SINGLES_MAX

    @property
    def is_full(self) -> bool:
        """As good as."""
        return self._used_bytes >= _FULL_BYTES

    @property
    def is_empty(self) -> bool:
        try:
            return not self._out_of.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True

    def close(self) -> None:
        self._into.close()
        self._out_of.close()

    def put(self, entries: list[tuple[int, int]]) -> None:
        """Add up to FDS_A_MESSAGE_MAX (cookie, descriptor) pairs as one message; the caller keeps its descriptors.

        Raises CarrierFullError.
        """
        body = struct.pack(f"<{len(entries)}Q", *(cookie for cookie, _ in entries))
        rights = array.array("i", [fd for _, fd in entries])
        try:
            self._into.sendmsg([body], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        except OSError as error:
            raise CarrierFullError(error.errno, error.strerror) from error
        self._single_count += len(entries) == 1
        self._used_bytes += _SINGLE_COST_BYTES if len(entries) <= SMALL_MAX else _PACKED_COST_BYTES

    def fill(self, entries: Iterable[tuple[int, int]]) -> None:
        """Add any number, packed."""
        batch: list[tuple[int, int]] = []
        for entry in entries:
            batch.append(entry)
            if len(batch) == FDS_A_MESSAGE_MAX:
                self.put(batch)
                batch = []
        if batch:
            self.put(batch)

    def refill_from(self, old: Carrier, wanted: Callable[[int], bool]) -> Iterator[tuple[int, int]]:
        """Move over what is wanted, by cookie, and yield each (cookie, descriptor); the caller owns the descriptors.

        A message leaves ``old`` only after its copy is here. Raises CarrierFullError; all of ``old`` that was not
        yielded is still there, and may be moved to another one.
        """
        while (entries := old._peek()) is not None:
            moving = [(cookie, fd) for cookie, fd in entries if wanted(cookie)]
            for cookie, fd in entries:
                if not wanted(cookie):
                    os.close(fd)
            if moving:
                try:
                    self.put(moving)
                except CarrierFullError:
                    for _, fd in moving:
                        os.close(fd)
                    raise
            old._drop()
            yield from moving

    def take_all(self) -> Iterator[tuple[int, int]]:
        """Empty it for good; the caller owns the descriptors."""
        while (entries := self._peek()) is not None:
            self._drop()
            yield from entries

    def _peek(self) -> list[tuple[int, int]] | None:
        """Descriptors of the first message, as new ones of this process; None when there is no message."""
        try:
            body, ancillary, _, _ = self._out_of.recvmsg(
                _BODY_BYTES_MAX,
                socket.CMSG_SPACE(FDS_A_MESSAGE_MAX * array.array("i").itemsize),
                socket.MSG_PEEK | socket.MSG_CMSG_CLOEXEC,
            )
        except BlockingIOError:
            return None
        fds = array.array("i")
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        cookies = struct.unpack(f"<{len(body) // _COOKIE_BYTES}Q", body[: len(body) - len(body) % _COOKIE_BYTES])
        if not body:
            return None
        for fd in fds[len(cookies) :]:
            os.close(fd)
        return list(zip(cookies, fds, strict=False))

    def _drop(self) -> None:
        """Take the first message out; without room for its descriptors the kernel closes them."""
        self._out_of.recv(_BODY_BYTES_MAX)
