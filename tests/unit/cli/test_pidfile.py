"""Whether a pidfile is held, by looking at real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpserverd.cli.pidfile import Stale, examine, lock_starts
from mpserverd.errors import StartError


@pytest.fixture
def pidfile(tmp_path: Path) -> Path:
    return tmp_path / "pid"


@pytest.fixture
def daemon_like(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose command line is that of an installed mpserverd."""
    script = tmp_path / "mpserverd"
    script.write_text("import sys; print(flush=True); sys.stdin.read()")
    with subprocess.Popen(
        [sys.executable, script, "--daemon"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.communicate()


def test_no_file_means_nobody(pidfile: Path) -> None:
    assert examine(pidfile) is None


def test_running_daemon_holds_its_file(pidfile: Path, daemon_like: subprocess.Popen[bytes]) -> None:
    pidfile.write_text(f"{daemon_like.pid}\n")
    assert examine(pidfile) == daemon_like.pid


def test_dead_process_holds_nothing(pidfile: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    pidfile.write_text(f"{process.pid}\n")
    assert examine(pidfile) == Stale(f"named process {process.pid}, which is gone")


def test_another_program_with_that_number_holds_nothing(pidfile: Path) -> None:
    pidfile.write_text("1\n")
    assert examine(pidfile) == Stale("named process 1, which is another program")


@pytest.mark.parametrize("content", ["", "\n", "abc", "-5", "0", "99999999999999", "\x00", "12 13"])
def test_file_without_a_number_holds_nothing(pidfile: Path, content: str) -> None:
    pidfile.write_text(content)
    assert examine(pidfile) == Stale("names no process")


def test_process_that_nobody_may_look_at_counts_as_running(pidfile: Path, tmp_path: Path) -> None:
    pidfile.write_text(f"{os.getpid()}\n")
    assert examine(pidfile, proc=tmp_path / "hidden") == os.getpid()


def test_directory_in_its_place_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"cannot read the pidfile .*: Is a directory"):
        examine(tmp_path)


def test_only_one_start_at_a_time(pidfile: Path) -> None:
    lock = lock_starts(pidfile)
    copy = os.dup(lock)
    os.close(lock)
    with pytest.raises(StartError, match=r"another start .* is under way"):
        lock_starts(pidfile)
    os.close(copy)
    os.close(lock_starts(pidfile))


def test_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"cannot open .*none for the pidfile: No such file"):
        lock_starts(tmp_path / "none" / "pid")
