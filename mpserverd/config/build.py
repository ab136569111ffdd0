"""From what TOML gave to settings, or to the list of everything that is wrong with it.

Two passes: each key by itself against its row in the option table, then the rules that tie keys together
(config/rules.py). A rule is silent about keys that the first pass has already refused. Pure: files are load.py's job.
"""

from __future__ import annotations

import difflib
import ipaddress
from collections.abc import Mapping
from typing import Any

from mpserverd.config import rules
from mpserverd.config.faults import ABSENT, Fault, KeyPath
from mpserverd.config.kinds import WrongValueError
from mpserverd.config.options import SECTION_LENGTH_MAX, SECTIONS, Missing, Shape, of_section
from mpserverd.config.schema import (
    BuffersConfig,
    ClientConfig,
    Config,
    LayoutConfig,
    ListenerConfig,
    LogConfig,
    ServerConfig,
    SpoolConfig,
)
from mpserverd.config.words import ON_FULL_BY_PROTOCOL, Protocol

Tree = Mapping[str, Any]

_CLIENT_STAND_IN: Mapping[str, Any] = {"id": "", "address": ipaddress.ip_network("0.0.0.0/32")}


def build(tree: Tree) -> tuple[Config, list[Fault]]:
    """Settings from a parsed configuration, and its faults; with faults the settings must not be used."""
    builder = _Builder(tree)
    config = builder.config()
    refused = {fault.path for fault in builder.faults}
    echoes = (fault for fault in rules.check(config, refused) if not fault.touches(refused))
    return config, [*builder.faults, *echoes]


def nearest(name: str, names: list[str]) -> str:
    """Advice for an unknown name: the one that was probably meant, or all of them."""
    close = difflib.get_close_matches(name, names, 1, 0.6)
    return f'did you mean "{close[0]}"?' if close else f"known are {', '.join(names)}"


