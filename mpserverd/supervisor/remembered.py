"""What the next supervisor must know besides the tables: the settings behind listener ids, and who is quarantined.

A small memfd that holds one JSON object twice; a word says which of the two is valid, so that a kill never leaves half
of one. Unknown keys are left alone by whoever reads it, and missing ones have defaults: an older or a newer version
understands it as far as it can.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import Any

from mpserverd import log
from mpserverd.arena.layouts import description
from mpserverd.arena.shared import LIVE_WORD, PAGE_BYTES, SharedWords
from mpserverd.config.build import build
from mpserverd.config.schema import Config, ListenerConfig
from mpserverd.config.show import as_dict

logger = logging.getLogger(__name__)

FACTS_MAGIC = 0x6D70736661637473
FACTS_VERSION = 1
HALF_BYTES = 1 << 20
_SELECT, _LENGTH = LIVE_WORD, LIVE_WORD + 1


class Remembered:
    """``fd`` is stored with the tables."""

    def __init__(self, fd: int) -> None:
        self._shared = SharedWords(fd, magic=FACTS_MAGIC, version=FACTS_VERSION, what="stored facts")
        self.fd = fd

    @classmethod
    def create(cls) -> Remembered:
        size_bytes = PAGE_BYTES + 2 * HALF_BYTES
        return cls(
            SharedWords.create("mpserverd-facts", size_bytes, magic=FACTS_MAGIC, version=FACTS_VERSION, geometry=[])
        )

    def write(self, facts: dict[str, Any]) -> None:
        """Replace it all; what does not fit is said and not written."""
        body = json.dumps(facts).encode()
        if len(body) > HALF_BYTES:
            log.event(logger, logging.ERROR, "settings too long to be kept", bytes=len(body), at_most=HALF_BYTES)
            return
        words = self._shared.words
        half = (words[_SELECT] & 1) ^ 1
        at = PAGE_BYTES + half * HALF_BYTES
        self._shared.map[at : at + len(body)] = body
        words[_LENGTH + half] = len(body)
        words[_SELECT] = half

    def read(self) -> dict[str, Any]:
        words = self._shared.words
        half = words[_SELECT] & 1
        at = PAGE_BYTES + half * HALF_BYTES
        body = self._shared.map[at : at + min(words[_LENGTH + half], HALF_BYTES)]
        try:
            facts = json.loads(body)
        except ValueError:
            return {}
        return facts if isinstance(facts, dict) else {}


def listener_facts(config: Config, listeners: dict[int, ListenerConfig], next_id: int) -> dict[str, Any]:
    """Listeners by id, with the layouts that they name; what OK has promised; and how the shared memory is laid out,
    for other versions."""
    plain = as_dict(dataclasses.replace(config, listeners=tuple(listeners.values())))
    return {
        "listeners": dict(zip(map(str, listeners), plain["listener"], strict=True)),
        "next_id": next_id,
        "layouts": plain["layout"],
        "sync": str(config.spool.sync),
        "memory": description(),
    }


def known_listeners(facts: dict[str, Any]) -> tuple[dict[int, ListenerConfig], Config]:
    """The settings by id, and a configuration that has their layouts. What this version does not know is left out."""
    layouts = facts.get("layouts", {})
    found = {}
    for number, plain in facts.get("listeners", {}).items():
        config, _ = build({"listener": [plain], "layout": layouts})
        found[int(number)] = config.listeners[0]
    return found, build({"layout": layouts})[0]
