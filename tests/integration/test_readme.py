"""What the README tells people to type works as it stands there, and what it points to exists."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import signal
import subprocess

from tests.bench.baselines import free_port
from tests.integration.driver import DEADLINE_S, SLOWNESS, session_pids
from tests.integration.senders import ROOT, needs

README = (ROOT / "README.md").read_text()


def test_the_first_packets_are_stored_as_the_readme_says(tmp_path: pathlib.Path) -> None:
    """Line by line in one shell, with other ports and another directory, and it stops at the first failure."""
    needs("nc", "bash", "make")
    (block,) = re.findall(r"run by a test -->\n```sh\n(.*?)```", README, re.DOTALL)
    raw_port, mps_port = str(free_port()), str(free_port())
    script = "set -eu\n" + block.replace("8888", raw_port).replace("8889", mps_port)
    process = subprocess.Popen(
        ["bash", "-c", script],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=6 * DEADLINE_S * SLOWNESS)
    finally:
        for pid in session_pids(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    logs = "".join(path.read_text() for path in tmp_path.glob("*/log"))
    assert process.returncode == 0, f"{output}\n{logs}"
    assert "1,600,000" in output or "1600000" in output, output


def test_every_file_that_a_document_points_to_exists() -> None:
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.relative_to(ROOT)} points to {target}"


def test_the_readme_is_short_enough_to_be_read() -> None:
    assert 120 <= len(README.splitlines()) <= 250
