"""The arithmetic of a plan, by hand, and that its settings always load."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpserverd import limits
from mpserverd.config.load import loads
from mpserverd.errors import UsageError
from mpserverd.net.fdlimit import clients_that_fit
from mpserverd.ops import plan as module
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


@pytest.mark.parametrize(
    ("clients", "workers", "storer"), [(10, 0.016, 0.022), (100, 0.078, 0.080), (200, 0.102, 0.122)]
)
def test_cores_are_near_what_was_measured(clients: int, workers: float, storer: float) -> None:
    """Workers of few clients took more, in caches that were cold; it is little in any case."""
    found = plan(Demand(clients, 10_050, 16, 1))
    assert workers - 0.02 < found["worker_cores"] < 1.6 * workers
    assert 0.7 * storer < found["storer_cores"] < 1.3 * storer


def test_the_sources_of_the_constants_are_what_they_are_said_to_be() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "benchmarks.md").read_text()

    def measured(name: str) -> float:
        found = re.search(rf"^\| {re.escape(name)} \| ([0-9.]+) \|", text, flags=re.M)
        assert found is not None, name
        return float(found[1])

    whole, storer = measured("received, checked, stored, synced"), measured("of that, the storer")
    assert pytest.approx((whole - storer) / 16, rel=0.5) == module.WORKER_NS_PER_BYTE
    assert pytest.approx(storer / 16, rel=0.5) == module.STORER_NS_PER_BYTE
    assert pytest.approx(measured("memory a client, 250 connected") * 1024, rel=0.5) == module.CONNECTION_BYTES


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
