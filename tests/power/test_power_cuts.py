"""The power fails under load, and everything acknowledged is there: once, in order, and clients go on.

The proof runs in processes of its own (power.py), in namespaces and on disks that go with it.
"""

from __future__ import annotations

import os
import pathlib
import random
import subprocess
import sys

import pytest

from tests.power.power import CANNOT

CUTS = int(os.environ.get("MPSERVERD_TEST_POWER_CUTS", "6"))
"""For each kind of file system; CI has few, the proof is 200 of them."""
SEED = int(os.environ.get("MPSERVERD_TEST_SEED", random.SystemRandom().randrange(10_000)))
POWER = pathlib.Path(__file__).with_name("power.py")


@pytest.mark.parametrize("kind", ["fuse", "ext4", "xfs"])
def test_nothing_acknowledged_is_lost_when_the_power_fails(kind: str) -> None:
    done = subprocess.run(
        [sys.executable, POWER, "--kind", kind, "--seed", str(SEED), "--cuts", str(CUTS)],
        capture_output=True,
        text=True,
        timeout=60 + 15 * CUTS,
        check=False,
    )
    if done.returncode == CANNOT:
        pytest.skip(done.stderr.strip() or "needs root, /dev/fuse and loop devices")
    assert done.returncode == 0, f"kind {kind}, seed {SEED}\n{done.stdout}{done.stderr}"
    assert f"{CUTS} cuts, nothing lost" in done.stdout
