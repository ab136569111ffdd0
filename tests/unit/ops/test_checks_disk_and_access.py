"""Disk and permissions on real file systems and real modes."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpserverd.ops import checks_access, checks_disk
from mpserverd.ops.findings import Level
from tests.unit.ops.fake_machine import Machine, levels, only

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


# -- disk


def test_a_disk_with_room_is_fine(machine: Machine) -> None:
    machine.configure("[spool]\nmax_bytes = '64 MiB'\nmin_free_bytes = 4096\n")
    assert only(checks_disk.space(machine.site)).level is Level.OK


def test_less_than_must_stay_free_is_a_fault(machine: Machine) -> None:
    machine.configure("[spool]\nmin_free_bytes = '512 TiB'\n")
    found = only(checks_disk.space(machine.site))
    assert found.level is Level.FAULT
    assert f"spool.min_free_bytes is {512 << 40:,}" in found.text
    assert "none goes for it" in found.text


def test_a_bound_that_the_disk_cannot_reach_is_a_warning_that_names_one_that_it_can(machine: Machine) -> None:
    machine.configure("[spool]\nmax_bytes = '512 TiB'\nmin_free_bytes = 4096\n")
    (machine.spool / "streams" / "a").mkdir(parents=True)
    (machine.spool / "streams" / "a" / "0.seg").write_bytes(b"x" * 8192)
    found = only(checks_disk.space(machine.site))
    assert found.level is Level.WARNING
    assert "(8,192 held" in found.text
    assert "lower max_bytes to" in found.command


def test_an_unbounded_spool_is_a_note(machine: Machine) -> None:
    machine.configure("[spool]\nmax_bytes = 0\nmin_free_bytes = 4096\n")
    assert only(checks_disk.space(machine.site)).level is Level.NOTE


@pytest.fixture
def memory_directory() -> Iterator[Path]:
    if not os.path.ismount("/dev/shm"):
        pytest.skip("no /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


def test_a_spool_in_memory_is_a_fault(machine: Machine, memory_directory: Path) -> None:
    machine.spool = memory_directory
    machine.configure("")
    found = only(checks_disk.file_system(machine.site))
    assert found.level is Level.FAULT
    assert "tmpfs" in found.text


def test_the_file_system_of_a_spool_that_is_not_there_yet_is_that_above_it(machine: Machine) -> None:
    machine.spool = machine.spool / "not" / "yet"
    machine.configure("")
    assert checks_disk.spool_directory(machine.site) == machine.root / "spool"
    only(checks_disk.file_system(machine.site))


def test_the_disk_is_measured_only_when_asked_and_nothing_is_left(machine: Machine) -> None:
    machine.configure("[spool]\nmin_free_bytes = 4096\n")
    assert "not measured" in only(checks_disk.speed(machine.site)).text
    machine.site.probe = True
    found = only(checks_disk.speed(machine.site))
    assert "bytes/s" in found.text
    assert not list(machine.spool.iterdir())


def test_a_disk_that_must_stay_free_is_not_measured(machine: Machine) -> None:
    machine.configure("[spool]\nmin_free_bytes = '512 TiB'\n")
    machine.site.probe = True
    assert only(checks_disk.speed(machine.site)).level is Level.NOTE


# -- permissions


@pytest.fixture
def open_machine(machine: Machine) -> Machine:
    """The service is nobody, who owns what it needs."""
    nobody = 65534
    for path in [machine.root, *machine.root.parents]:
        if path == Path("/tmp") or path == Path("/"):
            break
        path.chmod(path.stat().st_mode | 0o011)
    for path in (machine.spool, machine.root / "run"):
        os.chown(path, nobody, nobody)
        path.chmod(0o750)
    machine.config_path.chmod(0o644)
    machine.site.unit = {"User": "nobody"}
    return machine


@root_only
def test_a_service_that_may_all_it_needs_is_fine(open_machine: Machine) -> None:
    assert only(checks_access.permissions(open_machine.site)).level is Level.OK


@root_only
@pytest.mark.parametrize(
    ("path", "mode", "words"),
    [
        ("mpserverd.toml", 0o600, "cannot read"),
        ("spool", 0o550, "cannot write"),
        ("run", 0o550, "cannot make the control socket"),
        (".", 0o700, "does not let it through"),
    ],
)
def test_what_the_service_may_not_is_a_fault(open_machine: Machine, path: str, mode: int, words: str) -> None:
    (open_machine.root / path).chmod(mode)
    found = list(checks_access.permissions(open_machine.site))
    open_machine.root.chmod(0o755)
    assert Level.FAULT in levels(found)
    assert any(words in finding.text and finding.command for finding in found), found


@root_only
def test_a_catalog_of_another_user_is_a_fault(open_machine: Machine) -> None:
    (open_machine.spool / "catalog.sqlite").write_bytes(b"")
    (open_machine.spool / "catalog.sqlite").chmod(0o640)
    found = only(checks_access.permissions(open_machine.site))
    assert found.level is Level.FAULT
    assert "chown -R" in found.command


@root_only
def test_packets_that_everybody_may_read_are_a_warning(open_machine: Machine) -> None:
    open_machine.spool.chmod(0o755)
    assert levels(checks_access.permissions(open_machine.site)) == [Level.WARNING]


@root_only
def test_a_configuration_that_everybody_may_write_is_a_warning(open_machine: Machine) -> None:
    open_machine.config_path.chmod(0o666)
    assert levels(checks_access.permissions(open_machine.site)) == [Level.WARNING]


@root_only
def test_a_control_socket_for_everybody_is_a_warning(open_machine: Machine) -> None:
    path = open_machine.root / "run" / "control.sock"
    path.parent.chmod(0o755)
    directory = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{directory}/control.sock")  # a socket's path must be short
        os.close(directory)
        path.chmod(0o666)
        assert levels(checks_access.permissions(open_machine.site)) == [Level.WARNING]
    path.unlink()
    path.write_text("")
    assert levels(checks_access.permissions(open_machine.site)) == [Level.FAULT]


@root_only
def test_a_spool_that_the_service_cannot_make_is_a_fault_and_one_that_it_can_a_note(open_machine: Machine) -> None:
    open_machine.spool.rmdir()
    assert levels(checks_access.permissions(open_machine.site)) == [Level.FAULT]
    os.chown(open_machine.root, 65534, 65534)
    assert levels(checks_access.permissions(open_machine.site)) == [Level.NOTE]
