"""What a child gets at its fork: descriptors, its place in the tables, and its configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from mpserverd.arena.counters import Role
from mpserverd.config.schema import Config, ListenerConfig


@dataclasses.dataclass(frozen=True, slots=True)
class Launch:
    """All descriptors are ints that the child owns from now on; everything else was closed after the fork.

    ``listeners`` maps the listener ids found in rows to their settings, including listeners that a reload removed
    while connections of theirs live on. Doorbells are non-blocking eventfds: ring with ``os.eventfd_write(fd, 1)``,
    hush with ``os.eventfd_read``.
    """

    role: Role
    name: str  # "worker-0", "storer": the word in logs
    index: int  # worker index, 0 for the storer
    slot: int  # row in StateTable.slots
    lease: int  # incarnation number
    parent_pid: int
    config: Config
    listeners: Mapping[int, ListenerConfig]
    state_fd: int
    table_fd: int
    data_fd: int
    channel_fd: int
    doorbell_fd: int
    supervisor_doorbell_fd: int
    storer_doorbell_fd: int
    worker_doorbell_fds: tuple[int, ...]
    lock_fd: int = -1
    """Held by flock since before the fork: *connections* for workers, *files* for the storer; -1 for none."""

    @property
    def keep_fds(self) -> tuple[int, ...]:
        """Everything that must survive the close_range after the fork."""
        fds = (
            self.state_fd,
            self.table_fd,
            self.data_fd,
            self.channel_fd,
            self.doorbell_fd,
            self.supervisor_doorbell_fd,
            self.storer_doorbell_fd,
            self.lock_fd,
            *self.worker_doorbell_fds,
        )
        return tuple(fd for fd in fds if fd >= 0)
