"""Where CI is set nothing is skipped for want of a tool; elsewhere it is, and the line to type is named."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]
NO_TOOLS = {"PATH": "/nonexistent"}


@pytest.mark.parametrize("script", ["test_packages.sh", "system_packages.sh"])
@pytest.mark.parametrize(("more", "exit_code"), [({}, 0), ({"CI": "true"}, 1)], ids=["here", "ci"])
def test_missing_packages_that_cannot_be_installed_end_ci_only(
    script: str, more: dict[str, str], exit_code: int
) -> None:
    command = [str(shutil.which("bash")), str(ROOT / "packaging" / script)]
    done = subprocess.run(command, env={**NO_TOOLS, **more}, capture_output=True, text=True, check=False)
    assert "type: sudo apt-get install" in done.stderr
    assert done.returncode == exit_code


@pytest.mark.parametrize(("more", "exit_code"), [({}, 0), ({"CI": "true"}, 4)], ids=["here", "ci"])
def test_system_tests_that_cannot_run_end_ci_only(more: dict[str, str], exit_code: int) -> None:
    environment = {**NO_TOOLS, **more, "MPSERVERD_TEST_SYSTEM": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/system/test_load_package.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert "needs " in done.stdout + done.stderr
    assert done.returncode == exit_code
