"""README.Debian says what the shipped settings do, and the commands that it names exist."""

from __future__ import annotations

import pathlib
import re

from mpserverd.config.load import load
from mpserverd.limits import CLIENTS_MAX, GIB
from tests.unit.packaging.rendered import PARSERS, commands_of

ROOT = pathlib.Path(__file__).resolve().parents[3]
TEXT = (ROOT / "debian" / "mpserverd.README.Debian").read_text()
SHIPPED = load(ROOT / "etc" / "mpserverd.toml")


def test_numbers_are_those_of_the_shipped_settings() -> None:
    plain = " ".join(TEXT.split())
    assert f"port {SHIPPED.listeners[0].port} " in plain
    assert f"in {SHIPPED.spool.path}, at most {SHIPPED.spool.max_bytes // GIB} GiB;" in plain
    assert f"{SHIPPED.spool.min_free_bytes // GIB} GiB of the disk stay free" in plain
    files = int(
        (re.search(r"LimitNOFILE=(\d+)", (ROOT / "packaging/systemd/mpserverd.service").read_text()) or [0, 0])[1]
    )
    assert f"{files:,} open files, enough for {min((files - 1024) // 3, CLIENTS_MAX):,} clients" in plain


def test_commands_that_it_names_exist() -> None:
    named = re.findall(r"^ +(mpserverd|mpserverctl|mpload) (\w+)", TEXT, re.MULTILINE)
    assert named
    for program, command in named:
        assert command in commands_of(PARSERS[program])
    for option in re.findall(r"mpload.*?(--[a-z-]+)", TEXT):
        assert option in {
            name for action in commands_of(PARSERS["mpload"])["run"]._actions for name in action.option_strings
        }


def test_files_that_it_names_are_installed() -> None:
    lists = "".join(path.read_text() for path in (ROOT / "debian").glob("mpserverd.*"))
    for name in ("60-mpserverd.conf", "no-outbound", "openrc", "sysv", "apparmor/mpserverd"):
        assert name in lists
