"""Settings of the system that mpserverd wants, each with its reason, against what they are.

One table. packaging/sysctl/60-mpserverd.conf and packaging/limits/60-mpserverd.conf are held to it by a test. A value
stands here only when a measurement, or a sum, supports it; what is already larger is left alone. ``apply`` writes what
falls short, now and for the next boot, and may be repeated.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpserverd.limits import CLIENTS_MAX
from mpserverd.net.fdlimit import DESCRIPTORS_PER_CLIENT, RESERVED_DESCRIPTORS
from mpserverd.ops import procfs
from mpserverd.ops.site import Site

FILE_NAME = "60-mpserverd.conf"
SYSCTL_DIRECTORIES = ("etc/sysctl.d", "run/sysctl.d", "usr/local/lib/sysctl.d", "usr/lib/sysctl.d")
"""Where systemd-sysctl looks; a file in an earlier one replaces that of the same name in a later one."""
LIMITS_DIRECTORY = "etc/security/limits.d"
OWN_LIMITS_FILE = f"{LIMITS_DIRECTORY}/61-mpserverd.conf"
"""Read after the packaged one, which is left as it is: an upgrade would ask about it."""
UNIT_DROP_IN = f"etc/systemd/system/mpserverd.service.d/{FILE_NAME}"
LIMIT_ITEM = "nofile"
LIMIT_WHO = ("_mpserverd", "@mpserverd")
OPEN_FILES = 65536
"""What the unit asks for too: enough for CLIENTS_MAX."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sysctl:
    """``wanted`` is the least that is fine."""

    key: str
    wanted: int
    unit: str
    reason: str

    def path(self, proc: Path) -> Path:
        return proc / "sys" / self.key.replace(".", "/")


_BUFFER_REASON = (
    "the kernel's own 208 KiB hold 1.3 s of a client at 160,800 bytes/s, and 2 ms of one at 100 MB/s; memory is taken "
    "only when packets wait"
)

