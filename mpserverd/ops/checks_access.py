"""Checks of what the service's user may read and write, and who else may. The rows stand in doctor.py.

Judged from modes and owners, for the user that the service has; access lists and mandatory access control are not
seen.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from mpserverd.ops.findings import Finding, fault, note, ok, warning
from mpserverd.ops.site import Site

READ, WRITE, SEARCH = 4, 2, 1


def allowed(path: Path, uid: int, groups: Sequence[int], wanted: int) -> str:
    """Why that user may not; "" when it may. Every directory above must let it through."""
    for directory in reversed(path.absolute().parents):
        if not _may(directory, uid, groups, SEARCH):
            return f"{directory} does not let it through ({_mode_text(directory)})"
    if not _may(path, uid, groups, wanted):
        return f"{path} is {_mode_text(path)}"
    return ""


def _may(path: Path, uid: int, groups: Sequence[int], wanted: int) -> bool:
    there = path.stat()
    if uid == 0:
        return True
    shift = 6 if there.st_uid == uid else 3 if there.st_gid in groups else 0
    return there.st_mode >> shift & wanted == wanted


def _mode_text(path: Path) -> str:
    there = path.stat()
    return f"{stat.filemode(there.st_mode)}, owner {there.st_uid}:{there.st_gid}"


def permissions(site: Site) -> Iterator[Finding]:
    """Config readable, spool and directory of the control socket writable, packets not for everybody."""
    name, uid, groups = site.service_owner
    service = f"{name} (user {uid})"
    found = [
        *_config(site, service, uid, groups),
        *_spool(site, service, uid, groups),
        *_socket(site, service, uid, groups),
    ]
    yield from found or [
        ok(f"{service} may read the configuration, and write the spool and the control socket's place")
    ]


def _config(site: Site, service: str, uid: int, groups: Sequence[int]) -> Iterator[Finding]:
    path = site.config_path
    if not path.exists():
        return
    why = allowed(path, uid, groups, READ)
    if why:
        yield fault(f"{service} cannot read {path}: {why}", f"chmod 0644 {path}; namei -l {path}")
    if path.stat().st_mode & stat.S_IWOTH:
        yield warning(f"everybody may write {path} ({_mode_text(path)})", f"chmod o-w {path}")


def _spool(site: Site, service: str, uid: int, groups: Sequence[int]) -> Iterator[Finding]:
    path = Path(site.settings.spool.path)
    make = f"install -d -m 0750 -o {uid} -g {groups[0] if groups else uid} {path}"
    if not path.is_dir():
        parent = next(directory for directory in path.absolute().parents if directory.is_dir())
        if path.exists():
            yield fault(f"{path} is no directory", "change [spool] path")
        elif allowed(parent, uid, groups, WRITE | SEARCH):
            yield fault(f"{path} does not exist, and {service} cannot make it in {parent}", make)
        else:
            yield note(f"{path} does not exist yet; the daemon makes it at its start")
        return
    for inner in (path, path / "streams"):
        if inner.is_dir() and (why := allowed(inner, uid, groups, READ | WRITE | SEARCH)):
            yield fault(f"{service} cannot write {inner}: {why}", f"chown -R {uid} {path}; chmod u+rwX {path}")
            return
    catalog = path / "catalog.sqlite"
    if catalog.exists() and (why := allowed(catalog, uid, groups, READ | WRITE)):
        yield fault(f"{service} cannot write {catalog}: {why}", f"chown -R {uid} {path}")
    if path.stat().st_mode & (stat.S_IROTH | stat.S_IXOTH | stat.S_IWOTH):
        yield warning(f"{path} is {_mode_text(path)}: everybody on this machine may read packets", f"chmod o= {path}")


def _socket(site: Site, service: str, uid: int, groups: Sequence[int]) -> Iterator[Finding]:
    path = Path(site.settings.server.control_socket)
    parent = path.parent
    if not parent.is_dir():
        if site.unit:  # systemd makes it: RuntimeDirectory=
            return
        above = next(directory for directory in parent.absolute().parents if directory.is_dir())
        if allowed(above, uid, groups, WRITE | SEARCH):
            make = f"install -d -m 0750 -o {uid} {parent}"
            yield fault(f"{parent} does not exist, and {service} cannot make it for the control socket", make)
        return
    if why := allowed(parent, uid, groups, WRITE | SEARCH):
        yield fault(f"{service} cannot make the control socket in {parent}: {why}", f"chown {uid} {parent}")
    if not path.exists():
        return
    mode = path.stat().st_mode
    if not stat.S_ISSOCK(mode):
        yield fault(f"{path} is no socket", f"rm {path}; then start the daemon")
    elif mode & stat.S_IWOTH and _open_to_all(parent):
        yield warning(
            f"everybody may steer the daemon: {path} is {_mode_text(path)}",
            f"chmod o= {path}; systemctl restart mpserverd",
        )
    elif not os.access(path, os.W_OK):
        yield note(f"you may not use {path} ({_mode_text(path)})", "adduser $USER mpserverd; then log in again")


def _open_to_all(directory: Path) -> bool:
    return bool(directory.stat().st_mode & stat.S_IXOTH)
