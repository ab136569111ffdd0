"""What a dead worker had in hand: whose stream, or whose hello, is suspected of the death, and convicted of the third.

A stream is known by its number and gets on when packets of it are checked; a hello is known by its connection and
never gets on. What becomes of the convicted connection is not decided here; who came with it is refused from then on
(see quarantine.py). A hello names nobody until it is understood: then it is the hellos of that address.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from mpserverd import log
from mpserverd.arena.state import Check, Con, ConnectionState, Slot, Str
from mpserverd.net.allowlist import Address
from mpserverd.supervisor.child import Child
from mpserverd.supervisor.connection import Connection
from mpserverd.supervisor.core import Core
from mpserverd.supervisor.quarantine import DEATHS_MAX, QUARANTINE_S, Quarantine

logger = logging.getLogger(__name__)


class Suspecting:
    """``get`` gives a connection by its row; ``on_change`` is called when somebody is in quarantine who was not."""

    def __init__(self, core: Core, quarantine: Quarantine, get: Callable[[int], Connection | None]) -> None:
        self._core = core
        self._quarantine = quarantine
        self._get = get
        self.on_change: Callable[[], None] = _nothing

    def convict(self, child: Child) -> Connection | None:
        """``child`` is dead; its connections are still its own. The one over which workers died once too often."""
        row = int(self._core.state.slots[child.slot, Slot.IN_HAND]) - 1
        connection = self._get(row)
        if connection is None or connection.worker is not child or child.was_killed_by_others:
            return None
        known = self._known_as(connection)
        timeout_s = self._core.config.server.heartbeat_timeout_s
        if known is None or not self._quarantine.died(*known, time.monotonic(), hang_s=timeout_s):
            return None
        self._put_into_quarantine(connection)
        return connection

    def _known_as(self, connection: Connection) -> tuple[str, int] | None:
        """What deaths are counted by, and how far it has got; None when its worker had let go of it."""
        table = self._core.state
        state = table.connections[connection.row, Con.STATE]
        if state == ConnectionState.HELLO:
            return f"hello {connection.cookie}", 0
        if state != ConnectionState.ASSIGNED or connection.stream is None:
            return None
        stream = table.streams[connection.stream]
        record = (Str.CHECK0, Str.CHECK1)[int(stream[Str.CHECK_SELECT]) & 1]
        return f"stream {stream[Str.NUMBER]}", int(stream[record + Check.CHECKED])

    def _put_into_quarantine(self, connection: Connection) -> None:
        named = connection.client is not None
        unheard = connection.greets and not named
        name = connection.client or (hellos_of if unheard else str)(connection.address)
        stream = "" if connection.stream is None else self._core.state.stream_name(connection.stream)
        entry = self._quarantine.add(name, stream, time.time(), named=named)
        self.on_change()
        self._core.note(
            logger,
            logging.ERROR,
            "stream quarantined",
            message_id=log.MessageId.STREAM_QUARANTINED,
            stream=stream or None,
            peer=connection.peer,
            client=name,
            why=f"{DEATHS_MAX} workers died on it at the same packet",
            refused="until released" if not entry.until_unix_s else f"for {QUARANTINE_S:.0f} s",
        )


def hellos_of(address: Address) -> str:
    """The name in quarantine of whoever sends hellos from there; ``@`` is in no client id and in no address."""
    return f"hello@{address}"


def _nothing() -> None:
    """Nobody wants to know."""
