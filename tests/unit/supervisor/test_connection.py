"""What can be asked of a connection's descriptor without touching the socket."""

from __future__ import annotations

import socket

from mpserverd.supervisor.connection import is_ending


def test_a_connection_is_at_its_end_when_its_peer_has_closed_it() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert not is_ending(ours.fileno())
        theirs.shutdown(socket.SHUT_WR)
        assert is_ending(ours.fileno())


def test_one_whose_descriptor_did_not_come_back_is_at_its_end() -> None:
    """It is entered at a takeover, and its client may come back before its row is finished."""
    assert is_ending(-1)