SYSCTLS = (
    Sysctl("net.core.rmem_max", 134_217_728, "bytes", f"{_BUFFER_REASON}; receive_buffer_bytes is cut to it"),
    Sysctl("net.core.wmem_max", 134_217_728, "bytes", "the same for those who send: load clients"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Compared:
    """``actual`` None: it does not exist here, or is hidden. ``persistent``: the file that sets it at boot, or ""."""

    name: str
    wanted: int
    actual: int | None
    unit: str
    reason: str
    persistent: str

    @property
    def fine(self) -> bool:
        return self.actual is None or self.actual >= self.wanted


def compare(site: Site, root: Path = Path("/")) -> list[Compared]:
    """Every row of the table beside what is in force."""
    file, values = persistent_sysctls(root)
    found = [
        Compared(
            row.key,
            row.wanted,
            number(procfs.read(row.path(site.proc))),
            row.unit,
            row.reason,
            str(file) if file is not None and values.get(row.key, -1) >= row.wanted else "",
        )
        for row in SYSCTLS
    ]
    return [*found, _open_files(site, root)]


def _open_files(site: Site, root: Path) -> Compared:
    reason = f"{DESCRIPTORS_PER_CLIENT} a client and {RESERVED_DESCRIPTORS} more, for {CLIENTS_MAX} clients and more"
    actual: int | None
    found = procfs.limits(site.proc, site.pids.get("supervisor", 0), "Max open files")
    if found is not None:
        name, actual = "open files of the daemon", found[1]  # the hard one: the daemon raises the other
    elif site.unit:
        name, actual = "LimitNOFILE of the unit", number(site.unit.get("LimitNOFILE", ""))
    else:
        name, actual = "open files of this session", (procfs.limits(site.proc, "self", "Max open files") or (0, 0))[1]
    return Compared(name, OPEN_FILES, actual, "files", reason, _persistent_limit(root, OPEN_FILES))


def _persistent_limit(root: Path, wanted: int) -> str:
    """The file of limits.d that gives the service's user so many."""
    for name in (OWN_LIMITS_FILE, f"{LIMITS_DIRECTORY}/{FILE_NAME}"):
        if parse_limits(procfs.read(root / name)).get(LIMIT_WHO[0], 0) >= wanted:
            return str(root / name)
    return ""


def parse_limits(text: str) -> dict[str, int]:
    """Open files by user or @group, of a file of limits.d."""
    rows = [line.split() for line in text.splitlines() if not line.lstrip().startswith("#")]
    return {row[0]: int(row[3]) for row in rows if len(row) == 4 and row[2] == LIMIT_ITEM and row[3].isdecimal()}


def persistent_sysctls(root: Path) -> tuple[Path | None, dict[str, int]]:
    """The file of ours that counts at boot, and what it sets."""
    for directory in SYSCTL_DIRECTORIES:
        file = root / directory / FILE_NAME
        if file.exists():
            return file, parse_sysctls(procfs.read(file))
    return None, {}


def parse_sysctls(text: str) -> dict[str, int]:
    """``key = value`` lines, numbers only."""
    found = {}
    for line in text.splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.lstrip().startswith(("#", ";")) and value.strip().isdecimal():
            found[key.strip().removeprefix("-").replace("/", ".")] = int(value)
    return found


def number(text: str) -> int | None:
    word = text.strip()
    if word == "infinity":
        return procfs.UNLIMITED
    return int(word) if word.isdecimal() else None


# -- apply


def apply(site: Site, root: Path = Path("/")) -> list[dict[str, Any]]:
    """Write what falls short. An entry for each thing that was tried: ``what``, ``done``, ``detail``."""
    found = []
    compared = compare(site, root)
    for row, there in zip(SYSCTLS, compared, strict=False):
        if not there.fine:
            found.append(_try(f"{row.key} = {row.wanted}", functools.partial(_write_sysctl, site, row), "in force"))
    if any(there.persistent == "" for there in compared[: len(SYSCTLS)]):
        found.append(_persist(root / SYSCTL_DIRECTORIES[0] / FILE_NAME, _sysctl_text(compared[: len(SYSCTLS)])))
    files = compared[-1]
    if not files.fine and site.unit:
        found.append(_persist(root / UNIT_DROP_IN, _unit_text(files.wanted), _AFTER_DROP_IN))
    elif not files.fine and not files.persistent:
        found.append(_persist(root / OWN_LIMITS_FILE, _limits_text(files.wanted)))
    return found


_AFTER_DROP_IN = "written; now type: systemctl daemon-reload && systemctl restart mpserverd"


def _write_sysctl(site: Site, row: Sysctl) -> None:
    with open(row.path(site.proc), "w", encoding="ascii") as file:
        file.write(f"{row.wanted}\n")


def _persist(file: Path, text: str, done: str = "written; counts from the next start on") -> dict[str, Any]:
    def write() -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_name(f".{file.name}.new")
        with open(fresh, "w", encoding="ascii") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())
        os.chmod(fresh, 0o644)
        os.replace(fresh, file)

    return _try(str(file), write, done)


def _try(what: str, act: Callable[[], None], done: str) -> dict[str, Any]:
    try:
        act()
    except (OSError, ValueError) as error:
        why = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        hint = "; be root" if os.geteuid() != 0 else ""
        return {"what": what, "done": False, "detail": f"{why}{hint}"}
    return {"what": what, "done": True, "detail": done}


def _sysctl_text(compared: list[Compared]) -> str:
    """Never lower than what is in force: somebody wanted that."""
    lines = ["# Written by mpserverctl tune --apply. It replaces /usr/lib/sysctl.d/60-mpserverd.conf."]
    for row in compared:
        lines += [f"# {row.reason}", f"{row.name} = {max(row.wanted, row.actual or 0)}"]
    return "\n".join(lines) + "\n"


def _limits_text(wanted: int) -> str:
    return "".join(f"{who}  -  {LIMIT_ITEM}  {wanted}\n" for who in LIMIT_WHO)


def _unit_text(wanted: int) -> str:
    return f"# Written by mpserverctl tune --apply.\n[Service]\nLimitNOFILE={wanted}\n"


def report(compared: list[Compared], applied: list[dict[str, Any]]) -> dict[str, Any]:
    """``fine``: everything that is here is large enough, and everything that was tried was done."""
    return {
        "schema_version": 1,
        "fine": all(row.fine for row in compared) and all(step["done"] for step in applied),
        "settings": [{**dataclasses.asdict(row), "fine": row.fine} for row in compared],
        "applied": applied,
    }
