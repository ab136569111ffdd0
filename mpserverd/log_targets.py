"""Where log lines go: standard error, a file, the journal.

Rules: a target never blocks (a line that cannot leave now is counted, and the count is written later), except a file
whose disk hangs: O_NONBLOCK means nothing there, and whoever forks can have no thread to wait in; it holds its
descriptor as a plain int and closes it only in the process that opened it, so that a child that closed what it
inherited never closes a reused number; a line is one ``write`` of at most PIPE_BUF bytes, so that processes do not mix
lines.

The journal is spoken to directly: libsystemd keeps one descriptor for ever in a place that nobody can reset, and after
a fork and ``close_range`` its lines went to whatever had got that number (seen); it also waits when journald is slow
(seen: after 11 lines).
"""

from __future__ import annotations

import datetime
import logging
import os
import select
import socket
import traceback

from mpserverd import limits, log_text
from mpserverd.log_ids import MessageId

JOURNAL_SOCKET = "/run/systemd/journal/socket"
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG_PRIORITY = 7
_LOST_TEXT = "log lines were lost"


def priority(level: int) -> int:
    """syslog's number of a level."""
    return next((number for least, number in _PRIORITIES if level >= least), _DEBUG_PRIORITY)


def traceback_of(record: logging.LogRecord) -> str | None:
    if not record.exc_info or record.exc_info[1] is None:
        return None
    return "".join(traceback.format_exception(*record.exc_info))


class Target(logging.Handler):
    """Common part. ``process`` is the word for this process in each line."""

    def __init__(self, fd: int, process: str, *, owns_fd: bool) -> None:
        super().__init__()
        self.fd = fd
        self.process = process
        self.lost_count = 0
        self._owner_pid = os.getpid() if owns_fd else -1

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self.lost_count and self._write_all(self._render(self._lost_record())):
                self.lost_count = 0
            if not self._write_all(self._render(record)):
                self.lost_count += 1
        except Exception:
            # What logging itself does for every handler: a broken line must not end the process that wrote it.
            self.handleError(record)

    def close(self) -> None:
        if self._owner_pid == os.getpid() and self.fd >= 0:
            os.close(self.fd)
        self.fd = -1
        super().close()

    def reopen(self) -> None:
        """Open again what has a name; the old descriptor stays in use when that fails (OSError)."""

    def _render(self, record: logging.LogRecord) -> list[bytes]:
        raise NotImplementedError

    def _write_all(self, lines: list[bytes]) -> bool:
        return all(self._write(line) for line in lines)

    def _write(self, line: bytes) -> bool:
        try:
            return os.write(self.fd, line) == len(line)
        except OSError:
            return False

    def _lost_record(self) -> logging.LogRecord:
        text = log_text.event_text(_LOST_TEXT, {"count": self.lost_count})
        record = logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, None, None)
        record.message_id = MessageId.LOG_LINES_LOST
        return record

    def _stamped(self, record: logging.LogRecord) -> list[bytes]:
        """Lines for people: ``2026-11-23T20:00:00.123Z mpserverd[17] worker-1 INFO event key=value``."""
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        time = moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"
        header = f"{time} mpserverd[{record.process}] {self.process} {record.levelname} "
        return self._lines(record, header)

    def _lines(self, record: logging.LogRecord, header: str) -> list[bytes]:
        texts = log_text.lines_of(record.getMessage(), traceback_of(record))
        return [log_text.cut(header + text, limits.LOG_LINE_BYTES_MAX - 1) + b"\n" for text in texts]


class StderrTarget(Target):
    """Standard error; with journald at its other end each line begins with its priority instead of a time."""

    def __init__(self, process: str, *, to_journal: bool, fd: int = 2) -> None:
        super().__init__(fd, process, owns_fd=False)
        self._to_journal = to_journal
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)

    def _render(self, record: logging.LogRecord) -> list[bytes]:
        if self._to_journal:
            return self._lines(record, f"<{priority(record.levelno)}>{self.process} ")
        return self._stamped(record)

    def _write(self, line: bytes) -> bool:
        # The descriptor is shared with whoever started us, so O_NONBLOCK must not be set on it. A pipe that polls as
        # writable takes PIPE_BUF bytes without waiting.
        if not self._poll.poll(0):
            return False
        return super()._write(line)


class FileTarget(Target):
    """A file, appended to. Raises OSError when it cannot be opened."""

    def __init__(self, path: str, process: str) -> None:
        super().__init__(self._open(path), process, owns_fd=True)
        self._path = path

    @staticmethod
    def _open(path: str) -> int:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o640)

    def reopen(self) -> None:
        fresh = self._open(self._path)
        old, self.fd = self.fd, fresh
        if self._owner_pid == os.getpid() and old >= 0:
            os.close(old)
        self._owner_pid = os.getpid()

    def _render(self, record: logging.LogRecord) -> list[bytes]:
        return self._stamped(record)


class JournalTarget(Target):
    """journald, with structured fields. Raises OSError when there is no journald."""

    def __init__(self, process: str, path: str = JOURNAL_SOCKET) -> None:
        super().__init__(self._connect(path), process, owns_fd=True)
        self._path = path

    @staticmethod
    def _connect(path: str) -> int:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as end:
            end.connect(path)
            return end.detach()

    def reopen(self) -> None:
        fresh = self._connect(self._path)
        old, self.fd = self.fd, fresh
        if self._owner_pid == os.getpid() and old >= 0:
            os.close(old)
        self._owner_pid = os.getpid()

    def _write(self, line: bytes) -> bool:
        try:
            return os.write(self.fd, line) == len(line)
        except BlockingIOError:
            return False
        except OSError:
            pass
        try:
            self.reopen()  # journald's socket may have been made anew
        except OSError:
            return False
        return super()._write(line)

    def _render(self, record: logging.LogRecord) -> list[bytes]:
        message = "\n".join(log_text.lines_of(record.getMessage(), traceback_of(record)))
        fields = [
            ("MESSAGE", message),
            ("PRIORITY", str(priority(record.levelno))),
            ("SYSLOG_IDENTIFIER", "mpserverd"),
            ("MPSERVERD_PROCESS", self.process),
            ("LOGGER", record.name),
        ]
        message_id = getattr(record, "message_id", None)
        if isinstance(message_id, MessageId):
            fields.append(("MESSAGE_ID", message_id.value))
        event_fields = getattr(record, "event_fields", None) or {}
        for name, value in event_fields.items():
            fields.append((log_text.journal_key(name), log_text.plain_value(value)))
        return [log_text.journal_entry(fields)]
