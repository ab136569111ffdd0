"""Reads the configuration: one TOML file, the files of ``conf.d`` beside it, and ``--set`` from the command line.

Later wins: conf.d/*.toml in the order of their names, then the overrides. Tables merge key by key; arrays of tables
append; anything else replaces. All faults are reported at once, each with the file it comes from.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli

from mpserverd import limits
from mpserverd.config.build import build
from mpserverd.config.faults import Fault, KeyPath, key_text, render
from mpserverd.config.schema import Config
from mpserverd.errors import ConfigError

OVERRIDE_ORIGIN = "--set"
_NESTING_MAX = 16
"""Levels of tables and lists; the deepest key of the option table stands at the fourth."""
_TOO_DEEP = f"nested too deeply; at most {_NESTING_MAX} levels"
_INDEX = re.compile(r"[0-9]{1,9}")


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
        except (ValueError, RecursionError) as error:
            self._faults.append(f"{origin}: {_why_no_toml(error)}")
            return
        if not _depth_within(tree, _NESTING_MAX):
            self._faults.append(f"{origin}: {_TOO_DEEP}")
            return
        self._merge(self._tree, tree, (), origin)

    def add_override(self, override: str) -> None:
        """``KEY=VALUE``; the value is TOML where it can be read as such, else text."""
        key, equals, text = override.partition("=")
        parts = [part.strip() for part in key.split(".")]
        if not equals or not all(parts) or len(parts) < 2:
            self._faults.append(f"{OVERRIDE_ORIGIN} {override!r:.100}: write KEY=VALUE, such as server.workers=2")
            return
        value = override_value(text)
        too_deep = len(parts) > _NESTING_MAX or not _depth_within(value, _NESTING_MAX)
        problem = _TOO_DEEP if too_deep else self._set(parts, value)
        if problem:
            self._faults.append(f"{OVERRIDE_ORIGIN} {key_text(tuple(parts[:_NESTING_MAX]))}: {problem}")

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
        """Set one value. Returns what is wrong, or ""; then nothing was set, and no table was begun."""
        problem = self._why_not_set(parts)
        if problem:
            return problem
        node: Any = self._tree
        path: KeyPath = ()
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            step: str | int = part
            if isinstance(node, list):
                step = int(part)
                if step == len(node):
                    node.append({})
            elif not last and part not in node:
                node[part] = [] if parts[index + 1].isdecimal() else {}
            path = (*path, step)
            if last:
                node[step] = value
                self._note(path, value, OVERRIDE_ORIGIN)
                break
            self._origins.setdefault(path, OVERRIDE_ORIGIN)
            node = node[step]
        return ""

    def _why_not_set(self, parts: list[str]) -> str:
        """What stands in the way of ``parts``, or "". Changes nothing."""
        node: Any = self._tree
        for index, part in enumerate(parts):
            if isinstance(node, list):
                if not _INDEX.fullmatch(part) or int(part) > len(node):
                    return f"{key_text((part,))} is no number from 0 to {len(node)}, which would append"
                node = node[int(part)] if int(part) < len(node) else {}
            elif not isinstance(node, dict):
                return f"{key_text(tuple(parts[:index]))} is no table; nothing can be set inside it"
            else:
                following = parts[index + 1] if index + 1 < len(parts) else ""
                node = node.get(part, [] if following.isdecimal() else {})
        return ""


def override_value(text: str) -> Any:
    """``2`` is a number, ``[1, 2]`` a list, ``/x`` and everything else that is no TOML a text."""
    try:
        tree = tomli.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return tree["value"] if len(tree) == 1 else text


def _why_no_toml(error: ValueError | RecursionError) -> str:
    """tomli lets through what Python says of a number of thousands of digits (ValueError) and of its own stack."""
    if isinstance(error, RecursionError):
        return _TOO_DEEP
    if isinstance(error, tomli.TOMLDecodeError):
        return f"not valid TOML: {error}".replace("\n", " ")
    return "not valid TOML: a number with too many digits" if "digits" in str(error) else f"not valid TOML: {error}"


def _depth_within(tree: Any, levels: int) -> bool:
    """Whether nothing lies deeper: whoever walks such a tree may call itself."""
    layer = [tree]
    for _ in range(levels + 1):
        layer = [inner for value in layer for inner in _inner(value)]
        if not layer:
            return True
    return False


def _inner(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return value if isinstance(value, list) else []


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
