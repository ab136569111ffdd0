"""``mpserverd --daemon``: leaves the terminal, keeps one pidfile, becomes the configured user, and reports the start.

The process that the operator started waits until the daemon says that it is ready, or why not, and leaves with that
answer. Detaching itself is python-daemon's job. Under systemd none of this is used.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import daemon
import lockfile
from daemon.pidfile import TimeoutPIDLockFile

from mpserverd.cli import account as accounts
from mpserverd.cli.pidfile import Stale, examine, lock_starts
from mpserverd.config.schema import Config, LogTarget
from mpserverd.errors import MpserverdError, StartError

UMASK = 0o027
_READY = b"ready\n"
_REPORT_BYTES_MAX = 65_536

Run = Callable[[Callable[[], None]], int]
"""Runs the daemon: takes what to call when it is ready, returns the exit code."""
Say = Callable[[str], None]


def start(config: Config, pidfile: Path | None, run: Run, say: Say) -> int:
    """Start ``run`` in the background. Returns the exit code for the operator's shell. Raises StartError.

    ``say`` gets remarks that are no errors.
    """
    account = accounts.wanted(config.server)
    accounts.refuse_privileged_ports(config, account)
    accounts.make_directories(config, account, pidfile)
    if config.log.target == (LogTarget.STDERR,):
        say('in the background nobody reads standard error; set [log] target to ["file"] or ["journal"]')
    lock = -1 if pidfile is None else lock_starts(pidfile)
    try:
        if pidfile is not None:
            _clear_stale(pidfile, say)
        reader, writer = os.pipe()
        first_child = os.fork()
        if first_child == 0:
            os.close(reader)
            _be_daemon(config, account, pidfile, run, _Report(writer), lock)
        os.close(writer)
    finally:
        # After the fork the daemon's own copy holds the lock.
        if lock >= 0:
            os.close(lock)
    try:
        os.waitpid(first_child, 0)
        return _wait_for_report(reader)
    finally:
        os.close(reader)


def _clear_stale(pidfile: Path, say: Say) -> None:
    found = examine(pidfile)
    if isinstance(found, int):
        raise StartError(f"already running as process {found} (pidfile {pidfile})")
    if isinstance(found, Stale):
        say(f"replacing {pidfile}: it {found.why}")
        try:
            pidfile.unlink(missing_ok=True)
        except OSError as error:
            raise StartError(f"cannot remove the stale pidfile {pidfile}: {error.strerror}") from error


class _Report:
    """The daemon's end of the pipe: says once how the start went."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def ready(self) -> None:
        self._say(_READY)

    def failed(self, code: int, text: str) -> None:
        self._say(f"{code} {text}".encode(errors="replace")[: _REPORT_BYTES_MAX - 1])

    def _say(self, message: bytes) -> None:
        if self.fd < 0:
            return
        with contextlib.suppress(OSError):  # the operator's process may be gone
            os.write(self.fd, message)
        os.close(self.fd)
        self.fd = -1


def _wait_for_report(reader: int) -> int:
    """Until the daemon is ready, has failed, or is gone. Raises StartError for the latter two."""
    message = b""
    while message != _READY and (more := os.read(reader, _REPORT_BYTES_MAX)):
        message += more
    if message == _READY:
        return 0
    code, _, text = message.decode(errors="replace").partition(" ")
    failure = StartError(text or "the daemon ended before it was ready; its log says why")
    failure.exit_code = max(int(code), 1) if code.isdecimal() else 1
    raise failure


def _be_daemon(
    config: Config, account: accounts.Account, pidfile: Path | None, run: Run, report: _Report, lock: int
) -> None:
    """Everything that happens on the other side of the fork; does not return."""
    code = 1
    try:
        code = _run_detached(config, account, pidfile, run, report, lock)
        report.failed(code, "the daemon ended before it was ready; its log says why")
    except MpserverdError as error:
        code = error.exit_code
        report.failed(code, str(error))
    except lockfile.Error as error:
        report.failed(
            code, f"cannot make the pidfile {pidfile}: {error}; its directory must be writable for the daemon"
        )
    except OSError as error:
        report.failed(code, f"cannot start in the background: {error}")
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 1
        report.failed(code, "stopped before it was ready")
    except BaseException:
        report.failed(code, traceback.format_exc())
    finally:
        # Handlers and buffers of the process that was forked from are its own.
        os._exit(code)


def _run_detached(
    config: Config, account: accounts.Account, pidfile: Path | None, run: Run, report: _Report, lock: int
) -> int:
    if config.server.nice:
        try:
            os.nice(config.server.nice)
        except OSError as error:
            raise StartError(f"cannot set [server] nice = {config.server.nice}: {error.strerror}") from error
    accounts.take_groups(account)
    # python-daemon asks these for their descriptors; they may be something without one, or None where it was closed.
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(fd, mode, closefd=False) for fd, mode in enumerate("rww"))
    context = daemon.DaemonContext(
        working_directory="/",
        umask=UMASK,
        uid=account.uid,
        gid=account.gid,
        detach_process=True,
        files_preserve=[report.fd, *([lock] if lock >= 0 else [])],
        pidfile=None if pidfile is None else TimeoutPIDLockFile(str(pidfile), acquire_timeout=0),
        signal_map={signal.SIGTTIN: None, signal.SIGTTOU: None, signal.SIGTSTP: None},
    )
    context.open()
    if lock >= 0:
        os.close(lock)
    try:
        accounts.check_program_is_readable(account)
        return run(report.ready)
    finally:
        with contextlib.suppress(lockfile.Error):  # somebody removed it
            context.close()
