"""MPS/1: the lines that a client and the server exchange around the packets. Pure: bytes in, values out.

    C: MPS/1 <client-id> <packet-size> [token=T] [epoch=E] [first=N] [new=1] LF
    S: OK <next-packet> <level> <epoch> LF          or   ERR <code> <text> LF, and the end
    C: packets from index <next-packet> on, nothing between them
    S: ACK <next-packet> LF                         all packets before it are kept as <level> says
    S: BYE <reason> [retry=<seconds>] LF            the end: reconnect and go on

Rules: a line has at most 512 bytes with its LF; a CR before the LF is ignored; words are separated by one space;
numbers are decimal without sign or leading zeros. What is wrong with a hello is a ``HelloError`` with the code that the
peer is told. A client takes nothing from a server that is not a whole line. docs/protocol.md has the grammar.

It knows no sockets, and nothing of what the server does with a hello (supervisor/hello.py), nor of what a client keeps
(client/session.py).
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Callable
from typing import Any

from mpserverd import limits
from mpserverd.errors import MpserverdError

LINE_BYTES_MAX = 512
VERSION_WORD = "MPS/1"
INDEX_MAX = 2**62
"""Indices and offsets stay below it, so that their sums fit SQLite's signed integers."""
TOKEN_BYTES_MAX = 128
RETRY_S_MAX = 3600

_NUMBER = re.compile(r"0|[1-9][0-9]{0,18}")
_EPOCH = re.compile(r"[0-9a-f]{16}")
_TOKEN = re.compile(rf"[!-~]{{1,{TOKEN_BYTES_MAX}}}")
_WORD = re.compile(r"[a-z][a-z-]{0,31}")
_CLIENT_ID = re.compile(limits.CLIENT_ID_PATTERN)
_OTHER_VERSION = re.compile(rb"MPS/(?!1(?![!-~]))")
_OPTIONS = ("token", "epoch", "first", "new")


class Level(enum.StrEnum):
    """What an acknowledgement means on this listener."""

    DURABLE = "durable"
    """On disk, synced."""
    STORED = "stored"
    """In a file that the kernel writes back when it likes: ``sync = "none"``."""


class ErrorCode(enum.StrEnum):
    """Why a hello was refused. ``is_final``: trying the same again cannot help."""

    SYNTAX = "syntax"
    VERSION = "version"
    LINE_TOO_LONG = "line-too-long"
    CLIENT_ID = "client-id"
    PACKET_SIZE = "packet-size"
    EPOCH = "epoch"
    FIRST = "first"
    TOKEN = "token"
    TIMEOUT = "timeout"
    IN_USE = "in-use"
    BUSY = "busy"
    UNAVAILABLE = "unavailable"
    QUARANTINED = "quarantined"

    @property
    def is_final(self) -> bool:
        return self not in _PASSING


_PASSING = frozenset(
    {ErrorCode.TIMEOUT, ErrorCode.IN_USE, ErrorCode.BUSY, ErrorCode.UNAVAILABLE, ErrorCode.QUARANTINED}
)


class ByeReason(enum.StrEnum):
    """Why the server ends a connection in a regular way. Nothing is lost: the client connects again and goes on."""

    STOPPING = "stopping"
    SUPERSEDED = "superseded"
    KICKED = "kicked"
    IDLE = "idle"
    QUARANTINED = "quarantined"


class HelloError(MpserverdError):
    """A hello that is refused; ``code`` and the text are what the peer is told."""

    def __init__(self, code: ErrorCode, text: str) -> None:
        super().__init__(text)
        self.code = code

    def to_line(self) -> bytes:
        return Refusal(self.code, str(self)).to_line()


class AnswerError(MpserverdError):
    """A server said something that is not MPS/1."""


@dataclasses.dataclass(frozen=True, slots=True)
class Hello:
    """``epoch``: of the stream that the client goes on with. ``first``: index of the oldest packet that it still holds.
    ``new``: with another epoch than the server's, or none, begin anew at 0."""

    client_id: str
    packet_size: int
    token: str | None = None
    epoch: int | None = None
    first: int | None = None
    new: bool = False

    def to_line(self) -> bytes:
        words = [VERSION_WORD, self.client_id, str(self.packet_size)]
        if self.token is not None:
            words.append(f"token={self.token}")
        if self.epoch is not None:
            words.append(f"epoch={self.epoch:016x}")
        if self.first is not None:
            words.append(f"first={self.first}")
        if self.new:
            words.append("new=1")
        return " ".join(words).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Hello:
        """``line`` ends with LF. Raises HelloError."""
        words = _words(_body(line))
        if words[0] != VERSION_WORD:
            raise HelloError(ErrorCode.SYNTAX, f"a hello begins with {VERSION_WORD}")
        if len(words) < 3:
            raise HelloError(ErrorCode.SYNTAX, f"{VERSION_WORD} is followed by a client id and a packet size")
        hello = cls(_client_id(words[1]), _packet_size(words[2]), **_options(words[3:]))
        if hello.first is not None and hello.first * hello.packet_size > INDEX_MAX:
            raise HelloError(ErrorCode.FIRST, f"first times the packet size is at most {INDEX_MAX}")
        return hello


