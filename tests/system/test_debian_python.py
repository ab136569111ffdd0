"""The unit tests pass with the Python and the modules that Debian 12 has, as they would on a builder of Debian."""

from __future__ import annotations

import pathlib
import subprocess

from tests.system.machine import ROOT


def test_unit_tests_pass_with_the_versions_of_debian(debs: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    assert debs  # built, so what the build needs is installed, pytest included
    tmp_path.chmod(0o755)
    done = subprocess.run(
        ["/usr/bin/python3", "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path}/pytest-unit",
         "tests/unit"],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:]
