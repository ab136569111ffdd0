"""Reasons are sentences for people."""

from __future__ import annotations

import pytest

from mpserverd.load.words import reason_text


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("connect_ECONNREFUSED", "connection refused"),
        ("connect_ENETUNREACH", "connecting failed: network is unreachable"),
        ("connect_EADDRNOTAVAIL", "connecting failed: cannot assign requested address"),
        ("ECONNRESET", "connection reset by peer"),
        ("EPIPE", "broken pipe"),
        ("close_timeout", "the server did not close in time"),
        ("closed_by_peer", "closed by the server before everything was sent"),
        ("stalled", "the server stopped taking data"),
        ("connect_gaierror", "connecting failed: gaierror"),
        ("None", "None"),
    ],
)
def test_reason_is_said_in_words(reason: str, text: str) -> None:
    assert reason_text(reason) == text
