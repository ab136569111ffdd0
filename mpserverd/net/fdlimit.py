"""File descriptors: how many this process may have, and how many clients fit into them.

No process holds more than one for a client. But the kernel holds those in flight, of all processes of the user, against
the same limit, unless the sender has CAP_SYS_RESOURCE or CAP_SYS_ADMIN (too_many_unix_fds): a client is in two carriers
while these are exchanged, and once in a worker's channel while it is handed over; hence three a client.
"""

from __future__ import annotations

import resource

DESCRIPTORS_PER_CLIENT = 3
RESERVED_DESCRIPTORS = 1024
RESERVED_DESCRIPTORS_MIN = 448
"""What the daemon itself needs at most: doorbells, channels, pidfds, control connections, listeners, open segments.
Where the limit is small, so small is the reserve."""


def raise_descriptor_limit() -> int:
    """Raise the soft limit to the hard one and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (ValueError, OSError):  # an unlimited hard limit above the kernel's nr_open
            return soft
        soft = hard
    return soft


def clients_that_fit(descriptor_limit: int) -> int:
    """How many clients a limit of so many descriptors allows; may be zero."""
    reserve = min(RESERVED_DESCRIPTORS, max(RESERVED_DESCRIPTORS_MIN, descriptor_limit // 2))
    return max(0, (descriptor_limit - reserve) // DESCRIPTORS_PER_CLIENT)
