"""How a machine is surveyed: which file, which daemon, which unit, which user."""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from typing import Any

import pytest

from mpserverd.config.schema import Config
from mpserverd.config.show import as_dict
from mpserverd.control.messages import Reply
from mpserverd.ops import site as module
from mpserverd.ops.site import Site, survey
from tests.unit.arena.live_tables import Tables
from tests.unit.control.fake_server import replying, serving
from tests.unit.ops.fake_machine import Machine

SYSTEMCTL = """#!/bin/sh
[ "$1" = show ] || exit 1
printf '%s\\n' LoadState=loaded ActiveState=active SubState=running Result=success User=nobody LimitNOFILE=65536 \\
    MemoryMax=infinity NRestarts=3
"""


def test_a_survey_without_a_daemon_has_the_file_and_says_why_nobody_answers(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text(f'[server]\nworkers = 3\ncontrol_socket = "{tmp_path}/c.sock"\n')
    found = survey(str(config), None)
    assert found.settings.server.workers == 3
    assert found.live is None
    assert found.pids == {}
    assert f"{tmp_path}/c.sock: no such socket" in found.unreachable


def test_a_survey_keeps_every_fault_of_the_file(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text("[server]\nworkerz = 1\n[buffer]\n")
    found = survey(str(config), str(tmp_path / "none.sock"))
    assert found.config is None
    assert len(found.config_faults) == 2
    assert found.settings == Config()


def test_a_survey_of_a_daemon_has_its_settings_and_processes(tmp_path: Path, tables: Tables) -> None:
    path = tmp_path / "c.sock"
    (tmp_path / "c.toml").write_text("")

    def answer(sock: Any, request: Any) -> None:
        if request.command == "state":
            replying(Reply(True, tables.facts).encode(), tables.state.fd, tables.table.fd)(sock, request)
        else:
            sock.sendall(Reply(True, {**as_dict(Config()), "server": {"workers": 7}}).encode())

    with serving(path, answer):
        found = survey(str(tmp_path / "c.toml"), str(path))
    assert found.settings.server.workers == 7
    assert found.pids == {"supervisor": 4711, "worker-0": 100, "worker-1": 101, "storer": 99}


@pytest.mark.parametrize(
    "words", [["--config", "{}"], ["--config={}"], ["--set", "server.workers=9", "--config", "{}"]]
)
def test_the_file_of_a_running_daemon_is_read_from_its_command_line(tmp_path: Path, words: list[str]) -> None:
    arguments = ["/usr/bin/python3", "/usr/bin/mpserverd", *(word.format("/etc/other.toml") for word in words)]
    (tmp_path / "77").mkdir()
    (tmp_path / "77" / "cmdline").write_bytes("\0".join(arguments).encode() + b"\0")
    path, overrides = module._started_with(tmp_path, 77)
    assert path == Path("/etc/other.toml")
    assert overrides == (["server.workers=9"] if "--set" in words else [])


def test_a_relative_file_is_looked_for_where_the_daemon_stands(tmp_path: Path) -> None:
    (tmp_path / "77").mkdir()
    (tmp_path / "77" / "cmdline").write_bytes(b"mpserverd\0--config\0mine.toml\0")
    assert module._started_with(tmp_path, 77) == (None, [])
    (tmp_path / "77" / "cwd").symlink_to("/srv")
    assert module._started_with(tmp_path, 77)[0] == Path("/srv/mine.toml")


def test_what_systemd_knows_of_the_unit_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "systemctl"
    program.write_text(SYSTEMCTL)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(module, "SYSTEMD_DIRECTORY", str(tmp_path))
    found = module.unit_properties()
    assert (found["User"], found["LimitNOFILE"], found["NRestarts"]) == ("nobody", "65536", "3")
    program.write_text(SYSTEMCTL.replace("=loaded", "=not-found"))
    assert module.unit_properties() == {}
    program.write_text("#!/bin/sh\nexit 1\n")
    assert module.unit_properties() == {}


def test_the_service_has_the_user_of_its_process_its_unit_its_file_or_us(machine: Machine, tables: Tables) -> None:
    us = pwd.getpwuid(os.geteuid()).pw_name
    assert machine.site.service_owner[:2] == (us, os.geteuid())
    machine.configure("[server]\nuser = 'daemon'\n")
    assert machine.site.service_owner[0] == "daemon"
    machine.site.unit = {"User": "nobody"}
    assert machine.site.service_owner[0] == "nobody"
    machine.site.live = tables.live()
    machine.process(4711, status="Name:\tx\nUid:\t0\t12345\t0\t0\nGid:\t0\t7\t0\t0\nGroups:\t8 9 \n")
    assert machine.site.service_owner == ("12345", 12345, [7, 8, 9])


def test_a_user_that_is_not_there_is_passed_over() -> None:
    assert Site(unit={"User": "no-such-user"}).service_owner[1] == os.geteuid()
