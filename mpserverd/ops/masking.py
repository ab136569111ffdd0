"""Takes secrets out of what leaves the machine in a support bundle. Pure.

Two nets. Settings are shown by an allowlist of keys: what is not listed, known or not, is masked. And whatever text
goes into a bundle is scrubbed of every masked value, wherever else it was written, and of what looks like a secret:
passwords in URLs, tokens, keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tomli

MASK = "(masked)"
SECRET_CHARACTERS_MIN = 4
"""Shorter values are not looked for elsewhere: they would be found in every word."""
SECRET_DIGITS_MIN = 6

SHOWN_KEYS: frozenset[str] = frozenset(
    {
        "server.workers", "server.max_clients", "server.backlog", "server.cpu_affinity", "server.control_socket",
        "server.user", "server.group", "server.nice", "server.stop_timeout_s", "server.heartbeat_timeout_s",
        "server.restart_backoff_s_max", "server.restart_timeout_s",
        "buffers.bytes", "buffers.chunk_bytes",
        "listener.name", "listener.address", "listener.protocol", "listener.packet_size", "listener.layout",
        "listener.store", "listener.on_full", "listener.allow", "listener.deny", "listener.max_connections",
        "listener.max_connections_per_address", "listener.handshake_timeout_s", "listener.idle_timeout_s",
        "listener.receive_buffer_bytes", "listener.send_buffer_bytes", "listener.nodelay", "listener.keepalive",
        "client.id", "client.address", "client.max_spool_bytes",
        "layout.size", "layout.fields", "layout.sequence", "layout.time",
        "spool.path", "spool.segment_bytes", "spool.commit_interval_s", "spool.sync", "spool.max_bytes",
        "spool.max_bytes_per_stream", "spool.max_age_s", "spool.min_free_bytes",
        "log.level", "log.target", "log.file",
    }
)  # fmt: skip
"""Keys whose values may be read by strangers. A new option is masked until it is written here."""

_NAMED_SECTIONS = {"layout"}
_SECRET_WORD = r"(?:pass(?:word|wd|phrase)?|secret|tokens?|api[-_]?key|private[-_]?key|auth(?:orization)?|credentials?)"
_SECRET_KEY = re.compile(_SECRET_WORD, re.I)
_PATTERNS = (
    (re.compile(r"([a-z][a-z0-9+.-]*://)[^/\s@\"']+@", re.I), rf"\1{MASK}@"),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S), MASK),
    (re.compile(r"\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{4,}", re.I), rf"\1 {MASK}"),
    (
        re.compile(
            rf"([\w.-]*{_SECRET_WORD}[\w-]*[\"']?\s*[=:]\s*)(\[[^\]\n]*\]|\"[^\"\n]*\"|'[^'\n]*'|[^\s,;}}\]]+)", re.I
        ),
        rf"\1{MASK}",
    ),
)
_ASSIGNMENT = re.compile(r"^\s*([\w.\"'-]+)\s*=\s*(.+)$", re.M)
_TABLE = re.compile(r"^\s*\[+\s*([^\]]+?)\s*\]+")
_QUOTED = re.compile(r"\"((?:[^\"\\\n]|\\.)*)\"|'([^'\n]*)'")


def masked_settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The same tree with every value masked whose key is not on the list."""
    return {name: _masked(name, content) for name, content in tree.items()}


def _masked(section: str, content: Any) -> Any:
    if isinstance(content, list) and content and all(isinstance(table, Mapping) for table in content):
        return [_masked(section, table) for table in content]
    if not isinstance(content, Mapping):
        return MASK
    if section in _NAMED_SECTIONS:
        return {name: _masked_table(section, table) for name, table in content.items()}
    return _masked_table(section, content)


def _masked_table(section: str, table: Any) -> Any:
    if not isinstance(table, Mapping):
        return MASK
    return {key: value if f"{section}.{key}" in SHOWN_KEYS else MASK for key, value in table.items()}


