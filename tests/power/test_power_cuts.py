"""The power fails under load, and everything acknowledged is there: once, in order, and clients go on.

The proof runs in processes of its own (power.py), in namespaces and on disks that go with it.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from tests.power.power import CANNOT

CUTS = int(os.environ.get("MPSERVERD_TEST_POWER_CUTS", "4"))
"""For each kind of disk; CI has few, the proof is 200 of them. The fourth cuts a disk that was cut before."""
SEEDS = {"fuse": 60, "ext4": 35, "xfs": 53, "split-ext4": 7, "split-xfs": 7}
"""Each has a raw client beside others, a stream that retention shortens, and a child that is killed."""
POWER = pathlib.Path(__file__).with_name("power.py")


@pytest.mark.parametrize("kind", SEEDS)
def test_nothing_acknowledged_is_lost_when_the_power_fails(kind: str) -> None:
    seed = os.environ.get("MPSERVERD_TEST_SEED", str(SEEDS[kind]))
    done = subprocess.run(
        [sys.executable, POWER, "--kind", kind, "--seed", seed, "--cuts", str(CUTS)],
        capture_output=True,
        text=True,
        timeout=60 + 30 * CUTS,
        check=False,
    )
    if done.returncode == CANNOT:
        pytest.skip(done.stderr.strip() or "needs root, /dev/fuse and loop devices")
    assert done.returncode == 0, f"kind {kind}, seed {seed}\n{done.stdout}{done.stderr}"
    assert f"{CUTS} cuts, nothing lost" in done.stdout
