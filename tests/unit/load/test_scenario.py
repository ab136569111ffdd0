"""A scenario divides its work evenly, and refuses what makes no sense."""

from __future__ import annotations

import socket
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpserverd.errors import UsageError
from mpserverd.load.scenario import Scenario, parse_source_addresses, split_clients

TARGET = ((int(socket.AF_INET), ("127.0.0.1", 1)),)


def scenario(**options: Any) -> Scenario:
    return Scenario(TARGET, **options)


@given(clients=st.integers(1, 2000), processes=st.integers(1, 100))
def test_every_client_has_one_process_and_no_process_is_idle(clients: int, processes: int) -> None:
    parts = split_clients(clients, processes)
    assert [client for part in parts for client in part] == list(range(clients))
    assert len(parts) == min(clients, processes)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_packets_follow_from_rate_and_duration() -> None:
    assert scenario(duration_s=30.0).packets_per_client == 301_500
    assert scenario(duration_s=0.5, rate=Fraction("0.5")).packets_per_client == 0
    assert scenario(duration_s=30.0, packets=100).packets_per_client == 100
    assert scenario(duration_s=1.0, packets=10**9).packets_per_client == 10_050
    assert scenario(duration_s=None, packets=7).packets_per_client == 7
    assert scenario(rate=Fraction(0)).packets_per_client is None


def test_a_run_without_an_end_is_refused() -> None:
    with pytest.raises(UsageError, match="no end"):
        scenario(duration_s=None)


def test_batches_are_804_packets_or_a_mebibyte_flat_out() -> None:
    assert scenario().batch_packets(10) == 804
    assert scenario(rate=Fraction(0)).batch_packets(1) == 65_536
    assert scenario(rate=Fraction(0)).batch_packets(1000) == 4194
    assert scenario(rate=Fraction(0), batch=804).batch_packets(1000) == 804
    assert scenario(rate=Fraction(0), packet_size=65_536).batch_packets(10_000) == 1


def test_phases_fill_one_batch_time() -> None:
    assert scenario(clients=10).phase_step == 8_000_000
    assert scenario(rate=Fraction(0)).phase_step == 0


def test_source_addresses_are_taken_in_turn() -> None:
    addresses = parse_source_addresses("127.0.0.1-127.0.0.3, ::1")
    assert addresses == ("127.0.0.1", "127.0.0.2", "127.0.0.3", "::1")
    spread = scenario(source_addresses=addresses)
    assert [spread.source_address(client) for client in range(5)] == [*addresses, "127.0.0.1"]
    assert scenario().source_address(3) is None


@pytest.mark.parametrize("text", ["", "127.0.0.9-127.0.0.1", "::1-127.0.0.1", "localhost", "10.0.0.0-10.255.0.0"])
def test_source_addresses_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="source addresses"):
        parse_source_addresses(text)
