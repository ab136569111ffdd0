"""What ``mpload`` shows while it runs: a live bar on a terminal, a line a second elsewhere, or nothing.

The text of both is made by pure functions, so that they say the same.
"""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from mpserverd.load.crew import Progress
from mpserverd.load.scenario import Scenario
from mpserverd.load.words import reason_text

LINE_INTERVAL_S = 1.0


class ProgressView:
    """Call ``show`` as often as there is something; use as a context manager, which leaves a clean terminal behind."""

    def __init__(self, console: Console, scenario: Scenario, *, quiet: bool) -> None:
        self._console, self._scenario, self._quiet = console, scenario, quiet
        self._before = Progress(0.0, 0, 0, 0, 0, None)
        self._bar: Bar | None = None
        if console.is_terminal and not quiet:
            self._bar = Bar(
                TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True
            )
            self._task = self._bar.add_task("connecting", total=1.0)

    def __enter__(self) -> ProgressView:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, now: Progress) -> None:
        since_s = now.elapsed_s - self._before.elapsed_s
        if self._quiet or now.elapsed_s <= 0 or (self._bar is None and since_s < LINE_INTERVAL_S):
            return
        rate = (now.packets - self._before.packets) / since_s if since_s > 0 else 0.0
        text = progress_text(self._scenario, now, rate)
        if self._bar is None:
            self._before = now
            self._console.print(f"{now.elapsed_s:.0f} s  {text}", highlight=False, soft_wrap=True)
            return
        if since_s >= LINE_INTERVAL_S:
            self._before = now
        self._bar.update(self._task, description=text, completed=progress_share(self._scenario, now))


def progress_text(scenario: Scenario, now: Progress, rate: float) -> str:
    target = "flat out" if scenario.flat_out else f"target {float(scenario.rate * scenario.clients):,.0f}"
    text = (
        f"{rate:,.0f} packets/s ({target})  {now.packets:,} packets {now.bytes:,} bytes sent  "
        f"{now.connected}/{scenario.clients} clients  {now.errors} errors"
    )
    if scenario.protocol == "mps":
        text = text.replace(" bytes sent  ", f" bytes sent  {now.acked:,} acknowledged  ")
    return f"{text} ({reason_text(now.last_error)})" if now.errors and now.last_error else text


def progress_share(scenario: Scenario, now: Progress) -> float:
    """0 to 1: by packets where their number is known, else by time."""
    wanted = scenario.packets_per_client
    if wanted is not None:
        return now.packets / max(1, wanted * scenario.clients)
    return min(1.0, now.elapsed_s / (scenario.duration_s or 1.0))
