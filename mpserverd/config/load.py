"""Reads the configuration: one TOML file, the files of ``conf.d`` beside it, and ``--set`` from the command line.

Later wins: conf.d/*.toml in the order of their names, then the overrides. Tables merge key by key; arrays of tables
append; anything else replaces. All faults are reported at once, each with the file it comes from.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli

from mpserverd import limits
from mpserverd.config.build import build
from mpserverd.config.faults import Fault, KeyPath, render
from mpserverd.config.schema import Config
from mpserverd.errors import ConfigError

OVERRIDE_ORIGIN = "--set"


def load(path: str | os.PathLike[str], overrides: Sequence[str] = (), *, conf_d: bool = True) -> Config:
    """Settings from ``path``. Raises ConfigError with all faults."""
    sources = Sources()
    main = Path(path)
    sources.add_file(main)
    if conf_d:
        sources.add_directory(main.parent / "conf.d")
    for override in overrides:
        sources.add_override(override)
    return sources.config(str(path))


def loads(text: str, overrides: Sequence[str] = (), *, name: str = "configuration") -> Config:
    """The same from text; ``name`` stands for the file in messages."""
    sources = Sources()
    sources.add_text(text, name)
    for override in overrides:
        sources.add_override(override)
    return sources.config(name)


class Sources:
    """What was read so far, merged, and where each key came from."""

    def __init__(self) -> None:
        self._tree: dict[str, Any] = {}
        self._origins: dict[KeyPath, str] = {}
        self._faults: list[str] = []

    def add_file(self, path: Path) -> None:
        try:
            text = _read(path)
        except (OSError, ValueError) as error:
            self._faults.append(f"{path}: {_why_unreadable(error)}")
            return
        self.add_text(text, str(path))

    def add_directory(self, directory: Path) -> None:
        """All ``*.toml`` in it, by name. That there is no such directory is fine."""
        try:
            files = sorted(entry for entry in directory.iterdir() if entry.suffix == ".toml")
        except FileNotFoundError:
            return
        except OSError as error:
            self._faults.append(f"{directory}: {_why_unreadable(error)}")
            return
        for file in files:
            self.add_file(file)

    def add_text(self, text: str, origin: str) -> None:
        try:
            tree = tomli.loads(text)
        except (tomli.TOMLDecodeError, RecursionError) as error:
            self._faults.append(f"{origin}: not valid TOML: {error or 'nested too deeply'}".replace("\n", " "))
            return
        self._merge(self._tree, tree, (), origin)

    def add_override(self, override: str) -> None:
        """``KEY=VALUE``; the value is TOML where it can be read as such, else text."""
        key, equals, text = override.partition("=")
        parts = [part.strip() for part in key.split(".")]
        if not equals or not all(parts) or len(parts) < 2:
            self._faults.append(f"{OVERRIDE_ORIGIN} {override!r:.100}: write KEY=VALUE, such as server.workers=2")
            return
        problem = self._set(parts, override_value(text))
        if problem:
            self._faults.append(f"{OVERRIDE_ORIGIN} {key}: {problem}")

    def config(self, name: str) -> Config:
        """The settings. Raises ConfigError."""
        config, faults = build(self._tree)
        lines = [render(fault, self._origin(fault, name)) for fault in faults]
        if self._faults or lines:
            raise ConfigError([*self._faults, *lines])
        return config

    def _origin(self, fault: Fault, name: str) -> str:
        """Where the key, or the nearest thing around it, was written last."""
        for length in range(len(fault.path), 0, -1):
            if fault.path[:length] in self._origins:
                return self._origins[fault.path[:length]]
        return name

    def _note(self, path: KeyPath, value: Any, origin: str) -> None:
        self._origins[path] = origin
        if isinstance(value, Mapping):
            for key, inner in value.items():
                self._note((*path, key), inner, origin)
        elif isinstance(value, list):
            for index, inner in enumerate(value):
                self._note((*path, index), inner, origin)

    def _merge(self, into: dict[str, Any], new: Mapping[str, Any], path: KeyPath, origin: str) -> None:
        for key, value in new.items():
            here = (*path, key)
            old = into.get(key)
            if isinstance(old, dict) and isinstance(value, Mapping):
                self._merge(old, value, here, origin)
            elif isinstance(old, list) and _is_table_array(old) and _is_table_array(value):
                for table in value:
                    self._note((*here, len(old)), table, origin)
                    old.append(table)
            else:
                into[key] = value
                self._note(here, value, origin)

    def _set(self, parts: list[str], value: Any) -> str:
        """Set one value. Returns what is wrong, or ""."""
        node: Any = self._tree
        path: KeyPath = ()
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            step: str | int = part
            if isinstance(node, list):
                if not part.isdecimal() or int(part) > len(node):
                    return f"{part} is no number from 0 to {len(node)}, which would append"
                step = int(part)
                if step == len(node):
                    node.append({})
            elif not isinstance(node, dict):
                return f"{'.'.join(parts[:index])} is no table; nothing can be set inside it"
            elif not last and part not in node:
                node[part] = [] if parts[index + 1].isdecimal() else {}
            path = (*path, step)
            if last:
                node[step] = value
                self._note(path, value, OVERRIDE_ORIGIN)
                return ""
            self._origins.setdefault(path, OVERRIDE_ORIGIN)
            node = node[step]
        return ""


def override_value(text: str) -> Any:
    """``2`` is a number, ``[1, 2]`` a list, ``/x`` and everything else that is no TOML a text."""
    try:
        tree = tomli.loads(f"value = {text}")
    except (tomli.TOMLDecodeError, RecursionError):
        return text
    return tree["value"] if len(tree) == 1 else text


def _is_table_array(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _read(path: Path) -> str:
    """The text of a regular file of bounded size. Raises OSError, ValueError (also for bytes that are no UTF-8)."""
    kind = os.stat(path).st_mode
    if stat.S_ISDIR(kind):
        raise ValueError("a directory; name the file in it")
    if not stat.S_ISREG(kind):
        raise ValueError("not a regular file")
    with open(path, "rb") as file:
        content = file.read(limits.CONFIG_FILE_BYTES_MAX + 1)
    if len(content) > limits.CONFIG_FILE_BYTES_MAX:
        raise ValueError(f"longer than {limits.CONFIG_FILE_BYTES_MAX} bytes")
    return content.decode()


def _why_unreadable(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file; name another one with --config"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror}"
    return str(error)