def _body(line: bytes) -> bytes:
    """The line without its end. What else another version has in it is not for us to judge."""
    if len(line) > LINE_BYTES_MAX or not line.endswith(b"\n"):
        raise HelloError(ErrorCode.LINE_TOO_LONG, f"a hello has at most {LINE_BYTES_MAX} bytes")
    body = line[:-1].removesuffix(b"\r")
    if _OTHER_VERSION.match(body):
        raise HelloError(ErrorCode.VERSION, f"this server speaks {VERSION_WORD}")
    return body


def _words(body: bytes) -> list[str]:
    if not all(0x20 <= byte < 0x7F for byte in body):
        raise HelloError(ErrorCode.SYNTAX, "a hello is printable ASCII")
    words = body.decode("ascii").split(" ")
    if "" in words:
        raise HelloError(ErrorCode.SYNTAX, "words are separated by one space")
    return words


def _client_id(word: str) -> str:
    if len(word) > limits.CLIENT_ID_BYTES_MAX or not _CLIENT_ID.fullmatch(word):
        raise HelloError(
            ErrorCode.CLIENT_ID,
            f"a client id is 1 to {limits.CLIENT_ID_BYTES_MAX} letters, digits, dots, dashes and _, "
            "the first a letter or digit",
        )
    return word


def _packet_size(word: str) -> int:
    if _NUMBER.fullmatch(word) and limits.PACKET_BYTES_MIN <= (size := int(word)) <= limits.PACKET_BYTES_MAX:
        return size
    text = f"a packet has {limits.PACKET_BYTES_MIN} to {limits.PACKET_BYTES_MAX} bytes"
    raise HelloError(ErrorCode.PACKET_SIZE, text)


