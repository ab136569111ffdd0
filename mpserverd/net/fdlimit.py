"""File descriptors: how many this process may have, and how many clients fit into them.

A connection costs a descriptor in the supervisor, one in its worker and one in each message that carries it, all of
them counted against the same limit by the kernel where they are in flight; hence four a client.
"""

from __future__ import annotations

import resource

DESCRIPTORS_PER_CLIENT = 4
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
