"""Forking a child so that it owns nothing by accident.

The child never returns from here, so the supervisor's objects, which live in frames below it, are never finalised
there; and ``gc.freeze`` keeps the collector away from those in cycles. Otherwise an object of the supervisor would
close its descriptor's number long after that number means something else in the child.

Fork from the main thread only: the death signal is sent when the *thread* that forked ends.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from mpserverd import log
from mpserverd.arena.counters import Role
from mpserverd.arena.launch import Launch

logger = logging.getLogger(__name__)

Program = Callable[[Launch], NoReturn]

EXIT_CRASHED = 70
EXIT_ORPHANED = 71

_PR_SET_NAME = 15
_PR_SET_PDEATHSIG = 1
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)
"""Ctrl-C and ``kill`` on a process group reach the children too, but when they stop is the supervisor's decision."""
_OOM_SCORE = {Role.STORER: 100, Role.WORKER: 200}
"""Added to what the supervisor has: it goes last, and a worker's place can be taken over at once."""

_libc = ctypes.CDLL(None, use_errno=True)


def spawn(launch: Launch, program: Program, *, cpus: Sequence[int] | None) -> int:
    """Fork, and run ``program(launch)`` in the child. Returns its pid.

    Signals are blocked meanwhile: one that arrived between fork and reset would be told to the supervisor's pipe.
    """
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    gc.freeze()
    try:
        pid = os.fork()
        if pid == 0:
            _become(launch, program, cpus, old_mask)
        return pid
    finally:
        gc.unfreeze()
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)


def _become(
    launch: Launch,
    program: Program,
    cpus: Sequence[int] | None,
    mask: Iterable[int],
) -> NoReturn:
    code = EXIT_CRASHED
    try:
        _die_with(launch.parent_pid)
        _reset_signals(mask)
        close_all_but({0, 1, 2, *launch.keep_fds})
        name_process(launch.name)
        log.setup_child(launch.config.log, process=launch.name)
        _adjust(launch.role, cpus)
        program(launch)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        # the one broad handler of a child: whatever it is, the supervisor must see an exit code
        log.event(
            logger,
            logging.ERROR,
            "child crashed",
            message_id=log.MessageId.OUR_FAULT,
            exc_info=True,
            child=launch.name,
        )
    finally:
        _leave(code)
    raise AssertionError("a program returned and the process went on")


def _leave(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue
    os._exit(code)


def _die_with(parent_pid: int) -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the line above
        os._exit(EXIT_ORPHANED)


def _reset_signals(mask: Iterable[int]) -> None:
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        if callable(handler) and handler is not signal.default_int_handler:
            signal.signal(number, signal.SIG_DFL)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def close_all_but(keep: Iterable[int]) -> None:
    """Close every descriptor that is not named."""
    highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))
    bounds = [-1, *sorted(set(keep)), highest + 1]
    for below, above in itertools.pairwise(bounds):
        if above - below > 1:
            os.closerange(below + 1, above)


def name_process(name: str) -> None:
    """What ps and top show as the command's short name; at most 15 bytes."""
    _libc.prctl(_PR_SET_NAME, f"mps-{name}".encode()[:15], 0, 0, 0)


def _adjust(role: Role, cpus: Sequence[int] | None) -> None:
    """What it may run on, and when it is killed for memory. Neither is worth a child that does not start."""
    try:
        if cpus:
            os.sched_setaffinity(0, cpus)
    except OSError as error:
        log.event(logger, logging.WARNING, "cpu affinity not applied", cpus=list(cpus or ()), error=error.strerror)
    try:
        with open("/proc/self/oom_score_adj", "r+", encoding="ascii") as file:
            score = int(file.read())
            file.seek(0)
            file.write(str(min(1000, score + _OOM_SCORE[role])))
    except OSError as error:
        log.event(logger, logging.DEBUG, "oom_score_adj stays", error=error.strerror)
