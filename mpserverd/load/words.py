"""Reasons of failed connections as people read them. In JSON they stay the words that programs look for.

A reason is the name of an errno (``ECONNRESET``) or a word of our own, with ``connect_`` in front when an attempt to
connect failed (load/link.py).
"""

from __future__ import annotations

import errno
import os

_OWN_WORDS = {
    "closed_by_peer": "closed by the server before everything was sent",
    "close_timeout": "the server did not close in time",
    "stalled": "the server stopped taking data",
}
_ATTEMPT = "connect_"


def reason_text(reason: str) -> str:
    """``connection refused`` for ``connect_ECONNREFUSED``; a reason that is not known as it is."""
    name = reason.removeprefix(_ATTEMPT)
    number = getattr(errno, name, None)
    text = os.strerror(number).lower() if isinstance(number, int) else _OWN_WORDS.get(name, name)
    return text if name == reason or text.startswith("connection ") else f"connecting failed: {text}"
