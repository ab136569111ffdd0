"""Which settings a reload can change. Pure.

What is fixed for the life of a daemon stays as it was in the settings that a reload puts in force, and is named.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mpserverd.config import rules
from mpserverd.config.faults import render
from mpserverd.config.schema import Config, LayoutConfig, ListenerConfig
from mpserverd.errors import ConfigError

FIXED: dict[str, tuple[str, ...]] = {
    "server": ("control_socket", "user", "group", "nice"),
    "buffers": ("bytes", "chunk_bytes"),
    "spool": ("path", "segment_bytes", "sync"),
}
"""Rows that say "start" in the option table; layouts are treated by name. Clients that are connected were promised
``sync`` by their OK."""


def effective(old: Config, new: Config, clients_max: int) -> tuple[Config, list[str]]:
    """The settings to put in force, and the keys that need a restart. Raises ConfigError when the two do not go
    together."""
    kept: list[str] = []
    sections: dict[str, Any] = {}
    for section, keys in FIXED.items():
        before, after = getattr(old, section), getattr(new, section)
        differing = [key for key in keys if getattr(before, key) != getattr(after, key)]
        kept += [f"{section}.{key}" for key in differing]
        sections[section] = dataclasses.replace(after, **{key: getattr(before, key) for key in differing})
    if new.server.max_clients > clients_max:
        kept.append(f"server.max_clients (the tables hold {clients_max})")
        sections["server"] = dataclasses.replace(sections["server"], max_clients=clients_max)
    changed = [name for name, layout in new.layouts.items() if name in old.layouts and old.layouts[name] != layout]
    kept += [f"layout.{name}" for name in changed]
    # live connections of a listener that is gone may still need a layout that is gone
    layouts = {**new.layouts, **old.layouts}
    listeners = tuple(_with_size_of(listener, layouts) for listener in new.listeners)
    config = dataclasses.replace(new, layouts=layouts, listeners=listeners, **sections)
    faults = [render(fault, "with what stays as it was until a restart") for fault in rules.check(config)]
    if faults:
        raise ConfigError([*faults, f"a restart takes over {', '.join(kept)} too"])
    return config, kept


def _with_size_of(listener: ListenerConfig, layouts: dict[str, LayoutConfig]) -> ListenerConfig:
    if listener.layout is None:
        return listener
    return dataclasses.replace(listener, packet_size=layouts[listener.layout].size)
