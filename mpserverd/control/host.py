"""The machine beneath the daemon: CPU, memory and network, as two looks some time apart.

CPU and network are means over the time between the two looks; the network counts what all interfaces, loopback too,
received and sent. Without psutil, or where /proc hides what it reads, a value is None.
"""

from __future__ import annotations

import time
from typing import Any

SAMPLE_S = 0.2
"""How long a single report looks, to have rates at all. A report that repeats looks since the one before."""


class HostSampler:
    """``sample`` gives the values since the last call of it, or since the sampler was made."""

    def __init__(self) -> None:
        self._at_s, self._net_bytes = time.monotonic(), _net_bytes()
        _cpu_percent()

    def sample(self) -> dict[str, Any]:
        now_s, net_bytes = time.monotonic(), _net_bytes()
        elapsed_s = now_s - self._at_s
        rate = None
        if net_bytes is not None and self._net_bytes is not None and elapsed_s > 0:
            rate = round(max(0, net_bytes - self._net_bytes) / elapsed_s)
        self._at_s, self._net_bytes = now_s, net_bytes
        return {"cpu_percent": _cpu_percent(), "memory_percent": _memory_percent(), "net_bytes_per_s": rate}


def sample_once() -> dict[str, Any]:
    """One look at the machine; takes SAMPLE_S."""
    sampler = HostSampler()
    time.sleep(SAMPLE_S)
    return sampler.sample()


def _net_bytes() -> int | None:
    try:
        import psutil  # noqa: PLC0415  (40 ms that only this report needs)

        counters = psutil.net_io_counters()
    except (ImportError, OSError):
        return None
    return int(counters.bytes_recv + counters.bytes_sent) if counters is not None else None


def _cpu_percent() -> float | None:
    try:
        import psutil  # noqa: PLC0415

        return float(psutil.cpu_percent(None))
    except (ImportError, OSError):
        return None


def _memory_percent() -> float | None:
    try:
        import psutil  # noqa: PLC0415

        return float(psutil.virtual_memory().percent)
    except (ImportError, OSError):
        return None
