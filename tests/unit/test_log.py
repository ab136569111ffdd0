"""Lines of the log: what they look like, that nobody can forge one, that none ever blocks, and that forks are safe."""

from __future__ import annotations

import logging
import os
import re
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpserverd import limits, log, log_text
from mpserverd.arena.state import CloseReason
from mpserverd.config.schema import LogConfig, LogLevel, LogTarget
from mpserverd.errors import StartError
from mpserverd.log_targets import FileTarget, JournalTarget, StderrTarget, Target

logger = logging.getLogger("test")


@pytest.fixture(autouse=True)
def root_logger_is_left_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)
    for handler in [handler for handler in root.handlers if isinstance(handler, Target)]:
        root.removeHandler(handler)
        handler.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A log file that the root logger writes to."""
    path = tmp_path / "log"
    log.setup(LogConfig(target=(LogTarget.FILE,), file=str(path)), process="worker-1")
    return path


def attach(target: Target) -> Target:
    logging.getLogger().addHandler(target)
    logging.getLogger().setLevel(logging.INFO)
    return target


# Lines


def test_line_has_time_process_level_text_and_fields(file: Path) -> None:
    log.event(logger, logging.INFO, "client connected", peer="192.0.2.1:7", worker=2, age_s=0.25)
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z mpserverd\[\d+\] worker-1 INFO "
        r"client connected peer=192\.0\.2\.1:7 worker=2 age_s=0\.25\n",
        file.read_text(),
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain", "plain"),
        ("two words", '"two words"'),
        ('a"b', '"a\\"b"'),
        ("a\\b", '"a\\\\b"'),
        ("a=b", '"a=b"'),
        ("", '""'),
        ("a\nb\r\t", '"a\\nb\\r\\t"'),
        ("\x1b[2J\x00", '"\\x1b[2J\\x00"'),
        ("\u202e\u2028", '"\\u202e\\u2028"'),
        ("\udc80", '"\\udc80"'),
        ("Zürich", "Zürich"),
        (b"\xffA\n", '"ÿA\\n"'),
        (None, "-"),
        (True, "true"),
        (3, "3"),
        (1 / 3, "0.333333"),
        (["a", 2], "a,2"),
        (CloseReason.TIMED_OUT, "timed-out"),
        (LogLevel.INFO, "info"),
        (OSError(28, "No space"), '"[Errno 28] No space"'),
    ],
)
def test_value_is_quoted_only_when_it_must_be(value: object, text: str) -> None:
    assert log_text.event_text("e", {"k": value}) == f"e k={text}"


@given(st.text(), st.binary())
def test_no_value_can_end_a_line_or_begin_a_field(text: str, content: bytes) -> None:
    line = log_text.event_text("event", {"a": text, "b": content})
    assert line.isprintable()
    assert re.fullmatch(r'event a=("(\\.|[^"\\])*"|[^ "=\\]+) b=("(\\.|[^"\\])*"|[^ "=\\]+)', line)


def test_long_values_and_lines_are_cut(file: Path) -> None:
    fields = {f"k{index}": "ä" * 10_000 for index in range(20)}
    log.event(logger, logging.INFO, "long", **fields)
    content = file.read_bytes()
    assert len(content) == content.index(b"\n") + 1 <= limits.LOG_LINE_BYTES_MAX
    assert content.decode().endswith("...\n")


@given(st.text(max_size=100), st.integers(4, 60))
def test_cut_lines_are_whole_characters(text: str, bytes_max: int) -> None:
    cut = log_text.cut(text, bytes_max)
    assert len(cut) <= bytes_max
    assert cut.decode().removesuffix("...") == text[: len(cut.decode().removesuffix("..."))]


def test_messages_of_other_libraries_cannot_forge_lines(file: Path) -> None:
    logger.warning("a\n2026-01-01T00:00:00.000Z mpserverd[1] supervisor INFO forged")
    assert file.read_text().count("\n") == 1


def test_traceback_is_bounded_and_each_line_has_the_header(file: Path) -> None:
    def deep(depth: int) -> None:
        if depth:
            deep(depth - 1)
        raise ValueError("bad\nforged")

    try:
        deep(200)
    except ValueError as error:
        log.event(logger, logging.ERROR, "failed", exc_info=error)
    lines = file.read_text().splitlines()
    assert len(lines) <= limits.LOG_TRACEBACK_LINES_MAX + 1
    assert all(re.match(r"\S+Z mpserverd\[\d+\] worker-1 ERROR (failed|  \| )", line) for line in lines)


def test_suppressed_zero_is_left_out_and_more_is_said(file: Path) -> None:
    log.event(logger, logging.WARNING, "refused", suppressed=0)
    log.event(logger, logging.WARNING, "refused", suppressed=7)
    first, second = file.read_text().splitlines()
    assert first.endswith("WARNING refused")
    assert second.endswith("WARNING refused suppressed=7")


def test_percent_signs_are_plain_text(file: Path) -> None:
    log.event(logger, logging.INFO, "disk 100%s full", name="%d")
    assert "disk 100%s full name=%d\n" in file.read_text()


# Levels and setup


def test_level_holds_and_can_be_changed(file: Path) -> None:
    log.event(logger, logging.DEBUG, "one")
    log.set_level("debug")
    log.event(logger, logging.DEBUG, "two")
    log.set_level("error")
    log.event(logger, logging.WARNING, "three")
    assert [line.split()[-1] for line in file.read_text().splitlines()] == ["two"]


def test_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="LOUD"):
        log.set_level("loud")


def test_setup_again_replaces_the_targets(file: Path, tmp_path: Path) -> None:
    log.setup(LogConfig(target=(LogTarget.FILE,), file=str(tmp_path / "other")), process="worker-1")
    log.event(logger, logging.INFO, "here")
    assert file.read_text() == ""
    assert (tmp_path / "other").read_text().count("here") == 1


def test_log_file_that_cannot_be_opened_leaves_the_old_targets(file: Path, tmp_path: Path) -> None:
    with pytest.raises(StartError, match=rf"cannot open the log file {tmp_path}: Is a directory; see \[log\] file"):
        log.setup(LogConfig(target=(LogTarget.STDERR, LogTarget.FILE), file=str(tmp_path)), process="x")
    log.event(logger, logging.INFO, "goes on")
    assert "goes on" in file.read_text()


def test_prepared_targets_get_no_line_and_can_be_given_up(file: Path, tmp_path: Path) -> None:
    """Those of before stay until the others are installed."""
    config = LogConfig(target=(LogTarget.FILE,), file=str(tmp_path / "other"), level=LogLevel.ERROR)
    prepared = log.prepare(config, process="x")
    log.event(logger, logging.INFO, "one")
    prepared.close()
    log.event(logger, logging.INFO, "two")
    assert [line.split()[-1] for line in file.read_text().splitlines()] == ["one", "two"]
    log.install(log.prepare(config, process="x"))
    log.event(logger, logging.INFO, "too low a level")
    log.event(logger, logging.ERROR, "three")
    assert [line.split()[-1] for line in (tmp_path / "other").read_text().splitlines()] == ["three"]


@pytest.mark.parametrize("target", [(LogTarget.FILE,), (LogTarget.STDERR, LogTarget.FILE)])
def test_a_child_that_cannot_open_the_file_logs_without_it(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, target: tuple[LogTarget, ...]
) -> None:
    log.setup_child(LogConfig(target=target, file=str(tmp_path)), process="worker-1")
    log.event(logger, logging.INFO, "hello")
    first, second = capfd.readouterr().err.splitlines()
    assert f'worker-1 ERROR no log file error="cannot open the log file {tmp_path}: Is a directory' in first
    assert second.endswith("worker-1 INFO hello")


def test_stderr_takes_the_place_of_a_journal_that_is_not_there(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("mpserverd.log_targets.JournalTarget.__init__.__defaults__", (str(tmp_path / "none"),))
    log.setup(LogConfig(target=(LogTarget.JOURNAL,)), process="supervisor")
    log.event(logger, logging.INFO, "hello")
    first, second = capfd.readouterr().err.splitlines()
    assert "WARNING journald does not answer used_instead=stderr" in first
    assert second.endswith("INFO hello")


def test_reopened_file_is_a_new_one_after_it_was_moved(file: Path, tmp_path: Path) -> None:
    log.event(logger, logging.INFO, "before")
    file.rename(tmp_path / "log.1")
    log.event(logger, logging.INFO, "between")
    log.reopen()
    log.event(logger, logging.INFO, "after")
    assert [line.split()[-1] for line in (tmp_path / "log.1").read_text().splitlines()] == ["before", "between"]
    assert file.read_text().endswith("after\n")


def test_reopen_that_fails_goes_on_with_the_old_file(file: Path, tmp_path: Path) -> None:
    file.rename(tmp_path / "log.1")
    file.mkdir()
    log.reopen()
    assert 'ERROR log target not opened again reason="Is a directory"' in (tmp_path / "log.1").read_text()


# Standard error


def test_stderr_lines_carry_a_priority_when_journald_reads_them(capfd: pytest.CaptureFixture[str]) -> None:
    attach(StderrTarget("storer", to_journal=True))
    log.event(logger, logging.ERROR, "write failed", errno=28)
    assert capfd.readouterr().err == "<3>storer write failed errno=28\n"


@pytest.mark.parametrize(("level", "number"), [(10, 7), (20, 6), (30, 4), (40, 3), (50, 2)])
def test_priorities_are_those_of_syslog(level: int, number: int, capfd: pytest.CaptureFixture[str]) -> None:
    attach(StderrTarget("p", to_journal=True))
    log.set_level("debug")
    log.event(logger, level, "x")
    assert capfd.readouterr().err == f"<{number}>p x\n"


def test_journal_stream_counts_only_for_the_stream_that_stderr_is() -> None:
    there = os.fstat(2)
    assert log.stderr_is_journal({"JOURNAL_STREAM": f"{there.st_dev}:{there.st_ino}"})
    assert not log.stderr_is_journal({"JOURNAL_STREAM": f"{there.st_dev}:{there.st_ino + 1}"})
    assert not log.stderr_is_journal({})


def test_reader_that_sleeps_never_blocks_and_lost_lines_are_counted() -> None:
    """A full pipe refuses lines at once; the first line after it was read says how many are missing."""
    reader, writer = os.pipe()
    try:
        target = attach(StderrTarget("p", to_journal=True, fd=writer))
        for _ in range(100):
            log.event(logger, logging.INFO, "x" * 2000)
        taken = os.read(reader, 1 << 20).count(b"\n")
        assert target.lost_count == 100 - taken > 0
        log.event(logger, logging.INFO, "awake")
        rest = os.read(reader, 1 << 20)
        assert rest == f"<4>p log lines were lost count={100 - taken}\n<6>p awake\n".encode()
    finally:
        os.close(reader)
        os.close(writer)


def test_closed_stderr_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        target = attach(StderrTarget("p", to_journal=True, fd=writer))
        log.event(logger, logging.INFO, "nobody listens")
        assert target.lost_count == 1
    finally:
        os.close(writer)


# The journal


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(tmp_path / "journal"))
        server.setblocking(False)
        yield server


def entry(datagram: bytes) -> dict[str, str]:
    """A reader of the native journal protocol of its own."""
    fields, at = {}, 0
    while at < len(datagram):
        line_end = datagram.index(b"\n", at)
        key, equals, value = datagram[at:line_end].partition(b"=")
        if equals:
            at = line_end + 1
        else:
            (length,) = struct.unpack_from("<Q", datagram, line_end + 1)
            value = datagram[line_end + 9 : line_end + 9 + length]
            assert datagram[line_end + 9 + length : line_end + 10 + length] == b"\n"
            at = line_end + 10 + length
        assert key.decode() not in fields
        fields[key.decode()] = value.decode()
    return fields


def test_journal_gets_text_and_fields(journald: socket.socket, tmp_path: Path) -> None:
    attach(JournalTarget("worker-0", str(tmp_path / "journal")))
    log.event(
        logger,
        logging.WARNING,
        "client refused",
        message_id=log.MessageId.CLIENT_REFUSED,
        reason=CloseReason.KICKED,
        peer="a\nPRIORITY=0",
        message="own",
    )
    assert entry(journald.recv(65_536)) == {
        "MESSAGE": 'client refused reason=kicked peer="a\\nPRIORITY=0" message=own',
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "mpserverd",
        "MPSERVERD_PROCESS": "worker-0",
        "LOGGER": "test",
        "MESSAGE_ID": log.MessageId.CLIENT_REFUSED.value,
        "REASON": "kicked",
        "PEER": "a\nPRIORITY=0",
        "MPSERVERD_MESSAGE": "own",
    }


def test_journal_that_sleeps_never_blocks(journald: socket.socket, tmp_path: Path) -> None:
    target = attach(JournalTarget("p", str(tmp_path / "journal")))
    for _ in range(2000):
        log.event(logger, logging.INFO, "x")
        if target.lost_count:
            break
    assert target.lost_count
    lost = target.lost_count
    while True:
        try:
            journald.recv(65_536)
        except BlockingIOError:
            break
    log.event(logger, logging.INFO, "awake")
    assert entry(journald.recv(65_536))["MESSAGE"] == f"log lines were lost count={lost}"
    assert entry(journald.recv(65_536))["MESSAGE"] == "awake"


def test_journal_socket_made_anew_is_found(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as first:
        first.bind(str(path))
        target = attach(JournalTarget("p", str(path)))
    path.unlink()
    log.event(logger, logging.INFO, "lost")
    assert target.lost_count == 1
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as second:
        second.bind(str(path))
        log.event(logger, logging.INFO, "found")
        assert "lost count=1" in entry(second.recv(65_536))["MESSAGE"]
        assert entry(second.recv(65_536))["MESSAGE"] == "found"


@pytest.mark.parametrize(
    ("name", "key"),
    [("peer", "PEER"), ("_x", "X"), ("message_id", "MPSERVERD_MESSAGE_ID"), ("code_line", "MPSERVERD_CODE_LINE")],
)
def test_journal_keys_are_ones_that_journald_takes(name: str, key: str) -> None:
    assert log_text.journal_key(name) == key


# Forks


def test_forked_child_never_closes_a_number_that_was_reused(file: Path, tmp_path: Path) -> None:
    """The child closes all it inherited, opens something else under that number, and sets its own log up."""
    (inherited,) = [handler for handler in logging.getLogger().handlers if isinstance(handler, FileTarget)]
    number = inherited.fd
    pid = os.fork()
    if pid == 0:
        try:
            os.close(number)
            other = os.open(os.devnull, os.O_RDONLY)
            os.dup2(other, number)
            log.setup(LogConfig(target=(LogTarget.FILE,), file=str(tmp_path / "child")), process="worker-2")
            log.event(logger, logging.INFO, "from the child")
            os._exit(0 if os.path.samestat(os.fstat(number), os.stat(os.devnull)) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert re.search(rf"mpserverd\[{pid}\] worker-2 INFO from the child", (tmp_path / "child").read_text())
    log.event(logger, logging.INFO, "the parent goes on")
    assert "the parent goes on" in file.read_text()


# Message ids and the limiter


def test_message_ids_are_distinct_uuids() -> None:
    values = [identity.value for identity in log.MessageId]
    assert len(set(values)) == len(values)
    assert all(re.fullmatch(r"[0-9a-f]{12}4[0-9a-f]{19}", value) for value in values)


def test_limiter_lets_a_burst_through_and_counts_the_rest() -> None:
    limiter = log.RateLimiter(interval_s=10, burst=2)
    assert [limiter.admit(now) for now in (0.0, 1.0, 2.0, 3.0, 9.9)] == [0, 0, None, None, None]
    assert [limiter.admit(now) for now in (10.0, 10.1, 10.2, 25.0)] == [3, 0, None, 1]


@given(st.lists(st.floats(0, 1000), max_size=50).map(sorted), st.floats(0.1, 100), st.integers(1, 5))
def test_limiter_loses_no_count(times: list[float], interval_s: float, burst: int) -> None:
    limiter = log.RateLimiter(interval_s, burst)
    answers = [limiter.admit(now) for now in times]
    limiter_tail = limiter.admit(1e9)
    written = [answer for answer in [*answers, limiter_tail] if answer is not None]
    assert len(written) + sum(written) == len(times) + 1


@pytest.mark.parametrize(("interval_s", "burst"), [(0, 1), (1, 0), (-1, 1)])
def test_limiter_without_interval_or_burst_is_refused(interval_s: float, burst: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        log.RateLimiter(interval_s, burst)
