"""Each check of the machine is broken once, and says so with both numbers and what to type."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mpserverd.ops import checks_host, procfs
from mpserverd.ops.findings import Level
from tests.unit.arena.live_tables import Tables
from tests.unit.ops.fake_machine import LIMITS, MEMINFO, Machine, levels, only

CLIENTS = "[server]\nmax_clients = {}\n[buffers]\nbytes = '1 GiB'\n"


# -- descriptors


@pytest.mark.parametrize(
    ("clients", "files", "needed", "level"),
    [
        (1000, 4_024, "4,024", Level.OK),
        (1000, 4_023, "4,024", Level.FAULT),
        (1000, 1_024, "4,024", Level.FAULT),
        (100, 1_023, "1,324", Level.WARNING),
    ],
)
def test_descriptors_are_held_against_three_a_client_and_1024(
    machine: Machine, clients: int, files: int, needed: str, level: Level
) -> None:
    machine.configure(CLIENTS.format(clients))
    machine.site.unit = {"LimitNOFILE": str(files)}
    found = only(checks_host.descriptors(machine.site))
    assert found.level is level
    assert f"{files:,} files, {clients:,} clients need {needed}" in found.text
    assert bool(found.command) is (level is not Level.OK)


def test_an_unlimited_unit_has_descriptors_enough(machine: Machine) -> None:
    machine.site.unit = {"LimitNOFILE": "infinity"}
    assert only(checks_host.descriptors(machine.site)).level is Level.OK


def test_without_daemon_and_unit_the_limit_of_this_session_counts(machine: Machine) -> None:
    machine.write("proc/self/limits", LIMITS.format(256, 300))
    found = only(checks_host.descriptors(machine.site))
    assert found.level is Level.FAULT
    assert "300 files, 10 clients need 1,054" in found.text


def test_the_limit_of_the_running_daemon_counts(machine: Machine, tables: Tables) -> None:
    machine.site.live = tables.live()
    machine.process(4711, limits=LIMITS.format(128, 128))
    found = only(checks_host.descriptors(machine.site))
    assert "the daemon (pid 4711) may open 128 files" in found.text


def test_limits_of_a_real_process_are_read() -> None:
    code = "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (321, 321)); print(open('/proc/self/limits').read())"
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert re.search(r"Max open files +321 +321", text)
    here = procfs.limits(Path("/proc"), os.getpid(), "Max open files")
    assert here is not None
    assert here[0] > 0


# -- memory


def test_buffers_that_fit_are_fine(machine: Machine) -> None:
    assert only(checks_host.memory(machine.site)).level is Level.OK


def test_buffers_that_do_not_fit_into_free_memory_are_a_fault(machine: Machine) -> None:
    machine.write("proc/meminfo", MEMINFO.replace("8000000", "1000"))
    found = only(checks_host.memory(machine.site))
    assert found.level is Level.FAULT
    assert "MemAvailable leaves 1024000" in found.text


def test_buffers_that_do_not_fit_into_the_cgroup_are_a_fault(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/system.slice\n")
    machine.write("cgroup/system.slice/memory.max", "50000000\n")
    machine.write("cgroup/system.slice/memory.current", "10000000\n")
    found = only(checks_host.memory(machine.site))
    assert found.level is Level.FAULT
    assert "leaves 40000000" in found.text


def test_a_unit_with_less_memory_than_the_buffers_is_a_fault(machine: Machine) -> None:
    machine.site.unit = {"MemoryMax": "1048576"}
    assert levels(checks_host.memory(machine.site)) == [Level.OK, Level.FAULT]


def test_a_machine_that_is_nearly_full_beside_the_daemon_is_a_warning(machine: Machine, tables: Tables) -> None:
    machine.site.live = tables.live()
    assert only(checks_host.memory(machine.site)).level is Level.OK
    machine.write("proc/meminfo", MEMINFO.replace("8000000", "700000"))
    assert only(checks_host.memory(machine.site)).level is Level.WARNING


def test_hidden_memory_is_said(machine: Machine) -> None:
    machine.write("proc/meminfo", "")
    assert only(checks_host.memory(machine.site)).level is Level.NOTE


# -- kernel settings


def test_wanted_kernel_settings_are_fine(machine: Machine) -> None:
    assert only(checks_host.kernel_settings(machine.site)).level is Level.OK


def test_a_kernel_setting_below_what_is_wanted_is_a_note(machine: Machine) -> None:
    machine.write("proc/sys/net/core/rmem_max", "212992\n")
    found = only(checks_host.kernel_settings(machine.site))
    assert found.level is Level.NOTE
    assert "212,992, 134,217,728 are wanted" in found.text
    assert "tune --apply" in found.command


def test_a_kernel_setting_that_cuts_a_socket_buffer_is_a_warning(machine: Machine) -> None:
    machine.write("proc/sys/net/core/rmem_max", "65536\n")
    found = only(checks_host.kernel_settings(machine.site))
    assert found.level is Level.WARNING
    assert "65,536, so receive_buffer_bytes = 131,072 is cut to it" in found.text


def test_a_backlog_that_the_kernel_cuts_is_a_warning(machine: Machine) -> None:
    machine.write("proc/sys/net/core/somaxconn", "128\n")
    assert Level.WARNING in levels(checks_host.kernel_settings(machine.site))


# -- clock


def test_a_synchronised_clock_is_fine(machine: Machine) -> None:
    assert only(checks_host.clock(machine.site, lambda: (0, 0x2001, 1500))).level is Level.OK


def test_a_clock_that_is_not_synchronised_is_a_note_and_a_warning_with_latencies(machine: Machine) -> None:
    found = only(checks_host.clock(machine.site, lambda: (5, 0x40, 16_000_000)))
    assert found.level is Level.NOTE
    assert "chrony" in found.command
    machine.configure("[layout.x]\nsize = 8\nfields = { at = '<u8' }\ntime = 'at'\n")
    assert only(checks_host.clock(machine.site, lambda: (5, 0x40, 16_000_000))).level is Level.WARNING


def test_the_clock_of_this_machine_can_be_asked() -> None:
    state, status, error_us = checks_host.read_clock()
    assert 0 <= state <= 5
    assert status >= 0
    assert error_us >= 0


# -- swap


def test_processes_in_swap_are_a_warning_each(machine: Machine, tables: Tables) -> None:
    machine.site.live = tables.live()
    for pid in (4711, 99, 100, 101):
        machine.process(pid, status="Name:\tx\nVmSwap:\t       0 kB\n")
    assert only(checks_host.swap(machine.site)).level is Level.OK
    machine.process(99, status="Name:\tx\nVmSwap:\t     512 kB\n")
    found = only(checks_host.swap(machine.site))
    assert found.level is Level.WARNING
    assert "storer (pid 99) has 524,288 bytes in swap" in found.text
