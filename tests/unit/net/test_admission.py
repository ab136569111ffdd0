"""Who may stay."""

from __future__ import annotations

import dataclasses

import pytest

from mpserverd.arena.state import RefuseReason
from mpserverd.net.admission import Limits, Standing, refuse_reason
from mpserverd.net.fdlimit import clients_that_fit

FINE = Standing(permitted=True, stopping=False, active_count=5, listener_count=3, address_count=1, free_row_count=10)
LIMITS = Limits(max_clients=6, max_connections=4, max_connections_per_address=2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, RefuseReason.NONE),
        ({"stopping": True}, RefuseReason.STOPPING),
        ({"permitted": False}, RefuseReason.DENIED),
        ({"active_count": 6}, RefuseReason.MAX_CLIENTS),
        ({"listener_count": 4}, RefuseReason.LISTENER_LIMIT),
        ({"address_count": 2}, RefuseReason.ADDRESS_LIMIT),
        ({"free_row_count": 0}, RefuseReason.NO_ROWS),
        ({"permitted": False, "active_count": 6}, RefuseReason.DENIED),
    ],
)
def test_the_first_rule_that_forbids_it_is_the_reason(change: dict[str, int], reason: RefuseReason) -> None:
    assert refuse_reason(LIMITS, dataclasses.replace(FINE, **change)) is reason


def test_zero_means_no_limit_of_its_own() -> None:
    many = dataclasses.replace(FINE, listener_count=1000, address_count=1000)
    assert refuse_reason(Limits(max_clients=6), many) is RefuseReason.NONE


@pytest.mark.parametrize("clients", [1, 10, 1000, 10_000])
def test_the_documented_sum_of_descriptors_is_enough(clients: int) -> None:
    assert clients_that_fit(3 * clients + 1024) >= clients
