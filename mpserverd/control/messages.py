"""The language of the control socket: one JSON object a line, a request and then its reply. Pure.

    {"command": "kick", "arguments": {"target": "pump-7"}}
    {"ok": true, "result": {...}}
    {"ok": false, "error": "no connection matches pump-7", "exit_code": 1}

The reply to ``state`` is sent with two descriptors (SCM_RIGHTS, on its first byte): the state table and the chunk
table, opened read-only.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from mpserverd.errors import ProtocolError
from mpserverd.limits import CONTROL_LINE_BYTES_MAX

REPLY_BYTES_MAX = 16 * 1024 * 1024
"""What a client should be ready to read: 1,000 events with long texts fit many times."""
STATE_DESCRIPTORS = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    command: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)

    def encode(self) -> bytes:
        """The line, with its newline. Raises ProtocolError when it is too long."""
        line = _line({"command": self.command, "arguments": self.arguments})
        if len(line) > CONTROL_LINE_BYTES_MAX:
            raise ProtocolError(f"request of {len(line)} bytes, at most {CONTROL_LINE_BYTES_MAX}")
        return line

    @classmethod
    def decode(cls, line: bytes) -> Request:
        """Raises ProtocolError with a text for the peer."""
        if len(line) > CONTROL_LINE_BYTES_MAX:
            raise ProtocolError(f"request of {len(line)} bytes, at most {CONTROL_LINE_BYTES_MAX}")
        body = _object(line, "request")
        command, arguments = body.get("command"), body.get("arguments", {})
        if not isinstance(command, str) or not isinstance(arguments, dict):
            raise ProtocolError('a request is {"command": "...", "arguments": {...}}')
        return cls(command, arguments)


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """``error`` and ``exit_code`` mean something only when not ``ok``."""

    ok: bool
    result: Any = None
    error: str = ""
    exit_code: int = 0

    @classmethod
    def fault(cls, text: str, exit_code: int = 1) -> Reply:
        return cls(False, None, text, exit_code)

    def encode(self) -> bytes:
        """The line, with its newline."""
        if self.ok:
            return _line({"ok": True, "result": self.result})
        return _line({"ok": False, "error": self.error, "exit_code": self.exit_code})

    @classmethod
    def decode(cls, line: bytes) -> Reply:
        """Raises ProtocolError."""
        body = _object(line, "reply")
        if body.get("ok") is True:
            return cls(True, body.get("result"))
        error, exit_code = body.get("error"), body.get("exit_code", 1)
        if not isinstance(error, str) or not isinstance(exit_code, int):
            raise ProtocolError("a reply that is neither fine nor a fault")
        return cls(False, None, error, exit_code)


def _line(body: dict[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode() + b"\n"


def _object(line: bytes, what: str) -> dict[str, Any]:
    try:
        body = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"{what} is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise ProtocolError(f"{what} is a JSON {type(body).__name__}, not an object")
    return body
