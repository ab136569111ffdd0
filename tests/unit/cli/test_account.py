"""Whose rights the background daemon takes, and what is refused before anything is forked."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from mpserverd.cli import account as accounts
from mpserverd.cli.account import Account
from mpserverd.config.load import loads
from mpserverd.config.schema import Config, ServerConfig
from mpserverd.errors import StartError

NOBODY = Account(65534, 65534, "nobody")
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def test_nothing_configured_means_no_change() -> None:
    account = accounts.wanted(ServerConfig())
    assert account.is_current


@pytest.mark.parametrize(
    ("key", "value"), [("user", "no-such-user"), ("user", "4000000000"), ("group", "no-such-group")]
)
def test_unknown_names_are_refused(key: str, value: str) -> None:
    with pytest.raises(StartError, match=rf"no such {key}: {value}; see \[server\] {key}"):
        accounts.wanted(dataclasses.replace(ServerConfig(), **{key: value}))


@root_only
@pytest.mark.root
def test_user_brings_its_own_group_unless_one_is_named() -> None:
    assert accounts.wanted(ServerConfig(user="nobody")) == NOBODY
    assert accounts.wanted(ServerConfig(user="65534", group="daemon")).gid == 1


def test_only_root_becomes_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(StartError, match="only root can become user root"):
        accounts.wanted(ServerConfig(user="root"))


def config_on(port: int) -> Config:
    return loads("", [f"listener.0.address=127.0.0.1:{port}"])


def test_port_for_root_alone_is_refused_for_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "start").write_text("1024\n")
    monkeypatch.setattr(accounts, "_PORT_START_FILE", tmp_path / "start")
    with pytest.raises(StartError, match=r"listener raw: port 80 is for root alone .*choose a port from 1024"):
        accounts.refuse_privileged_ports(config_on(80), NOBODY)
    accounts.refuse_privileged_ports(config_on(1024), NOBODY)
    accounts.refuse_privileged_ports(config_on(0), NOBODY)


def test_machine_may_give_low_ports_to_everyone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "start").write_text("0\n")
    monkeypatch.setattr(accounts, "_PORT_START_FILE", tmp_path / "start")
    accounts.refuse_privileged_ports(config_on(80), NOBODY)


def test_port_limit_has_a_default_where_the_kernel_does_not_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(accounts, "_PORT_START_FILE", tmp_path / "none")
    with pytest.raises(StartError):
        accounts.refuse_privileged_ports(config_on(1023), NOBODY)


def daemon_paths(tmp_path: Path, target: str) -> Config:
    return loads(
        "",
        [
            f"server.control_socket={tmp_path}/run/control.sock",
            f"spool.path={tmp_path}/spool",
            f"log.file={tmp_path}/log/x.log",
            f'log.target=["{target}"]',
        ],
    )


@root_only
@pytest.mark.root
def test_missing_directories_are_made_for_the_user(tmp_path: Path) -> None:
    accounts.make_directories(daemon_paths(tmp_path, "file"), NOBODY, tmp_path / "pids" / "pid")
    modes = {path.name: (path.stat().st_mode & 0o777, path.stat().st_uid) for path in tmp_path.iterdir()}
    assert modes == {"run": (0o755, 65534), "pids": (0o755, 65534), "spool": (0o750, 65534), "log": (0o750, 65534)}


def test_directories_that_nobody_needs_are_not_made(tmp_path: Path) -> None:
    config = daemon_paths(tmp_path, "stderr")
    (listener,) = config.listeners
    config = dataclasses.replace(config, listeners=(dataclasses.replace(listener, store=False),))
    accounts.make_directories(config, accounts.wanted(ServerConfig()), None)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_existing_directories_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir(mode=0o700)
    accounts.make_directories(daemon_paths(tmp_path, "stderr"), accounts.wanted(ServerConfig()), None)
    assert (tmp_path / "spool").stat().st_mode & 0o777 == 0o700


def test_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    config = loads("", [f"server.control_socket={tmp_path}/run/sub/control.sock"])
    with pytest.raises(StartError, match=f"cannot make the directory {tmp_path}/run/sub: Not a directory"):
        accounts.make_directories(config, accounts.wanted(ServerConfig()), None)


def test_program_that_the_user_cannot_read_is_named(tmp_path: Path) -> None:
    accounts.check_program_is_readable(NOBODY)
    with pytest.raises(
        StartError, match=f"user nobody cannot read {tmp_path}/x.py; install Python and mpserverd where"
    ):
        accounts.check_program_is_readable(NOBODY, [f"{tmp_path}/x.py"])
