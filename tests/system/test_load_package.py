"""The load client's package alone: it opens no port, and has everything that mpload needs."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest

from tests.system.machine import Machine


@pytest.fixture(scope="module")
def machine(debs: dict[str, pathlib.Path], depends: list[str]) -> Iterator[Machine]:
    with Machine([debs["mpserverd-load"]], depends) as machine:
        machine.apt("install", f"/srv/{debs['mpserverd-load'].name}")
        yield machine


def test_installs_no_daemon_and_opens_no_port(machine: Machine) -> None:
    assert not machine.exists("/usr/bin/mpserverd")
    listening = [line for line in machine.out("cat", "/proc/net/tcp").splitlines() if line.split()[3] == "0A"]
    assert listening == []


def test_nobody_to_talk_to_is_exit_code_three(machine: Machine) -> None:
    done = machine.run("mpload", "--clients", "1", "--packets", "1", "--connect-timeout", "0.1", check=False)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr


def test_chaos_finds_all_that_it_needs(machine: Machine) -> None:
    done = machine.run("mpload", "chaos", "--duration", "3", "--seed", "1", deadline_s=120)
    assert "lost" in done.stdout


def test_purge_leaves_nothing(machine: Machine) -> None:
    machine.apt("purge", "mpserverd-load")
    found = machine.run("find", "/usr", "/etc", "/var/lib/systemd", "-name", "*mpload*", "-o", "-name", "*mpserverd*")
    assert found.stdout == ""