def secrets_of(text: str) -> set[str]:
    """Values of masked keys in the text of a configuration file, also of one that cannot be read as TOML."""
    try:
        return set(_secrets_of_tree(tomli.loads(text)))
    except (tomli.TOMLDecodeError, RecursionError):
        return set(_secrets_of_lines(text))


def _secrets_of_tree(tree: Mapping[str, Any]) -> Iterator[str]:
    for section, content in tree.items():
        tables: list[Any] = [content]
        if isinstance(content, list):
            tables = content
        elif isinstance(content, Mapping) and section in _NAMED_SECTIONS:
            tables = list(content.values())
        for table in tables:
            if not isinstance(table, Mapping):
                yield from _texts(table)
                continue
            for key, value in table.items():
                if f"{section}.{key}" not in SHOWN_KEYS:
                    yield from _texts(value)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
    elif isinstance(value, (str, int, float)) and not isinstance(value, bool):
        yield str(value)


def _secrets_of_lines(text: str) -> Iterator[str]:
    section = ""
    for line in text.splitlines():
        table = _TABLE.match(line)
        if table:
            section = table[1].split(".")[0].strip("\"' ")
            continue
        found = _ASSIGNMENT.match(line)
        if found and f"{section}.{found[1]}" not in SHOWN_KEYS and found[1] not in SHOWN_KEYS:
            yield found[2].strip()
            yield from (one or other for one, other in _QUOTED.findall(found[2]))


def scrub(text: str, secrets: Iterable[str]) -> str:
    """Without these values, and without what looks like a secret."""
    for secret in sorted(secrets, key=len, reverse=True):
        if secret.isdecimal():
            if len(secret) >= SECRET_DIGITS_MIN:
                text = re.sub(rf"(?<![\w.]){secret}(?![\w.])", MASK, text)
        elif len(secret) >= SECRET_CHARACTERS_MIN:
            for form in {secret, secret.encode("unicode_escape").decode(), secret.replace('"', '\\"')}:
                text = text.replace(form, MASK)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def scrub_tree(value: Any, secrets: Iterable[str]) -> Any:
    """The same for what becomes JSON, which stays JSON."""
    known = set(secrets)
    if isinstance(value, Mapping):
        return {
            scrub(str(key), known): MASK
            if isinstance(inner, str) and _SECRET_KEY.search(str(key))
            else scrub_tree(inner, known)
            for key, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [scrub_tree(inner, known) for inner in value]
    if isinstance(value, str):
        return scrub(value, known)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and len(str(value)) >= SECRET_DIGITS_MIN:
        return MASK if str(value) in known else value
    return value


def masked_arguments(words: Iterable[str]) -> list[str]:
    """A command line; values of ``--set`` by the same list of keys."""
    found, after_set = [], False
    for word in words:
        if after_set or word.startswith("--set="):
            prefix, assignment = ("", word) if after_set else ("--set=", word.removeprefix("--set="))
            found.append(prefix + _masked_override(assignment))
            after_set = False
        else:
            found.append(word)
            after_set = word == "--set"
    return found


def secrets_of_arguments(words: Iterable[str]) -> set[str]:
    """What ``masked_arguments`` took away."""
    plain = list(words)
    return {
        before.partition("=")[2] if "=" in before and not before.startswith("--set=") else before.split("=", 2)[2]
        for before, after in zip(plain, masked_arguments(plain), strict=True)
        if before != after
    }


def _masked_override(assignment: str) -> str:
    key, _, value = assignment.partition("=")
    parts = [part for part in key.split(".") if not part.isdecimal()]
    if parts and parts[0] in _NAMED_SECTIONS and len(parts) > 2:
        parts = [parts[0], *parts[2:]]
    return f"{key}={value}" if ".".join(parts[:2]) in SHOWN_KEYS else f"{key}={MASK}"
