"""mpserverd: receives, stores and accounts for high-frequency fixed-size packets."""

from mpserverd.version import VERSION as __version__

__all__ = ["__version__"]
