"""The unit tests pass with the Python and the modules that Debian 12 has, as they would on a builder of Debian."""

from __future__ import annotations

import pathlib
import subprocess
import tempfile

from tests.system.machine import ROOT

ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}


def test_unit_tests_pass_with_the_versions_of_debian(debs: dict[str, pathlib.Path]) -> None:
    assert debs  # built, so what the build needs is installed, pytest included
    # paths of sockets must be short; "pytest-" is what tests open for other users
    with tempfile.TemporaryDirectory(prefix="pytest-") as directory:
        command = ["/usr/bin/python3", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
        done = subprocess.run(
            [*command, f"--basetemp={directory}/pytest-run", "tests/unit"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            env={**ENVIRONMENT, "HOME": directory},
        )
    assert done.returncode == 0, done.stdout[-8000:]
