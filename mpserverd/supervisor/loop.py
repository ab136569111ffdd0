"""The supervisor's event loop: epoll, a heap of timers on the monotonic clock, and signals as bytes in a pipe.

Rules: callbacks never block. A descriptor is unwatched before it is closed; an event that was fetched for a descriptor
which a callback of the same batch has closed, and whose number was taken again, is not delivered to the newcomer.
Signal handlers do nothing: ``set_wakeup_fd`` writes the number into the pipe.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import select
import signal
import time
from collections.abc import Callable, Iterable, Iterator

READ, WRITE = select.EPOLLIN, select.EPOLLOUT

_BATCH_MAX = 256


class Timer:
    """Handle of one call in the future; ``cancel`` is allowed at any time."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Loop:
    """Runs until ``stop``. Must be made, run and closed in the main thread."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watched: dict[int, tuple[int, Callable[[int], None]]] = {}
        self._serial = itertools.count()
        self._timers: list[tuple[float, int, Timer]] = []
        self._running = False

    def watch(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """Call ``callback(events)`` whenever one of ``events`` (or an error) is there. Replaces an earlier watch."""
        if fd in self._watched:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._watched[fd] = (next(self._serial), callback)

    def unwatch(self, fd: int) -> None:
        """Forget ``fd``; to be called before it is closed. Does nothing when it is not watched."""
        if self._watched.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def after(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(callback)
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._serial), timer))
        return timer

    def stop(self) -> None:
        self._running = False

    def run(self) -> None:
        self._running = True
        while self._running:
            self.run_once()

    def run_once(self) -> None:
        """Wait for the next event or timer, then call whatever is due."""
        newest = next(self._serial)
        for fd, events in self._epoll.poll(self._wait_s(), _BATCH_MAX):
            watched = self._watched.get(fd)
            if watched is not None and watched[0] < newest:
                watched[1](events)
        now_s = time.monotonic()
        while self._timers and self._timers[0][0] <= now_s:
            timer = heapq.heappop(self._timers)[2]
            callback, timer.callback = timer.callback, None
            if callback is not None:
                callback()

    def _wait_s(self) -> float:
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        if not self._timers:
            return 1.0
        return max(0.0, self._timers[0][0] - time.monotonic())

    def close(self) -> None:
        self._epoll.close()

    @contextlib.contextmanager
    def signals(self, numbers: Iterable[signal.Signals], callback: Callable[[int], None]) -> Iterator[None]:
        """Deliver these signals as ``callback(number)`` from the loop; restores what was there before."""
        read_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        old_wakeup = signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        old_handlers = {number: signal.signal(number, _nothing) for number in numbers}

        def fetch(_: int) -> None:
            for number in os.read(read_fd, 1024):
                if number in old_handlers:
                    callback(number)

        self.watch(read_fd, READ, fetch)
        try:
            yield
        finally:
            self.unwatch(read_fd)
            for number, handler in old_handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(old_wakeup)
            os.close(read_fd)
            os.close(write_fd)


def _nothing(_number: int, _frame: object) -> None:
    """Exists so that the interpreter writes the signal's number into the wakeup descriptor."""
