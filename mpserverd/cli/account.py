"""Becoming another user, for ``mpserverd --daemon`` with [server] user or group.

Everything is looked up and judged before the first fork, so that the operator sees what is wrong.
"""

from __future__ import annotations

import dataclasses
import grp
import os
import pwd
from collections.abc import Iterable
from pathlib import Path

from mpserverd.config.schema import Config, LogTarget, ServerConfig
from mpserverd.errors import StartError

_PORT_START_FILE = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
_PORT_START = 1024
_PUBLIC_DIRECTORY_MODE, _DIRECTORY_MODE = 0o755, 0o750


@dataclasses.dataclass(frozen=True, slots=True)
class Account:
    """``name`` is "" for a user id without an entry, which then has no further groups."""

    uid: int
    gid: int
    name: str

    @property
    def is_current(self) -> bool:
        return self.uid == os.geteuid() and self.gid == os.getegid()


def wanted(server: ServerConfig) -> Account:
    """The account to run as; the present one where nothing is configured. Raises StartError."""
    account = Account(os.geteuid(), os.getegid(), "")
    if server.user:
        entry = _user(server.user)
        account = Account(entry.pw_uid, entry.pw_gid, entry.pw_name)
    if server.group:
        account = dataclasses.replace(account, gid=_group_id(server.group))
    if not account.is_current and os.geteuid() != 0:
        raise StartError(
            f"only root can become user {server.user or account.uid} and group {server.group or account.gid}; "
            "start as root, or leave out [server] user and group"
        )
    return account


def _user(name: str) -> pwd.struct_passwd:
    try:
        return pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
    except (KeyError, OverflowError):
        raise StartError(f"no such user: {name}; see [server] user") from None


def _group_id(name: str) -> int:
    try:
        return (grp.getgrgid(int(name)) if name.isdecimal() else grp.getgrnam(name)).gr_gid
    except (KeyError, OverflowError):
        raise StartError(f"no such group: {name}; see [server] group") from None


def refuse_privileged_ports(config: Config, account: Account) -> None:
    """Ports are bound after the change of user, so those for root alone cannot be had. Raises StartError."""
    if account.is_current or account.uid == 0:
        return
    start = _unprivileged_port_start()
    for listener in config.listeners:
        if 0 < listener.port < start:
            raise StartError(
                f"listener {listener.name}: port {listener.port} is for root alone (below {start}), and the daemon "
                f"becomes user {account.name or account.uid} first; choose a port from {start}, or run it under systemd"
            )


def _unprivileged_port_start() -> int:
    try:
        return int(_PORT_START_FILE.read_text())
    except (OSError, ValueError):
        return _PORT_START


def make_directories(config: Config, account: Account, pidfile: Path | None) -> None:
    """Make the missing directories of the daemon, owned by ``account``; existing ones stay as they are.

    Afterwards the daemon may lack the right to. Raises StartError.
    """
    public = [Path(config.server.control_socket).parent] + ([pidfile.parent] if pidfile else [])
    private = [Path(config.spool.path)] if any(listener.store for listener in config.listeners) else []
    private += [Path(config.log.file).parent] if LogTarget.FILE in config.log.target else []
    _make(public, _PUBLIC_DIRECTORY_MODE, account)
    _make(private, _DIRECTORY_MODE, account)


def _make(directories: Iterable[Path], mode: int, account: Account) -> None:
    for directory in directories:
        if directory.exists():
            continue
        try:
            directory.mkdir(parents=True)
            directory.chmod(mode)
            os.chown(directory, account.uid, account.gid)
        except OSError as error:
            raise StartError(f"cannot make the directory {directory}: {error.strerror}") from error


def take_groups(account: Account) -> None:
    """Take over the account's further groups; as root, before the change of user. Raises OSError.

    python-daemon's own ``initgroups`` leaves the group id as it was, so it is not used.
    """
    if account.is_current:
        return
    if account.name:
        os.initgroups(account.name, account.gid)
    else:
        os.setgroups([])


def check_program_is_readable(account: Account, files: Iterable[str] = (os.__file__, __file__)) -> None:
    """After the change of user: modules are read when they are first needed, so they must be readable. StartError."""
    for file in files:
        if not os.access(file, os.R_OK):
            raise StartError(
                f"user {account.name or account.uid} cannot read {file}; install Python and mpserverd where it can"
            )
