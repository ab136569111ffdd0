"""The words that may stand as values in a configuration. The values of these enums are what people write and read."""

from __future__ import annotations

import enum


class Protocol(enum.StrEnum):
    RAW = "raw"
    MPS = "mps"


class OnFull(enum.StrEnum):
    """What happens to a stream that needs a place in a full arena."""

    BLOCK = "block"
    DROP_OLDEST = "drop-oldest"


class Sync(enum.StrEnum):
    """``NONE``: written data are left to the kernel, and *durable* then only means *written*."""

    DURABLE = "durable"
    NONE = "none"


class LogLevel(enum.StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogTarget(enum.StrEnum):
    JOURNAL = "journal"
    STDERR = "stderr"
    FILE = "file"


class Applies(enum.StrEnum):
    """When a changed value takes effect."""

    START = "start"
    RELOAD = "reload"


ON_FULL_BY_PROTOCOL = {Protocol.RAW: OnFull.DROP_OLDEST, Protocol.MPS: OnFull.BLOCK}
"""Clients that speak raw cut packets in half when they are stalled, so they are not; mps promises to lose nothing."""
