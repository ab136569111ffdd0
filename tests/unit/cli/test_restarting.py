"""What systemd's list of jobs says about the unit."""

from __future__ import annotations

import pytest

from mpserverd.cli.restarting import is_restart

UNIT = "mpserverd.service"


@pytest.mark.parametrize(
    ("lines", "restarting"),
    [
        ("", False),
        ("No jobs running.", False),
        ("1234 mpserverd.service restart running\n", True),
        ("1234 mpserverd.service try-restart running\n", True),
        ("1234 mpserverd.service stop running\n", False),
        ("12 other.service restart running\n13 mpserverd.service stop running\n", False),
        ("12 poweroff.target start waiting\n13 mpserverd.service stop running\n", False),
        ("12 other-mpserverd.service restart running\n", False),
    ],
)
def test_only_a_restart_of_the_unit_itself_is_one(lines: str, restarting: bool) -> None:
    assert is_restart(lines, UNIT) is restarting
