"""What is looked at: this machine, one configuration, and the daemon when it runs.

``survey`` finds it all out once, so that every check judges the same state. Checks reach the machine only through the
roots in here (/proc, /sys, cgroups), so that a test can break one thing at a time. Nothing is written.
"""

from __future__ import annotations

import dataclasses
import os
import pwd
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mpserverd.arena.live import LiveState, open_state
from mpserverd.config.build import build
from mpserverd.config.load import load
from mpserverd.config.options import default
from mpserverd.config.schema import Config
from mpserverd.control.client import request
from mpserverd.errors import ConfigError, MpserverdError, UnreachableError
from mpserverd.ops import procfs

UNIT = "mpserverd.service"
SYSTEMD_DIRECTORY = "/run/systemd/system"
"""There when systemd runs this machine: sd_booted(3)."""
DEFAULT_CONFIG = "/etc/mpserverd/mpserverd.toml"
DEFAULT_SOCKET: str = default("server.control_socket")
INTERVAL_S = 1.0
"""How long counters of the network are watched."""
_SYSTEMCTL_DEADLINE_S = 3.0
_UNIT_PROPERTIES = ("LoadState", "ActiveState", "SubState", "Result", "User", "LimitNOFILE", "MemoryMax", "NRestarts")


@dataclasses.dataclass
class Site:
    """``config`` is what the file says, None with ``config_faults``; ``running`` is what the daemon has in force.

    ``live`` is None when no daemon answers, and ``unreachable`` says why. ``unit`` holds systemd's properties of the
    service, empty where there is none.
    """

    config_path: Path = Path(DEFAULT_CONFIG)
    config: Config | None = None
    config_faults: Sequence[str] = ()
    socket_path: str = DEFAULT_SOCKET
    live: LiveState | None = None
    running: Config | None = None
    unreachable: str = ""
    unit: dict[str, str] = dataclasses.field(default_factory=dict)
    probe: bool = False
    interval_s: float = INTERVAL_S
    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    cgroups: Path = Path("/sys/fs/cgroup")
    sleep: Callable[[float], None] = time.sleep

    @property
    def settings(self) -> Config:
        """Those in force, else those of the file, else the defaults."""
        return self.running or self.config or Config()

    @property
    def pids(self) -> dict[str, int]:
        """The daemon's processes by name; those that are not there are left out."""
        if self.live is None:
            return {}
        facts = self.live.facts
        found = {"supervisor": facts.get("pid") or 0}
        found |= {f"worker-{worker['index']}": worker.get("pid") or 0 for worker in facts.get("workers", [])}
        found["storer"] = (facts.get("storer") or {}).get("pid") or 0
        return {name: pid for name, pid in found.items() if pid}

    @property
    def service_owner(self) -> tuple[str, int, list[int]]:
        """Name, user and groups that the daemon has, or will have: of its process, its unit, its file; else ours."""
        supervisor = self.pids.get("supervisor")
        running = procfs.owner(self.proc, supervisor) if supervisor else None
        if running is not None:
            return _user_name(running[0]), *running
        for name in (self.unit.get("User", ""), self.settings.server.user):
            if name and (found := _account(name)) is not None:
                return found
        return _user_name(os.geteuid()), os.geteuid(), [os.getegid(), *os.getgroups()]


def survey(config_path: str | None, socket_path: str | None, *, probe: bool = False) -> Site:
    """Look at this machine. ``None``: where a running daemon, or the file, says; else the usual places."""
    site = Site(probe=probe, unit=unit_properties())
    if config_path is not None:
        site.config_path = Path(config_path)
    _read_config(site, ())
    if socket_path is not None:
        site.socket_path = socket_path
    elif site.config is not None:
        site.socket_path = site.config.server.control_socket
    _ask_daemon(site)
    if site.live is not None and config_path is None:
        path, overrides = _started_with(site.proc, site.pids.get("supervisor", 0))
        if path is not None:
            site.config_path = path
            _read_config(site, overrides)
    return site


def _read_config(site: Site, overrides: Sequence[str]) -> None:
    try:
        site.config, site.config_faults = load(site.config_path, overrides), ()
    except ConfigError as error:
        site.config, site.config_faults = None, error.faults


def _ask_daemon(site: Site) -> None:
    try:
        site.live = open_state(site.socket_path)
        site.running = config_in_force(site.socket_path)
    except UnreachableError as error:
        site.unreachable = str(error)
    except MpserverdError as error:  # another version, or no daemon of ours
        site.unreachable = f"{site.socket_path}: {error}"


def config_in_force(socket_path: str) -> Config | None:
    """The running daemon's settings; None when they are of another version."""
    config, faults = build(request(socket_path, "config"))
    return None if faults else config


def _started_with(proc: Path, pid: int) -> tuple[Path | None, list[str]]:
    """The file and the overrides on the daemon's command line."""
    words = procfs.arguments(proc, pid) if pid else []
    path, overrides = None, []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        value = value if equals else following
        if name == "--config":
            path = Path(value)
        elif name == "--set":
            overrides.append(value)
    if path is not None and not path.is_absolute():
        try:
            path = Path(os.readlink(proc / str(pid) / "cwd")) / path
        except OSError:  # another user's process
            return None, []
    return path, overrides


def unit_properties(unit: str = UNIT) -> dict[str, str]:
    """What systemd knows about the service; empty where it does not run, or does not know it."""
    if not os.path.isdir(SYSTEMD_DIRECTORY):
        return {}
    command = ["systemctl", "show", unit, "--property", ",".join(_UNIT_PROPERTIES)]
    try:
        answer = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_SYSTEMCTL_DEADLINE_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    found = dict(line.partition("=")[::2] for line in answer.stdout.splitlines())
    return found if found.get("LoadState") == "loaded" else {}


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _account(name: str) -> tuple[str, int, list[int]] | None:
    try:
        found = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
    except KeyError:
        return None
    return found.pw_name, found.pw_uid, os.getgrouplist(found.pw_name, found.pw_gid)
