"""What the daemon is compared with, in the same run on the same machine: socat that throws bytes away, and a plain
writer that fills files past the page cache and syncs them."""

from __future__ import annotations

import concurrent.futures
import mmap
import os
import pathlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable

WRITER_THREADS = 4
WRITE_BYTES = 1 << 20
FILE_BYTES = 64 << 20
FILES_KEPT = 16
BIND_DEADLINE_S = 5.0


def socat_cpu_s(send: Callable[[int], int]) -> tuple[float, int]:
    """CPU seconds that socat takes for what ``send(port)`` sends, and the bytes that ``send`` returned."""
    port = free_port()
    command = ["socat", "-u", "-b", "262144", f"TCP-LISTEN:{port},bind=127.0.0.1,reuseaddr", "OPEN:/dev/null"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    wait_until_listening(port)
    sent_bytes = send(port)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"socat exited {process.returncode}")
    return usage.ru_utime + usage.ru_stime, sent_bytes


def direct_writer_bytes_per_s(directory: pathlib.Path, duration_s: float) -> float:
    """Fresh preallocated files, ``WRITER_THREADS`` threads, O_DIRECT if there is such a thing, fdatasync for each."""
    home = pathlib.Path(tempfile.mkdtemp(prefix="writer-", dir=directory))
    source = mmap.mmap(-1, WRITE_BYTES)
    source.write(os.urandom(WRITE_BYTES))
    deadline = time.monotonic() + duration_s
    started = time.monotonic()
    try:
        with concurrent.futures.ThreadPoolExecutor(WRITER_THREADS) as threads:
            writers = [threads.submit(_write_files, home, number, source, deadline) for number in range(WRITER_THREADS)]
            written = sum(writer.result() for writer in writers)
        return written / (time.monotonic() - started)
    finally:
        shutil.rmtree(home)


def _write_files(home: pathlib.Path, writer: int, source: mmap.mmap, deadline: float) -> int:
    written = count = 0
    while time.monotonic() < deadline:
        path = home / f"{writer}-{count % FILES_KEPT}"
        path.unlink(missing_ok=True)
        fd = _open_direct(path)
        try:
            os.posix_fallocate(fd, 0, FILE_BYTES)
            for at in range(0, FILE_BYTES, WRITE_BYTES):
                os.pwrite(fd, source, at)
            os.fdatasync(fd)
        finally:
            os.close(fd)
        written += FILE_BYTES
        count += 1
    return written


def _open_direct(path: pathlib.Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        return os.open(path, flags | os.O_DIRECT, 0o600)
    except OSError:  # a file system without it
        path.unlink(missing_ok=True)
        return os.open(path, flags, 0o600)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def wait_until_listening(port: int) -> None:
    """Without connecting, because socat serves one connection only."""
    wanted = f"0100007F:{port:04X}"
    deadline = time.monotonic() + BIND_DEADLINE_S
    while time.monotonic() < deadline:
        for line in pathlib.Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1] == wanted and fields[3] == "0A":
                return
        time.sleep(0.01)
    raise RuntimeError(f"nothing listens on port {port} after {BIND_DEADLINE_S:g} s")
