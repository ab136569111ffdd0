"""What `make run` runs: it ends well by itself, and leaves nothing when it is interrupted."""

from __future__ import annotations

import contextlib
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator

import pytest

from tests.integration.driver import DEADLINE_S, SLOWNESS
from tests.integration.senders import ROOT

DEMO = [sys.executable, str(ROOT / "packaging" / "demo.py"), "--clients", "3", "--rate", "5000"]


def left_over(tmp_path: pathlib.Path, output: str) -> list[str]:
    """The spool that the demo named, what lies in its temporary directory, and processes that were told of it."""
    (spool,) = re.findall(r"spool (build/demo-\S+)", output)
    paths = [path for path in [ROOT / spool, *tmp_path.iterdir()] if path.exists()]
    return [*map(str, paths), *commands_with(str(tmp_path))]


def commands_with(text: str) -> list[str]:
    found = []
    for entry in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            found += [command] if text in command else []
    return found


def test_the_demo_ends_well_and_accounts_for_every_packet(tmp_path: pathlib.Path) -> None:
    answer = subprocess.run(
        [*DEMO, "--duration", "1"],
        env={"TMPDIR": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=3 * DEADLINE_S * SLOWNESS,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    for words in ("15,000 packets", "0 mismatches", "the ledger balances", "Everything is stopped"):
        assert words in answer.stdout, answer.stdout
    assert not left_over(tmp_path, answer.stdout)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_stops_everything_and_removes_its_files(
    tmp_path: pathlib.Path, signal_number: signal.Signals
) -> None:
    demo = subprocess.Popen(
        [*DEMO, "--duration", "60"],
        env={"TMPDIR": str(tmp_path), "PATH": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert demo.stdout is not None
    with demo.stdout as output:
        begun = "".join(iter_until(output, "1 s"))
        demo.send_signal(signal_number)
        rest = output.read()
    assert demo.wait(DEADLINE_S * SLOWNESS) == 130, rest
    assert "Traceback" not in rest
    assert not left_over(tmp_path, begun)


def iter_until(lines: Iterable[str], text: str) -> Iterator[str]:
    """Lines up to the first one with ``text``, and that one."""
    for line in lines:
        yield line
        if text in line:
            return
