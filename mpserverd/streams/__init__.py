"""What works on a spool, with or without the daemon: listing, reading, exporting, verifying."""

from mpserverd.streams.catalog_view import Hole
from mpserverd.streams.listing import StreamInfo, list_streams
from mpserverd.streams.reader import Batch, RetiredError, Stream, open_stream

__all__ = ["Batch", "Hole", "RetiredError", "Stream", "StreamInfo", "list_streams", "open_stream"]
