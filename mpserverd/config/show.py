"""Prints settings and the option table: as a dictionary, as TOML that loads to the same settings, and as a listing.

Pure: whoever prints it decides where it goes.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from mpserverd.config.faults import key_text
from mpserverd.config.kinds import Size, size_text
from mpserverd.config.options import OPTIONS, SECTIONS, Missing, Option, Shape, of_section
from mpserverd.config.schema import Config

_WIDTH = 116


def as_dict(config: Config) -> dict[str, Any]:
    """Sections and keys as in the file, every default filled in; plain values that JSON can hold."""
    return {
        "server": _plain_section(config.server),
        "buffers": _plain_section(config.buffers),
        "listener": [_plain_section(listener) for listener in config.listeners],
        "client": [_plain_section(client) for client in config.clients],
        "layout": {name: _plain_section(layout, leave_out=("name",)) for name, layout in config.layouts.items()},
        "spool": _plain_section(config.spool),
        "log": _plain_section(config.log),
    }


def _plain_section(settings: Any, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """Keys without a value are left out, and the packet size where a layout says it."""
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    if values.get("layout") is not None:
        del values["packet_size"]
    return {name: _plain(value) for name, value in values.items() if value is not None and name not in leave_out}


def _plain(value: Any) -> Any:
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (ipaddress.IPv4Network, ipaddress.IPv6Network)):
        return str(value.network_address) if value.prefixlen == value.max_prefixlen else str(value)
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return str(value)


def as_toml(config: Config) -> str:
    """A file that loads to these settings."""
    return dict_as_toml(as_dict(config))


def dict_as_toml(settings: Mapping[str, Any]) -> str:
    """The same of what ``as_dict`` made."""
    lines: list[str] = []
    for section, content in settings.items():
        for title, table in _tables(section, content):
            lines += [title, *(f"{name} = {toml_value(value)}" for name, value in table.items()), ""]
    return "\n".join(lines)


def _tables(section: str, content: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if SECTIONS[section] is Shape.ARRAY:
        for table in content:
            yield f"[[{section}]]", table
    elif SECTIONS[section] is Shape.NAMED:
        for name, table in content.items():
            yield f"[{key_text((section, name))}]", table
    else:
        yield f"[{section}]", content


def toml_value(value: Any) -> str:
    """One value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + "".join(_toml_character(character) for character in value) + '"'
    if isinstance(value, list):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key_text((name,))} = {toml_value(item)}" for name, item in value.items()) + " }"
    return repr(value)


def _toml_character(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    return character if character.isprintable() else f"\\U{ord(character):08x}"


def default_value_text(option: Option) -> str:
    """The default in words: a value as TOML, or what stands in for it."""
    if option.default is Missing.REQUIRED:
        return "must be given"
    if option.default is Missing.DERIVED:
        return option.default_text
    if isinstance(option.kind, Size) and option.default:
        return toml_value(size_text(option.default))
    return toml_value(_plain(option.default))


def wants_text(option: Option) -> str:
    """What the value may be, with its unit where the bounds do not say it."""
    unit = "" if not option.unit or isinstance(option.kind, Size) else f", in {option.unit}"
    return option.kind.wants() + unit


def default_toml() -> str:
    """Every option with its help, bounds and default, as a commented file. It loads to the default settings."""
    lines: list[str] = []
    for section, shape in SECTIONS.items():
        # Sections that do not exist unless somebody writes them stay comments as a whole.
        commented = shape is Shape.NAMED or section == "client"
        title = shape.value.format(name=section)
        lines += [f"# {title}" if commented else title]
        for option in of_section(section).values():
            lines += [f"# {line}" for line in textwrap.wrap(_help_text(option), _WIDTH)]
            unwritten = commented or isinstance(option.default, Missing)
            shown = "..." if isinstance(option.default, Missing) else default_value_text(option)
            lines += [f"# {option.name} = {shown}" if unwritten else f"{option.name} = {shown}"]
        lines += [""]
    return "\n".join(lines)


def _help_text(option: Option) -> str:
    default = f" Default: {default_value_text(option)}." if isinstance(option.default, Missing) else ""
    return f"{option.help} Value: {wants_text(option)}.{default} Applies at: {option.applies}."


def listing() -> str:
    """All options for a terminal, one paragraph each."""
    paragraphs = []
    for option in OPTIONS:
        head = f"{option.key}  (default: {default_value_text(option)}; applies at {option.applies})"
        body = f"{option.help} Value: {wants_text(option)}."
        paragraphs.append(head + "\n" + textwrap.fill(body, 96, initial_indent="    ", subsequent_indent="    "))
    return "\n".join(paragraphs) + "\n"


def manual_row(option: Option) -> str:
    """The row of the option in docs/configuration.md."""
    wants = wants_text(option).replace("|", "\\|")
    default = default_value_text(option)
    shown = default if isinstance(option.default, Missing) else f"`{default}`"
    return f"| `{option.name}` | {option.help} | {wants} | {shown} | {option.applies} |"
