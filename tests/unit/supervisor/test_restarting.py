"""What systemd's list of jobs says about the unit."""

from __future__ import annotations

import contextlib
import os
import pathlib
import time
from collections.abc import Iterator

import pytest

from mpserverd.supervisor.loop import Loop
from mpserverd.supervisor.restarting import ask, is_restart

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


# -- asked without blocking


def asked(loop: Loop, directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch, script: str) -> bool:
    """What ``ask`` answers when systemctl is ``script``."""
    program = directory / "systemctl"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    answers: list[bool] = []
    before = len(os.listdir("/proc/self/fd"))
    ask(loop, UNIT, answers.append)
    assert not answers, "it must come from the loop"
    deadline_s = time.monotonic() + 20
    while not answers:
        assert time.monotonic() < deadline_s
        loop.run_once()
    assert len(os.listdir("/proc/self/fd")) == before
    return answers[0]


@pytest.fixture
def loop() -> Iterator[Loop]:
    with contextlib.closing(Loop()) as made:
        yield made


@pytest.mark.parametrize(
    ("script", "restarting"),
    [
        (f'test "$1" = list-jobs && echo "7 {UNIT} restart running"', True),
        (
            f'for i in $(seq 20000); do echo "$i other.service start waiting"; done; echo "7 {UNIT} restart running"',
            True,
        ),
        (f'echo "7 {UNIT} stop running"', False),
        (f'echo "7 {UNIT} restart running"; exit 1', False),
        ("echo Failed to connect to bus >&2; exit 1", False),
    ],
)
def test_the_list_of_jobs_is_asked_for_in_a_process_of_its_own(
    loop: Loop, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, script: str, restarting: bool
) -> None:
    assert asked(loop, tmp_path, monkeypatch, script) is restarting


def test_who_does_not_answer_in_time_is_not_waited_for(
    loop: Loop, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpserverd.supervisor.restarting.ANSWER_S", 0.05)
    assert not asked(loop, tmp_path, monkeypatch, f'echo "7 {UNIT} restart running"; exec sleep 60')


def test_a_machine_without_systemctl_is_none_that_restarts(
    loop: Loop, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    answers: list[bool] = []
    ask(loop, UNIT, answers.append)
    assert not answers
    loop.run_once()
    assert answers == [False]
