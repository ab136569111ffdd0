"""The C client of contrib/, compiled once a run."""

from __future__ import annotations

import pathlib
import subprocess

import pytest

from tests.integration.senders import ROOT, Sender, needs


@pytest.fixture(scope="session")
def sender(tmp_path_factory: pytest.TempPathFactory) -> Sender:
    """Call it with options; see contrib/sender.c."""
    needs("gcc")
    program = tmp_path_factory.mktemp("contrib") / "sender"
    command = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(program), str(ROOT / "contrib" / "sender.c")]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    return Sender(pathlib.Path(program))
