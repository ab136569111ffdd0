"""What the client does where there is no fcntl, no fallocate, or a disk with a cache of its own: Windows and macOS.

The branches for them run here, on stand-ins for what only those systems have. ``make lint`` checks their types.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import os
import pathlib
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable
from typing import Any

import pytest

from mpserverd.client import file_buffer
from mpserverd.client.errors import BufferFileError
from mpserverd.client.file_buffer import FileBuffer

ROOT = pathlib.Path(__file__).resolve().parents[3]
CLIENT = ROOT / "mpserverd" / "client"


def module_on(system: str, name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of the client as it is loaded there."""
    spec = importlib.util.spec_from_file_location(f"{name}_on_{system}", CLIENT / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", system)
        spec.loader.exec_module(module)
    return module


def msvcrt_with(calls: list[tuple[int, int]]) -> types.ModuleType:
    """Locks a byte, as far as one process can tell: by the file that it is in. Windows forgets them at close."""
    module = types.ModuleType("msvcrt")
    module.LK_NBLCK = 2  # type: ignore[attr-defined]

    def locking(descriptor: int, mode: int, count: int) -> None:
        calls.append((os.lseek(descriptor, 0, os.SEEK_CUR), count))
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(errno.EACCES, "Permission denied") from None

    module.locking = locking  # type: ignore[attr-defined]
    return module


def test_a_buffer_file_on_windows_is_locked_beyond_its_content(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []
    monkeypatch.setitem(sys.modules, "msvcrt", msvcrt_with(calls))
    monkeypatch.setattr(file_buffer, "try_lock", module_on("win32", "file_lock", monkeypatch).try_lock)
    monkeypatch.delattr(os, "posix_fallocate")
    buffer = FileBuffer(tmp_path / "buffer", "press-7", 16, 1600)
    with pytest.raises(BufferFileError, match="in use by another client"):
        FileBuffer(tmp_path / "buffer", "press-7", 16, 1600)
    buffer.append(memoryview(bytes(160)))
    buffer.close()
    again = FileBuffer(tmp_path / "buffer", "press-7", 16, 1600)
    assert again.held == 10
    again.close()
    assert calls == [(2**40, 1)] * 3
    assert (tmp_path / "buffer").stat().st_size < 2**40


def full_sync(number: int | None, calls: list[int]) -> Callable[[int, int], int]:
    def call(descriptor: int, command: int) -> int:
        calls.append(command)
        if number is not None:
            raise OSError(number, os.strerror(number))
        return 0

    return call


@pytest.mark.parametrize(
    ("answer", "fsyncs"), [(None, 0), (errno.ENOTSUP, 1), (errno.EINVAL, 1), (errno.ENOTTY, 1), (errno.EIO, None)]
)
def test_a_sync_on_macos_empties_the_devices_cache(
    monkeypatch: pytest.MonkeyPatch, answer: int | None, fsyncs: int | None
) -> None:
    """Where the file system does not know that command, an fsync; an error of the disk is one."""
    calls: list[int] = []
    synced: list[int] = []
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", full_sync(answer, calls))
    monkeypatch.setattr(os, "fsync", synced.append)
    flush_to_disk = module_on("darwin", "file_sync", monkeypatch).flush_to_disk
    if fsyncs is None:
        with pytest.raises(OSError, match="Input/output error"):
            flush_to_disk(7)
    else:
        flush_to_disk(7)
    assert calls == [51]
    assert synced == [7] * (fsyncs or 0)


PROGRAM = """
import asyncio, multiprocessing, os, selectors, socket, ssl, subprocess, sys, tempfile, threading, types
import importlib.metadata, logging, pathlib, random
msvcrt = types.ModuleType("msvcrt")
msvcrt.LK_NBLCK, msvcrt.locking = 2, lambda descriptor, mode, count: None
sys.modules["msvcrt"] = msvcrt
for name in ("fcntl", "termios", "resource", "grp", "pwd", "syslog", "pty", "tty", "numpy"):
    sys.modules[name] = None
for name in ("posix_fallocate", "fork", "pread", "pwrite", "memfd_create", "O_CLOEXEC", "getuid"):
    delattr(os, name)
os.O_BINARY = 0
sys.platform = "win32"
import mpserverd
file = os.path.join(sys.argv[1], "buffer")

async def live():
    client = mpserverd.AsyncStreamClient("127.0.0.1:1", "press-7", 16, buffer_file=file, buffer_bytes=1600)
    await client.send(bytes(32))
    return await client.close(0.0)

with mpserverd.StreamClient("127.0.0.1:1", "press-7", 16, buffer_file=file, buffer_bytes=1600) as client:
    client.send(bytes(16))
    client.close(0.0)
print(asyncio.run(live()))
"""


def test_both_clients_with_a_file_need_nothing_that_windows_has_not(tmp_path: pathlib.Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), tmp_path],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.stdout == "3\n", done.stderr
