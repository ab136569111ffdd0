"""The language of the control socket."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpserverd.control.messages import Reply, Request
from mpserverd.errors import ProtocolError
from mpserverd.limits import CONTROL_LINE_BYTES_MAX

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None)
@given(st.text(max_size=20), st.dictionaries(st.text(max_size=10), VALUES, max_size=3))
def test_requests_come_back_and_stay_on_one_line(command: str, arguments: dict[str, object]) -> None:
    line = Request(command, arguments).encode()
    assert line.count(b"\n") == 1
    assert Request.decode(line) == Request(command, arguments)


@settings(deadline=None)
@given(VALUES)
def test_replies_come_back(result: object) -> None:
    assert Reply.decode(Reply(True, result).encode()) == Reply(True, result)


def test_faults_keep_text_and_exit_code() -> None:
    fault = Reply.fault("no such\nthing", 3)
    assert Reply.decode(fault.encode()) == fault


@settings(deadline=None)
@given(st.binary(max_size=100))
def test_nonsense_is_a_protocol_error_and_nothing_else(line: bytes) -> None:
    for decode in (Request.decode, Reply.decode):
        try:
            decode(line)
        except ProtocolError:
            continue


@pytest.mark.parametrize(
    "line", [b"[]", b"1", b'{"command": 1}', b'{"command": "x", "arguments": []}', b"[" * 60_000, b"\xff"]
)
def test_what_is_no_request_says_so(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        Request.decode(line)


def test_a_request_that_is_too_long_is_refused_on_both_sides() -> None:
    with pytest.raises(ProtocolError, match="at most"):
        Request("x", {"y": "z" * CONTROL_LINE_BYTES_MAX}).encode()
    with pytest.raises(ProtocolError, match="at most"):
        Request.decode(b"x" * (CONTROL_LINE_BYTES_MAX + 1))
