"""Names of peers and streams."""

from __future__ import annotations

import ipaddress

from hypothesis import given, settings
from hypothesis import strategies as st

from mpserverd.limits import STREAM_NAME_BYTES_MAX
from mpserverd.supervisor.naming import join_address, normal_address, peer_stream_name, peer_text, split_address

V4, V6 = ipaddress.ip_address("192.0.2.7"), ipaddress.ip_address("2001:db8::1")


def test_a_stream_is_named_after_address_port_and_time() -> None:
    assert peer_stream_name(V4, 4711, 1_700_000_000_123_456_789) == "192.0.2.7-4711-20231114T221320.123456Z"


def test_colons_of_an_ipv6_address_become_dashes() -> None:
    assert peer_stream_name(V6, 1, 0) == "2001-db8--1-1-19700101T000000.000000Z"


@settings(deadline=None)
@given(st.ip_addresses(), st.integers(0, 65535), st.integers(0, 4_000_000_000 * 10**9))
def test_names_are_safe_and_short(address: ipaddress.IPv4Address, port: int, unix_ns: int) -> None:
    name = peer_stream_name(address, port, unix_ns)
    assert len(name) <= 70 < STREAM_NAME_BYTES_MAX
    assert not set(name) - set("0123456789abcdefTZ.-")


def test_peers_are_written_as_people_write_them() -> None:
    assert peer_text(V4, 80) == "192.0.2.7:80"
    assert peer_text(V6, 80) == "[2001:db8::1]:80"


def test_mapped_and_scoped_addresses_are_what_they_mean() -> None:
    assert normal_address("::ffff:192.0.2.7") == V4
    assert normal_address("fe80::1%2") == ipaddress.ip_address("fe80::1")


@settings(deadline=None)
@given(st.ip_addresses())
def test_addresses_come_back_from_their_two_words(address: ipaddress.IPv4Address) -> None:
    high, low = split_address(address)
    assert max(high, low) < 1 << 64
    assert join_address(high, low) == normal_address(str(address))
