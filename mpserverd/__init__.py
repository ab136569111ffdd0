"""mpserverd: receives, stores and accounts for high-frequency fixed-size packets."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mpserverd.version import VERSION as __version__

if TYPE_CHECKING:
    from mpserverd.client.async_stream_client import AsyncStreamClient
    from mpserverd.client.stream_client import StreamClient
    from mpserverd.streams import Batch, Hole, Stream, list_streams, open_stream

__all__ = [
    "AsyncStreamClient",
    "Batch",
    "Hole",
    "Stream",
    "StreamClient",
    "__version__",
    "list_streams",
    "open_stream",
]

_HOME = {
    **dict.fromkeys(("Batch", "Hole", "Stream", "list_streams", "open_stream"), "mpserverd.streams"),
    "AsyncStreamClient": "mpserverd.client.async_stream_client",
    "StreamClient": "mpserverd.client.stream_client",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that a program's start pays only for what it needs."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
