"""Logging for every process of the daemon: ``setup`` at the start, ``setup_child`` after each fork, then ``event`` for
each thing that happened.

A line is constant text, then ``key=value`` with the unit in the key. Never one a packet. What the targets promise
stands in log_targets.py, how values are written in log_text.py, the events with a number of their own in log_ids.py.

    _log = logging.getLogger(__name__)
    log.event(_log, logging.INFO, "client connected", message_id=log.MessageId.CLIENT_CONNECTED, peer=peer, worker=2)
"""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import Any

from mpserverd.config.schema import LogConfig, LogTarget
from mpserverd.errors import StartError
from mpserverd.log_ids import MessageId
from mpserverd.log_targets import FileTarget, JournalTarget, StderrTarget, Target
from mpserverd.log_text import RateLimiter, event_text

__all__ = [
    "MessageId",
    "Prepared",
    "RateLimiter",
    "event",
    "install",
    "prepare",
    "reopen",
    "set_level",
    "setup",
    "setup_child",
]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Prepared:
    """Open targets that nothing is written to yet: ``install`` them, or ``close`` them."""

    config: LogConfig
    targets: tuple[Target, ...]
    notes: tuple[str, ...]

    def close(self) -> None:
        for target in self.targets:
            target.close()


def setup(config: LogConfig, *, process: str) -> None:
    """Send everything that this process logs to the configured targets, instead of those of an earlier call.

    ``process`` names the process in its lines: "supervisor", "worker-1", "storer". Raises StartError when the log file
    cannot be opened; the targets of the earlier call then stay. Without journald, standard error takes its place.
    """
    install(prepare(config, process=process))


def setup_child(config: LogConfig, *, process: str) -> None:
    """The same after a fork, where nothing is reason enough not to start: standard error takes the file's place."""
    try:
        setup(config, process=process)
    except StartError as error:
        others = tuple(target for target in config.target if target is not LogTarget.FILE)
        setup(dataclasses.replace(config, target=others or (LogTarget.STDERR,)), process=process)
        event(_log, logging.ERROR, "no log file", error=error, goes_on="without it")


def prepare(config: LogConfig, *, process: str) -> Prepared:
    """Open the targets and change nothing. Raises StartError."""
    fresh: list[Target] = []
    notes: list[str] = []
    for target in config.target:
        try:
            fresh.append(_make(target, config, process))
        except OSError as error:
            if target is LogTarget.FILE:
                for made in fresh:
                    made.close()
                raise StartError(f"cannot open the log file {config.file}: {error.strerror}; see [log] file") from error
            notes.append(error.strerror or str(error))
            if LogTarget.STDERR not in config.target:
                fresh.append(_make(LogTarget.STDERR, config, process))
    return Prepared(config, tuple(fresh), tuple(notes))


def install(prepared: Prepared) -> None:
    """Log to these from now on. Descriptors of earlier targets are closed only if this process opened them."""
    root = logging.getLogger()
    earlier = _targets()
    for old in earlier:
        root.removeHandler(old)
        old.close()
    for handler in prepared.targets:
        root.addHandler(handler)
    set_level(prepared.config.level)
    if not earlier:  # else it was said before the fork
        for reason in prepared.notes:
            event(_log, logging.WARNING, "journald does not answer", used_instead="stderr", reason=reason)


def _make(target: LogTarget, config: LogConfig, process: str) -> Target:
    if target is LogTarget.JOURNAL:
        return JournalTarget(process)
    if target is LogTarget.FILE:
        return FileTarget(config.file, process)
    return StderrTarget(process, to_journal=stderr_is_journal())


def stderr_is_journal(environ: dict[str, str] | None = None) -> bool:
    """Whether standard error is the stream that systemd connected to the journal (JOURNAL_STREAM, device:inode)."""
    stream = (os.environ if environ is None else environ).get("JOURNAL_STREAM", "")
    try:
        there = os.fstat(2)
    except OSError:
        return False
    return stream == f"{there.st_dev}:{there.st_ino}"


def _targets() -> list[Target]:
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, Target)]


def set_level(word: str) -> None:
    """``debug``, ``info``, ``warning`` or ``error``. Raises ValueError for another word."""
    logging.getLogger().setLevel(word.upper())


def reopen() -> None:
    """Open the log file again, after logrotate has moved it away. Lines go on into the old one if that fails."""
    for target in _targets():
        try:
            target.reopen()
        except OSError as error:
            event(_log, logging.ERROR, "log target not opened again", reason=error.strerror)


def event(
    logger: logging.Logger,
    level: int,
    text: str,
    /,
    *,
    message_id: MessageId | None = None,
    exc_info: BaseException | bool | None = None,
    **fields: Any,
) -> None:
    """Log ``text`` and ``fields``. ``text`` is a constant; whatever varies is a field.

    Values may be anything; enums with a ``word`` give that. ``suppressed=0`` is left out: a RateLimiter's answer
    can be passed on as it is.
    """
    if not logger.isEnabledFor(level):
        return
    if fields.get("suppressed") == 0:
        del fields["suppressed"]
    extra = {"event_fields": fields, "message_id": message_id}
    logger.log(level, event_text(text, fields), extra=extra, exc_info=exc_info, stacklevel=2)
