"""What is in an open file, safe from a power cut. On any operating system.

On macOS fsync hands the content to the device and leaves it in the device's cache (its fsync(2)); F_FULLFSYNC empties
that cache too. File systems that do not know it, such as those of a network, say so, and get the fsync.
"""

from __future__ import annotations

import errno
import os
import sys

if sys.platform == "darwin":
    import fcntl

    _UNKNOWN = {errno.ENOTSUP, errno.EINVAL, errno.ENOTTY}

    def flush_to_disk(descriptor: int) -> None:
        """Raises OSError."""
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        except OSError as error:
            if error.errno not in _UNKNOWN:
                raise
            os.fsync(descriptor)

else:

    def flush_to_disk(descriptor: int) -> None:
        """Raises OSError."""
        os.fsync(descriptor)
