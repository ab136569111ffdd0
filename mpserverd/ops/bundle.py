"""What a bug report needs, in one small file: settings, reports, /proc, the end of the log. No packet, no secret.

Each member is a row: a name and a function. What cannot be had (no daemon, no permission, too slow) is left out, and
MANIFEST.json says why. Members are bounded in size, everything together in time. Every text is scrubbed by masking.py
before it is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import io
import json
import os
import platform
import sqlite3
import subprocess
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli

from mpserverd.arena.clients import clients
from mpserverd.arena.live import LiveState
from mpserverd.arena.report import ledger, stats
from mpserverd.config.schema import LogTarget
from mpserverd.config.show import as_dict
from mpserverd.control.client import request
from mpserverd.control.host import sample_once
from mpserverd.errors import MpserverdError
from mpserverd.limits import CONFIG_FILE_BYTES_MAX
from mpserverd.ops import masking, procfs
from mpserverd.ops.doctor import diagnose
from mpserverd.ops.site import UNIT, Site
from mpserverd.streams.listing import list_streams
from mpserverd.streams.times import iso_utc
from mpserverd.version import VERSION

MEMBER_BYTES_MAX = 4 << 20
TOTAL_S_MAX = 60.0
JOURNAL_S_MAX = 10.0
LOG_LINES = 2000
CLIENTS_MAX = 200
STREAMS_NAMED_MAX = 1000
PROCESSES_MAX = 70
LIBRARIES = ("numpy", "tomli", "psutil", "rich", "python-daemon", "sdnotify", "systemd-python", "pyarrow")


class LeftOutError(Exception):
    """Why a member is not there."""


@dataclasses.dataclass(slots=True)
class Bundle:
    """What members are made from. ``secrets`` are never written."""

    site: Site
    names: bool
    secrets: set[str] = dataclasses.field(default_factory=set)

    @property
    def live(self) -> LiveState:
        if self.site.live is None:
            raise LeftOutError(f"no daemon answers: {self.site.unreachable}")
        return self.site.live


Content = str | dict[str, Any] | list[Any]


def collect(site: Site, output: Path, *, names: bool = False) -> dict[str, Any]:
    """Write the bundle. Returns its manifest: ``members`` with sizes, ``left_out`` with reasons. Raises OSError."""
    bundle = Bundle(site, names)
    bundle.secrets = known_secrets(site)
    until_s = time.monotonic() + TOTAL_S_MAX
    members: dict[str, bytes] = {}
    left_out: dict[str, str] = {}
    for name, make in _members(bundle):
        if time.monotonic() > until_s:
            left_out[name] = f"{TOTAL_S_MAX:g} s were over"
            continue
        try:
            members[name] = _bounded(_encoded(make(bundle), bundle.secrets))
        except LeftOutError as error:
            left_out[name] = masking.scrub(str(error), bundle.secrets)
        except (MpserverdError, OSError, ValueError, sqlite3.Error) as error:
            left_out[name] = masking.scrub(f"{type(error).__name__}: {error}", bundle.secrets)
    manifest = {
        "schema_version": 1,
        "output": str(output),
        "made": iso_utc(time.time_ns()),
        "version": VERSION,
        "members": {name: len(content) for name, content in members.items()},
        "left_out": left_out,
    }
    members["MANIFEST.json"] = _encoded(manifest, bundle.secrets)
    _write(output, members)
    return manifest


def _encoded(content: Content, secrets: set[str]) -> bytes:
    if isinstance(content, str):
        return masking.scrub(content, secrets).encode(errors="backslashreplace")
    return (json.dumps(masking.scrub_tree(content, secrets), indent=1) + "\n").encode()


def _bounded(content: bytes) -> bytes:
    """The end is worth more than the beginning."""
    if len(content) <= MEMBER_BYTES_MAX:
        return content
    return (
        f"... the first {len(content) - MEMBER_BYTES_MAX} bytes are left out\n".encode() + content[-MEMBER_BYTES_MAX:]
    )


def _write(output: Path, members: dict[str, bytes]) -> None:
    """Only the owner may read it; it appears when it is complete."""
    directory = f"mpserverd-support-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    fresh = output.with_name(f".{output.name}.part")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
            for name, content in members.items():
                entry = tarfile.TarInfo(f"{directory}/{name}")
                entry.size, entry.mtime, entry.mode = len(content), int(time.time()), 0o600
                archive.addfile(entry, io.BytesIO(content))
        os.replace(fresh, output)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


# -- settings and their secrets


def config_files(site: Site) -> list[Path]:
    """The main file and those of conf.d, as far as they can be listed."""
    found = [site.config_path]
    with contextlib.suppress(OSError):
        found += sorted(path for path in (site.config_path.parent / "conf.d").iterdir() if path.suffix == ".toml")
    return found


def known_secrets(site: Site) -> set[str]:
    """Values of settings that are not on the list, from files and from the daemon's command line."""
    found: set[str] = set()
    for path in config_files(site):
        with contextlib.suppress(OSError):
            found |= masking.secrets_of(_text(path))
    for pid in site.pids.values():
        found |= masking.secrets_of_arguments(procfs.arguments(site.proc, pid))
    return {secret for secret in found if secret}


