"""What is installed for systemd and the kernel says why, and agrees with the program and the shipped settings."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess

import pytest

from mpserverd.cli import daemon
from mpserverd.config.load import load
from mpserverd.limits import CLIENTS_MAX
from mpserverd.supervisor.control_server import OPERATORS_GROUP

ROOT = pathlib.Path(__file__).resolve().parents[3]
PACKAGING = ROOT / "packaging"
UNIT = PACKAGING / "systemd" / "mpserverd.service"
NO_OUTBOUND = PACKAGING / "systemd" / "no-outbound"
SHIPPED = load(ROOT / "etc" / "mpserverd.toml")


def settings(path: pathlib.Path = UNIT) -> dict[str, str]:
    """The last value of each key."""
    return dict(re.findall(r"^(\w+)=(.*)$", path.read_text(), re.MULTILINE))


def seconds(text: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(ms|s|min)", text).groups()  # type: ignore[union-attr]
    return int(number) * {"ms": 0.001, "s": 1, "min": 60}[unit]


def test_unit_starts_the_program_with_its_default_file() -> None:
    assert settings()["ExecStart"] == f"/usr/bin/mpserverd --config {daemon.DEFAULT_CONFIG}"


def test_reload_checks_first_and_then_signals() -> None:
    lines = re.findall(r"^ExecReload=(.*)$", UNIT.read_text(), re.MULTILINE)
    assert [line.split()[-1] for line in lines] == ["--check-config", "$MAINPID"]


def test_open_files_are_enough_for_as_many_clients_as_can_be_configured() -> None:
    unit = int(settings()["LimitNOFILE"])
    assert unit >= 3 * CLIENTS_MAX + 1024
    limits = (PACKAGING / "limits" / "60-mpserverd.conf").read_text()
    assert {int(number) for number in re.findall(r"nofile\s+(\d+)", limits)} == {unit}


def test_systemd_waits_longer_for_a_stop_than_the_daemon() -> None:
    assert seconds(settings()["TimeoutStopSec"]) > SHIPPED.server.stop_timeout_s


def test_directories_of_the_unit_are_those_of_the_shipped_settings() -> None:
    unit = settings()
    assert f"/var/lib/{unit['StateDirectory']}" == SHIPPED.spool.path
    assert str(pathlib.Path(SHIPPED.log.file).parent) == f"/var/log/{unit['LogsDirectory']}"
    assert str(pathlib.Path(SHIPPED.server.control_socket).parent) == f"/run/{unit['RuntimeDirectory']}"
    tmpfiles = (PACKAGING / "tmpfiles" / "mpserverd.conf").read_text()
    assert re.findall(r"^d (\S+) (\d+) (\S+) (\S+)", tmpfiles, re.MULTILINE) == [
        (SHIPPED.spool.path, unit["StateDirectoryMode"], unit["User"], unit["Group"]),
        (str(pathlib.Path(SHIPPED.log.file).parent), unit["LogsDirectoryMode"], unit["User"], unit["Group"]),
    ]


def test_users_are_those_of_the_unit_and_operators_are_those_of_the_control_socket() -> None:
    unit = settings()
    sysusers = (PACKAGING / "sysusers" / "mpserverd.conf").read_text()
    assert re.search(rf"^g {unit['Group']} ", sysusers, re.MULTILINE)
    assert re.search(rf"^u {unit['User']} -:{unit['Group']} ", sysusers, re.MULTILINE)
    assert unit["Group"] == OPERATORS_GROUP


def test_every_value_has_a_reason() -> None:
    """A comment stands above each group of lines, in the unit and in the kernel's settings."""
    for path in (UNIT, NO_OUTBOUND / "no-outbound.conf", PACKAGING / "sysctl" / "60-mpserverd.conf"):
        explained = False
        body = path.read_text().split("[Service]", 1)[-1].split("[Install]")[0]
        for line in body.splitlines():
            explained = bool(line) and (explained or line.startswith("#"))
            assert explained or not line or line.startswith("#"), f"{path.name}: {line}"


def test_example_without_outbound_listens_where_the_shipped_settings_do() -> None:
    for listener, name in zip(SHIPPED.listeners, ("mpserverd.socket", "mpserverd-mps.socket"), strict=True):
        socket_unit = settings(NO_OUTBOUND / name)
        assert (socket_unit["FileDescriptorName"], socket_unit["ListenStream"]) == (listener.name, listener.address)
        assert int(socket_unit["Backlog"]) == SHIPPED.server.backlog


def exposure(directory: pathlib.Path) -> float:
    """What systemd-analyze says of the unit in that directory, drop-ins beside it included."""
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", directory / "mpserverd.service"],
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found is not None, done.stderr
    return float(found[1])


needs_analyze = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")


@needs_analyze
def test_exposure_is_at_most_that_of_the_best_peer(tmp_path: pathlib.Path) -> None:
    shutil.copy(UNIT, tmp_path)
    assert exposure(tmp_path) <= 1.2


@needs_analyze
def test_exposure_without_outbound_connections_is_at_most_half_a_point(tmp_path: pathlib.Path) -> None:
    drop_in = (NO_OUTBOUND / "no-outbound.conf").read_text().partition("[Service]")[2]
    (tmp_path / "mpserverd.service").write_text(f"{UNIT.read_text()}\n[Service]\n{drop_in}")
    assert exposure(tmp_path) <= 0.5


@pytest.mark.skipif(shutil.which("apparmor_parser", path="/usr/sbin:/sbin") is None, reason="needs apparmor_parser")
def test_apparmor_takes_the_profile() -> None:
    parser = shutil.which("apparmor_parser", path="/usr/sbin:/sbin")
    command = [str(parser), "--skip-kernel-load", "--skip-cache", PACKAGING / "apparmor" / "mpserverd"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^profile mpserverd ", (PACKAGING / "apparmor" / "mpserverd").read_text(), re.MULTILINE)
    assert settings()["AppArmorProfile"] == "-mpserverd"


@pytest.mark.parametrize("script", ["contrib/sysv/mpserverd", "contrib/openrc/mpserverd", "debian/mpserverd.postrm"])
def test_shell_scripts_parse(script: str) -> None:
    done = subprocess.run(["sh", "-n", ROOT / script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
