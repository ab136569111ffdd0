"""The arithmetic of a plan, by hand, and that its settings always load."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpserverd import limits
from mpserverd.config.load import loads
from mpserverd.errors import UsageError
from mpserverd.net.fdlimit import clients_that_fit
from mpserverd.ops.plan import Demand, plan

GIB = 1 << 30


def test_the_sums_of_a_thousand_ordinary_clients() -> None:
    found = plan(Demand(1000, 10_050, 16, 7))
    assert found["bytes_per_s"] == 160_800_000
    assert found["packets_per_s"] == 10_050_000
    assert found["bytes_per_day"] == 160_800_000 * 86_400
    assert found["stored_bytes"] == 7 * 160_800_000 * 86_400
    assert found["max_clients"] == 1100
    assert found["segment_bytes"] == 16 << 20
    assert found["stored_bytes"] + 2000 * (16 << 20) <= found["max_bytes"]
    assert found["max_bytes"] < found["stored_bytes"] + 2000 * (16 << 20) + GIB
    assert found["burst_s"] >= 2.0
    assert found["descriptors"] == 65_536
    assert found["batch_wait_s"] == pytest.approx(0.08)
    assert found["remarks"] == []


def test_what_one_machine_will_not_do_is_said() -> None:
    assert any("disk" in remark for remark in plan(Demand(10_000, 100_000, 16, 1))["remarks"])
    assert any("round of writing" in remark for remark in plan(Demand(10_000, 100, 16, 1))["remarks"])
    assert any("fewer days" in remark for remark in plan(Demand(10_000, 100_000, 1024, 1000))["remarks"])


@pytest.mark.parametrize(
    "demand",
    [
        Demand(0, 1, 16, 1),
        Demand(limits.CLIENTS_MAX + 1, 1, 16, 1),
        Demand(1, 0, 16, 1),
        Demand(1, float("nan"), 16, 1),
        Demand(1, float("inf"), 16, 1),
        Demand(1, 1, 0, 1),
        Demand(1, 1, 65_537, 1),
        Demand(1, 1, 16, -1),
        Demand(1, 1, 16, 1, 0),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_bounds(demand: Demand) -> None:
    with pytest.raises(UsageError, match="must be from"):
        plan(demand)


@given(
    clients=st.integers(1, 19_998),
    rate=st.floats(0.001, 1e7),
    size=st.integers(1, 65_536),
    days=st.floats(0.001, 36_600),
    batch=st.integers(1, 1_000_000),
)
def test_the_settings_of_every_plan_load_and_fit(clients: int, rate: float, size: int, days: float, batch: int) -> None:
    found = plan(Demand(clients, rate, size, days, batch))
    config = loads(found["toml"])
    assert config.server.max_clients == found["max_clients"] >= clients
    assert config.listeners[0].packet_size == size
    assert clients_that_fit(found["descriptors"]) >= found["max_clients"]