def _text(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(CONFIG_FILE_BYTES_MAX).decode(errors="replace")


def _settings(bundle: Bundle) -> Content:
    found: dict[str, Any] = {}
    for path in config_files(bundle.site):
        try:
            found[str(path)] = masking.masked_settings(tomli.loads(_text(path)))
        except OSError as error:
            found[str(path)] = f"cannot be read: {error.strerror}"
        except (tomli.TOMLDecodeError, RecursionError) as error:
            found[str(path)] = f"not valid TOML, so not shown: {error}"
    return found


def _settings_in_force(bundle: Bundle) -> Content:
    if bundle.site.running is None:
        raise LeftOutError(f"no daemon answers: {bundle.site.unreachable}")
    return masking.masked_settings(as_dict(bundle.site.running))


# -- reports


def _events(bundle: Bundle) -> Content:
    _ = bundle.live
    found: list[Any] = request(bundle.site.socket_path, "events", since=0)
    return found


def _clients(bundle: Bundle) -> Content:
    found = clients(bundle.live)
    return {"count": len(found), "first": found[:CLIENTS_MAX]}


def _catalog(bundle: Bundle) -> Content:
    """Counts, and names only when they were asked for."""
    streams = list_streams(bundle.site.settings.spool.path, all_epochs=True)
    found: dict[str, Any] = {
        "streams": len(streams),
        "current": sum(stream.current for stream in streams),
        "connected": sum(stream.connected for stream in streams),
        "segments": sum(stream.segments for stream in streams),
        "held_bytes": sum(stream.held_bytes for stream in streams),
        "durable_bytes": sum(stream.durable_bytes for stream in streams),
        "holes": sum(stream.holes for stream in streams),
        "hole_bytes": sum(stream.hole_bytes for stream in streams),
        "packet_sizes": dict(Counter(str(stream.packet_size) for stream in streams)),
    }
    if bundle.names:
        found["first"] = [stream.as_json() for stream in streams[:STREAMS_NAMED_MAX]]
    return found


def _versions(_: Bundle) -> Content:
    libraries = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            libraries[name] = importlib.metadata.version(name)
    system = {}
    with contextlib.suppress(OSError):
        system = platform.freedesktop_os_release()
    return {
        "mpserverd": VERSION,
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "libraries": libraries,
        "kernel": f"{os.uname().release} {os.uname().machine}",
        "system": system.get("PRETTY_NAME", ""),
    }


# -- the machine


def _processes(bundle: Bundle) -> Content:
    """Limits, status and memory of every process of the daemon. What another user's process hides is null."""
    _ = bundle.live
    proc = bundle.site.proc
    return {
        name: {
            "pid": pid,
            "arguments": masking.masked_arguments(procfs.arguments(proc, pid)),
            **{file: procfs.read(proc / str(pid) / file) or None for file in ("limits", "status", "smaps_rollup")},
        }
        for name, pid in list(bundle.site.pids.items())[:PROCESSES_MAX]
    }


def _machine(bundle: Bundle) -> Content:
    proc = bundle.site.proc
    models = [
        line.partition(":")[2].strip() for line in procfs.read(proc / "cpuinfo").splitlines() if "model name" in line
    ]
    return {
        "cpus": len(models) or os.cpu_count(),
        "cpu_model": models[0] if models else "",
        "loadavg": procfs.read(proc / "loadavg").strip(),
        "meminfo": procfs.read(proc / "meminfo"),
        "pressure": {name: procfs.read(proc / "pressure" / name) for name in ("cpu", "io", "memory")},
        "own_limits": procfs.read(proc / "self/limits"),
        "unit": bundle.site.unit,
    }


def _log(bundle: Bundle) -> Content:
    """The unit's journal; else the log file's end."""
    text = _journal()
    if text:
        return text
    log = bundle.site.settings.log
    if LogTarget.FILE not in log.target:
        raise LeftOutError(f"the journal has nothing of {UNIT}, and [log] target has no file")
    with open(log.file, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - MEMBER_BYTES_MAX))
        lines = file.read(MEMBER_BYTES_MAX).decode(errors="replace").splitlines()
    return "\n".join(lines[-LOG_LINES:]) + "\n"


def _journal() -> str:
    command = ["journalctl", "--unit", UNIT, "--lines", str(LOG_LINES), "--no-pager", "--quiet"]
    try:
        answer = subprocess.run(
            [*command, "--output", "short-iso-precise"], capture_output=True, timeout=JOURNAL_S_MAX, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.decode(errors="replace")


Member = tuple[str, Callable[[Bundle], Content]]


def _members(bundle: Bundle) -> list[Member]:
    return [
        ("versions.json", _versions),
        ("config.json", _settings),
        ("config-in-force.json", _settings_in_force),
        ("stats.json", lambda _: stats(bundle.live, sample_once())),
        ("ledger.json", lambda _: ledger(bundle.live)),
        ("clients.json", _clients),
        ("events.json", _events),
        ("processes.json", _processes),
        ("machine.json", _machine),
        ("doctor.json", lambda _: diagnose(bundle.site)),
        ("catalog.json", _catalog),
        ("log.txt", _log),
    ]