def _options(words: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in _OPTIONS:
            raise HelloError(ErrorCode.SYNTAX, f"unknown option; known are {', '.join(_OPTIONS)}")
        if name in found:
            raise HelloError(ErrorCode.SYNTAX, f"{name}= is there twice")
        found[name] = _OPTION_READERS[name](value)
    return found


def _token(value: str) -> str:
    if not _TOKEN.fullmatch(value):
        raise HelloError(ErrorCode.TOKEN, f"a token is 1 to {TOKEN_BYTES_MAX} printable characters")
    return value


def _epoch(value: str) -> int:
    if not _EPOCH.fullmatch(value):
        raise HelloError(ErrorCode.SYNTAX, "an epoch is 16 digits 0-9a-f")
    return int(value, 16)


def _first(value: str) -> int:
    if not _NUMBER.fullmatch(value) or int(value) > INDEX_MAX:
        raise HelloError(ErrorCode.FIRST, f"first is a number of at most {INDEX_MAX}")
    return int(value)


def _new(value: str) -> bool:
    if value != "1":
        raise HelloError(ErrorCode.SYNTAX, "new=1 is the only value of new")
    return True


_OPTION_READERS: dict[str, Callable[[str], Any]] = {"token": _token, "epoch": _epoch, "first": _first, "new": _new}


def hello_length(peeked: bytes) -> int | None:
    """Bytes of the hello at the head of what a peer has sent, its LF included; None while it is not whole.

    Raises HelloError when no line of the permitted length can come any more.
    """
    end = peeked.find(b"\n", 0, LINE_BYTES_MAX)
    if end >= 0:
        return end + 1
    if len(peeked) >= LINE_BYTES_MAX:
        raise HelloError(ErrorCode.LINE_TOO_LONG, f"a hello has at most {LINE_BYTES_MAX} bytes")
    return None


# -- answers


@dataclasses.dataclass(frozen=True, slots=True)
class Ok:
    """The client goes on with packet ``next_packet``; everything before it is kept as ``level`` says."""

    next_packet: int
    level: Level
    epoch: int

    def to_line(self) -> bytes:
        return f"OK {self.next_packet} {self.level} {self.epoch:016x}\n".encode()


@dataclasses.dataclass(frozen=True, slots=True)
class Ack:
    """All packets before ``next_packet`` are kept."""

    next_packet: int

    def to_line(self) -> bytes:
        return b"ACK %d\n" % self.next_packet


@dataclasses.dataclass(frozen=True, slots=True)
class Bye:
    """The server ends the connection. ``retry_s``: do not come back earlier. The reason may be an unknown one."""

    reason: str
    retry_s: int | None = None

    def to_line(self) -> bytes:
        retry = "" if self.retry_s is None else f" retry={self.retry_s}"
        return f"BYE {self.reason}{retry}\n".encode()


@dataclasses.dataclass(frozen=True, slots=True)
class Refusal:
    """The server refused the hello. A code may be one that we do not know; then it counts as final."""

    code: str
    text: str

    @property
    def is_final(self) -> bool:
        return self.code not in _PASSING

    def to_line(self) -> bytes:
        """Cut to a line; the text keeps printable ASCII only."""
        text = "".join(c if 0x20 <= ord(c) < 0x7F else "?" for c in self.text)
        return f"ERR {self.code} {text}".encode()[: LINE_BYTES_MAX - 1] + b"\n"


Answer = Ok | Ack | Bye | Refusal


def parse_answer(line: bytes) -> Answer | None:
    """The answer in one whole line, with or without its LF; None for an empty one. Raises AnswerError."""
    body = line.removesuffix(b"\n").removesuffix(b"\r")
    if not body:
        return None
    words = body.decode("ascii", "replace").split(" ")
    reader = _ANSWER_READERS.get(words[0])
    answer = None
    if reader is not None and len(line) <= LINE_BYTES_MAX:
        answer = reader(words[1:])
    if answer is None:
        raise AnswerError(f"not a line of {VERSION_WORD}: {body[:80]!r}")
    return answer


def _number(word: str) -> int | None:
    return int(word) if _NUMBER.fullmatch(word) else None


def _read_ok(words: list[str]) -> Ok | None:
    if len(words) != 3 or words[1] not in tuple(Level) or not _EPOCH.fullmatch(words[2]):
        return None
    number = _number(words[0])
    return None if number is None else Ok(number, Level(words[1]), int(words[2], 16))


def _read_ack(words: list[str]) -> Ack | None:
    number = _number(words[0]) if len(words) == 1 else None
    return None if number is None else Ack(number)


def _read_bye(words: list[str]) -> Bye | None:
    if not words or not _WORD.fullmatch(words[0]) or len(words) > 2:
        return None
    if len(words) == 1:
        return Bye(words[0])
    name, _, value = words[1].partition("=")
    retry_s = _number(value) if name == "retry" else None
    return None if retry_s is None else Bye(words[0], min(retry_s, RETRY_S_MAX))


def _read_err(words: list[str]) -> Refusal | None:
    if not words or not _WORD.fullmatch(words[0]):
        return None
    return Refusal(words[0], " ".join(words[1:]))


_ANSWER_READERS: dict[str, Callable[[list[str]], Answer | None]] = {
    "OK": _read_ok,
    "ACK": _read_ack,
    "BYE": _read_bye,
    "ERR": _read_err,
}


class AnswerReader:
    """Cuts what a server sends into answers. Holds at most one line.

    After an adoption the server begins with a LF, so an ACK that was torn may read as a smaller number: harmless,
    because it is true as well, and a client ignores every ACK that is not above the last one.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._fault: AnswerError | None = None

    def feed(self, received: bytes) -> list[Answer]:
        """The answers that ``received`` completes, in order. Raises AnswerError; nothing may be fed after that.

        What stands before a fault is returned first, and the fault is raised by the next call: a refusal with rubbish
        behind it is still a refusal, however the bytes were cut.
        """
        if self._fault is not None:
            raise self._fault
        lines = (self._rest + received).split(b"\n")
        self._rest = lines.pop()
        answers: list[Answer] = []
        try:
            for line in lines:
                # a torn line is cut off by the LF of the next worker: only ACK is torn in practice, and "A" or "AC" too
                if line in (b"A", b"AC", b"ACK", b"ACK "):
                    continue
                answer = parse_answer(line + b"\n")
                if answer is not None:
                    answers.append(answer)
            if len(self._rest) >= LINE_BYTES_MAX:
                raise AnswerError(f"a line of more than {LINE_BYTES_MAX} bytes")
        except AnswerError as fault:
            if not answers:
                raise
            self._fault, self._rest = fault, b""
        return answers
