"""Reasons of failed connections as people read them. In JSON they stay the words that programs look for.

A reason is the name of an errno (``ECONNRESET``) or a word of our own, with ``connect_`` in front when an attempt to
connect failed (load/link.py), or the code of an mps server's refusal after ``refused_`` (load/mps_link.py).
"""

from __future__ import annotations

import errno
import os

_OWN_WORDS = {
    "closed_by_peer": "closed by the server before everything was sent",
    "close_timeout": "the server did not close in time",
    "stalled": "the server stopped taking data",
    "protocol": "the server said something that is not mps",
    "hello_unanswered": "closed by the server before it answered the hello",
    "hello_timeout": "the server did not answer the hello in time",
    "hello_stalled": "the server's kernel did not take the hello",
    "unacknowledged": "the server did not acknowledge everything in time",
    "acknowledged_is_gone": "the server asked for packets that it had acknowledged",
    "not_a_new_stream": "the server did not begin a new stream",
    "other_epoch": "the server goes on with another stream",
    "beyond_what_was_sent": "the server says it has packets that were never sent",
}
_ATTEMPT = "connect_"
_REFUSED = "refused_"


def reason_text(reason: str) -> str:
    """``connection refused`` for ``connect_ECONNREFUSED``; a reason that is not known as it is."""
    if reason.startswith(_REFUSED):
        return f"the server refused the hello: {reason.removeprefix(_REFUSED)}"
    name = reason.removeprefix(_ATTEMPT)
    number = getattr(errno, name, None)
    text = os.strerror(number).lower() if isinstance(number, int) else _OWN_WORDS.get(name, name)
    return text if name == reason or text.startswith("connection ") else f"connecting failed: {text}"
