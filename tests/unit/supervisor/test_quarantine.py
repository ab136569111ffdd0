"""Three deaths at the same packet, and nothing less, put a stream into quarantine."""

from __future__ import annotations

import pytest

from mpserverd.supervisor.quarantine import ENTRIES_MAX, QUARANTINE_S, QUIET_S, Quarantine


def test_three_deaths_at_the_same_packet_are_once_too_often() -> None:
    quarantine = Quarantine()
    assert [quarantine.died("stream 7", 160, at) for at in (0.0, 1.0, 2.0)] == [False, False, True]


def test_a_stream_that_got_on_between_two_deaths_is_innocent() -> None:
    quarantine = Quarantine()
    assert not any(quarantine.died("stream 7", 160 * at, float(at)) for at in range(100))


def test_deaths_of_two_streams_are_not_added_up() -> None:
    quarantine = Quarantine()
    assert not any(quarantine.died(f"stream {at % 2}", 0, float(at)) for at in range(4))


def test_a_quiet_minute_forgets() -> None:
    quarantine = Quarantine()
    assert not any(quarantine.died("stream 7", 160, at * QUIET_S) for at in range(10))


def test_three_hangs_are_three_deaths_however_long_each_is_waited_for() -> None:
    quarantine = Quarantine()
    hang_s = 5 * QUIET_S
    assert [quarantine.died("stream 7", 160, at * hang_s, hang_s=hang_s) for at in range(3)] == [False, False, True]


def test_a_named_client_stays_out_until_it_is_released() -> None:
    quarantine = Quarantine()
    quarantine.add("pump", "pump", 100.0, named=True)
    assert quarantine.refuses("pump", 1e12)
    assert quarantine.release("pump") == ["pump"]
    assert not quarantine.refuses("pump", 101.0)
    assert quarantine.release("pump") == []


def test_an_address_stays_out_for_a_while() -> None:
    quarantine = Quarantine()
    quarantine.add("192.0.2.1", "192.0.2.1-5-x", 100.0, named=False)
    assert quarantine.refuses("192.0.2.1", 99.0 + QUARANTINE_S)
    assert not quarantine.refuses("192.0.2.1", 101.0 + QUARANTINE_S)
    assert quarantine.entries(101.0 + QUARANTINE_S) == []
    assert not quarantine.refuses("192.0.2.2", 100.0)


@pytest.mark.parametrize("target", ["all", "192.0.2.1-5-x", "192.0.2.1"])
def test_a_release_goes_by_client_or_stream(target: str) -> None:
    quarantine = Quarantine()
    quarantine.add("192.0.2.1", "192.0.2.1-5-x", 100.0, named=False)
    assert quarantine.release(target) == ["192.0.2.1"]


def test_the_list_has_a_bound() -> None:
    quarantine = Quarantine()
    for number in range(ENTRIES_MAX + 5):
        quarantine.add(f"client-{number}", "x", 0.0, named=True)
    assert len(quarantine.entries(0.0)) == ENTRIES_MAX
    assert not quarantine.refuses("client-4", 0.0)


def test_another_supervisor_goes_on_with_the_list() -> None:
    quarantine, other = Quarantine(), Quarantine()
    quarantine.add("pump", "pump", 100.0, named=True)
    other.take_up([*quarantine.facts(), {"nonsense": 1}])
    assert other.entries(100.0) == quarantine.entries(100.0)