class _Builder:
    """Collects faults and goes on with defaults, so that one run finds them all."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self.faults: list[Fault] = []

    def config(self) -> Config:
        for name, value in self._tree.items():
            if name not in SECTIONS:
                self._fault((name,), f"unknown section; {nearest(name, list(SECTIONS))}", value)
        layouts = self._layouts()
        return Config(
            server=ServerConfig(**self._table("server")),
            buffers=BuffersConfig(**self._table("buffers")),
            listeners=self._listeners(layouts),
            clients=self._clients(),
            layouts=layouts,
            spool=SpoolConfig(**self._table("spool")),
            log=LogConfig(**self._table("log")),
        )

    def _fault(self, path: KeyPath, problem: str, value: Any = ABSENT) -> None:
        self.faults.append(Fault(path, problem, value))

    def _values(self, section: str, path: KeyPath, table: Tree) -> dict[str, Any]:
        """The checked values of one table. Keys that are absent, or wrong, are left out."""
        options = of_section(section)
        values: dict[str, Any] = {}
        for name, value in table.items():
            option = options.get(name)
            if option is None:
                self._fault((*path, name), f"unknown key; {nearest(name, list(options))}", value)
                continue
            try:
                values[name] = option.kind.parse(value)
            except WrongValueError as wrong:
                for problem in wrong.problems:
                    self._fault((*path, name), problem, value)
        for name, option in options.items():
            if option.default is Missing.REQUIRED and name not in table:
                self._fault((*path, name), f"missing; write {option.kind.wants()}")
        return values

    def _table(self, section: str) -> dict[str, Any]:
        table = self._tree.get(section, {})
        if not isinstance(table, Mapping):
            self._fault((section,), f"not a table; write [{section}] on a line of its own, and its keys below", table)
            return {}
        return self._values(section, (section,), table)

    def _array(self, section: str) -> list[tuple[KeyPath, Tree | None]]:
        """Each table with its path; None in the place of what is no table."""
        tables = self._tree.get(section, [])
        if not isinstance(tables, list):
            problem = f"not a list of tables; write [[{section}]] with two brackets, once for each"
            self._fault((section,), problem, tables)
            return []
        for index, table in enumerate(tables):
            if not isinstance(table, Mapping):
                self._fault((section, index), f"not a table; write [[{section}]] and its keys below", table)
        if len(tables) > SECTION_LENGTH_MAX[section]:
            self._fault((section,), f"{len(tables)} tables; at most {SECTION_LENGTH_MAX[section]}")
        return [((section, index), table if isinstance(table, Mapping) else None) for index, table in enumerate(tables)]

    def _listeners(self, layouts: Mapping[str, LayoutConfig]) -> tuple[ListenerConfig, ...]:
        """Without a table there is the default listener; an empty list in the file is a mistake."""
        if "listener" in self._tree and self._tree["listener"] == []:
            self._fault(("listener",), "an empty list; give one [[listener]] at least, or leave the key out", [])
        tables = self._array("listener")
        found = (ListenerConfig() if table is None else self._listener(path, table, layouts) for path, table in tables)
        return tuple(found) or (ListenerConfig(),)

    def _listener(self, path: KeyPath, table: Tree, layouts: Mapping[str, LayoutConfig]) -> ListenerConfig:
        values = self._values("listener", path, table)
        layout = values.get("layout")
        if layout is not None:
            values["packet_size"] = self._size_of_layout(path, table, layout, layouts)
        protocol = values.get("protocol", Protocol.RAW)
        values.setdefault("on_full", ON_FULL_BY_PROTOCOL[protocol])
        return ListenerConfig(**values)

    def _size_of_layout(self, path: KeyPath, table: Tree, name: str, layouts: Mapping[str, LayoutConfig]) -> int:
        if "packet_size" in table:
            self._fault(
                (*path, "packet_size"),
                f"layout.{name} already says the size; leave out packet_size or layout",
                table["packet_size"],
            )
        if name in layouts:
            return layouts[name].size
        written = self._tree.get("layout")
        if not isinstance(written, Mapping) or name not in written:
            known = nearest(name, list(layouts)) if layouts else f"write a [layout.{name}]"
            self._fault((*path, "layout"), f"no such layout; {known}", name)
        return ListenerConfig().packet_size

    def _clients(self) -> tuple[ClientConfig, ...]:
        """An id or an address that is lacking is noted already; a stand-in keeps the client's number and other keys."""
        tables = self._array("client")
        found = [{} if table is None else self._values("client", path, table) for path, table in tables]
        return tuple(ClientConfig(**{**_CLIENT_STAND_IN, **values}) for values in found)

    def _layouts(self) -> dict[str, LayoutConfig]:
        tables = self._tree.get("layout", {})
        if not isinstance(tables, Mapping):
            self._fault(("layout",), f"not a table; write {Shape.NAMED.value.format(name='layout')}", tables)
            return {}
        if len(tables) > SECTION_LENGTH_MAX["layout"]:
            self._fault(("layout",), f"{len(tables)} layouts; at most {SECTION_LENGTH_MAX['layout']}")
        layouts = {}
        for name, table in tables.items():
            layout = self._layout(name, table)
            if layout is not None:
                layouts[name] = layout
        return layouts

    def _layout(self, name: str, table: Any) -> LayoutConfig | None:
        path = ("layout", name)
        if not isinstance(table, Mapping):
            self._fault(path, "not a table; write [layout.NAME] and size and fields below", table)
            return None
        try:
            of_section("listener")["layout"].kind.parse(name)
        except WrongValueError as wrong:
            self._fault(path, f"this name {wrong}")
        values = self._values("layout", path, table)
        if "size" not in values or "fields" not in values:
            fields = table.get("fields")
            if isinstance(fields, Mapping) and fields:
                checked = (values.get("sequence"), values.get("time"))
                self.faults += rules.layout_faults(name, values.get("size"), fields, *checked)
            return None
        return LayoutConfig(name=name, **values)
