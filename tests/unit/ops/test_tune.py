"""The table of settings: held to the packaged files, compared with what is, applied once."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpserverd.ops import tune
from tests.unit.ops.fake_machine import LIMITS, Machine

ROOT = Path(__file__).resolve().parents[3]
PACKAGED_SYSCTLS = ROOT / "packaging" / "sysctl" / tune.FILE_NAME
PACKAGED_LIMITS = ROOT / "packaging" / "limits" / tune.FILE_NAME


def test_the_packaged_kernel_settings_are_those_of_the_table() -> None:
    assert tune.parse_sysctls(PACKAGED_SYSCTLS.read_text()) == {row.key: row.wanted for row in tune.SYSCTLS}


def test_the_packaged_limits_are_those_of_the_table() -> None:
    assert tune.parse_limits(PACKAGED_LIMITS.read_text()) == dict.fromkeys(tune.LIMIT_WHO, tune.OPEN_FILES)


def test_what_the_package_installs_is_enough_at_boot(machine: Machine, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for packaged, directory in ((PACKAGED_SYSCTLS, "usr/lib/sysctl.d"), (PACKAGED_LIMITS, tune.LIMITS_DIRECTORY)):
        (root / directory).mkdir(parents=True)
        (root / directory / tune.FILE_NAME).write_text(packaged.read_text())
    found = tune.compare(machine.site, root)
    assert all(row.fine and row.persistent for row in found)
    assert tune.apply(machine.site, root) == []


@pytest.fixture
def low(machine: Machine) -> Machine:
    machine.write("proc/sys/net/core/rmem_max", "212992\n")
    return machine


def test_what_is_lower_is_written_now_and_for_the_next_boot_and_only_once(low: Machine, tmp_path: Path) -> None:
    root = tmp_path / "root"
    assert [row.fine for row in tune.compare(low.site, root)] == [False, True, True]
    steps = tune.apply(low.site, root)
    assert [step["done"] for step in steps] == [True, True]
    assert (low.root / "proc/sys/net/core/rmem_max").read_text() == "134217728\n"
    found = tune.compare(low.site, root)
    assert all(row.fine for row in found)
    assert [row.persistent for row in found[:2]] == [str(root / "etc/sysctl.d/60-mpserverd.conf")] * 2
    assert tune.apply(low.site, root) == []
    assert tune.report(found, steps)["fine"]


def test_what_is_larger_stays_so_also_at_the_next_boot(low: Machine, tmp_path: Path) -> None:
    low.write("proc/sys/net/core/wmem_max", "999999999\n")
    tune.apply(low.site, tmp_path / "root")
    written = tune.parse_sysctls((tmp_path / "root/etc/sysctl.d/60-mpserverd.conf").read_text())
    assert written == {"net.core.rmem_max": 134_217_728, "net.core.wmem_max": 999_999_999}
    assert (low.root / "proc/sys/net/core/wmem_max").read_text() == "999999999\n"


def test_what_cannot_be_written_is_said_and_the_rest_is_done(low: Machine, tmp_path: Path) -> None:
    path = low.root / "proc/sys/net/core/rmem_max"
    low.site.proc = low.root / "proc"
    path.unlink()
    path.mkdir()  # not a file any more: nobody can write it
    assert tune.compare(low.site, tmp_path)[0].actual is None
    (tmp_path / "file").write_text("")
    steps = tune.apply(low.site, tmp_path / "file")
    assert [step["done"] for step in steps] == [False]
    assert "Not a directory" in steps[0]["detail"]
    assert not tune.report([], steps)["fine"]


def test_too_few_open_files_of_a_unit_get_a_drop_in_and_without_unit_a_file_of_limits(
    machine: Machine, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    machine.site.unit = {"LimitNOFILE": "65535"}
    steps = tune.apply(machine.site, root)
    assert (root / tune.UNIT_DROP_IN).read_text().endswith("[Service]\nLimitNOFILE=65536\n")
    assert "daemon-reload" in steps[-1]["detail"]
    machine.site.unit = {}
    machine.write("proc/self/limits", LIMITS.format(1024, 4096))
    assert not tune.compare(machine.site, root)[-1].fine
    tune.apply(machine.site, root)
    limits = tune.parse_limits((root / tune.OWN_LIMITS_FILE).read_text())
    assert limits == dict.fromkeys(tune.LIMIT_WHO, 65_536)
    assert [step["what"] for step in tune.apply(machine.site, root)] == []


def test_a_setting_that_is_not_here_is_no_fault(machine: Machine, tmp_path: Path) -> None:
    (machine.root / "proc/sys/net/core/rmem_max").unlink()
    found = tune.compare(machine.site, tmp_path)[0]
    assert (found.actual, found.fine) == (None, True)
