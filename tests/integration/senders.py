"""Clients that are not ours: socat, nc, and the C program in contrib/, all fed from files or pipes.

Every function returns what was sent, so that it can be compared with what was stored.
"""

from __future__ import annotations

import pathlib
import random
import shutil
import subprocess
from collections.abc import Sequence

import numpy as np
import pytest

from tests.integration.driver import DEADLINE_S, SLOWNESS

ROOT = pathlib.Path(__file__).resolve().parents[2]


def payload(seed: int, size_bytes: int) -> bytes:
    """Reproducible bytes that do not repeat: a piece stored twice, or elsewhere, changes the hash."""
    return random.Random(seed).randbytes(size_bytes)


def needs(*programs: str) -> None:
    """Skip the test, with the reason, where a program is missing."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}; `make test` as root installs them")


def files(directory: pathlib.Path, contents: Sequence[bytes]) -> list[pathlib.Path]:
    paths = [directory / f"input-{number}" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


def socat(path: pathlib.Path, port: int, block_bytes: int = 8192) -> subprocess.Popen[bytes]:
    """Send a file; ``block_bytes`` is the size of each write to the socket."""
    return _start(["socat", "-u", "-b", str(block_bytes), f"OPEN:{path}", f"TCP:127.0.0.1:{port}"])


def socat_from_pipe(port: int) -> subprocess.Popen[bytes]:
    """Send what is written to its ``stdin``."""
    command = ["socat", "-u", "-b", "65536", "STDIN", f"TCP:127.0.0.1:{port}"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)


def nc(path: pathlib.Path, port: int) -> subprocess.Popen[bytes]:
    """Send a file and close when it ends."""
    with path.open("rb") as content:
        return _start(["nc", "-N", "127.0.0.1", str(port)], stdin=content)


def finish(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """All must end well by themselves."""
    for process in processes:
        _, errors = process.communicate(timeout=3 * DEADLINE_S * SLOWNESS)
        assert process.returncode == 0, f"{process.args!r}: exit {process.returncode}\n{errors.decode()}"


class Sender:
    """The C program, which makes its own bytes; ``generated`` says which, independently."""

    def __init__(self, program: pathlib.Path) -> None:
        self.program = program

    def start(self, port: int, *options: str) -> subprocess.Popen[bytes]:
        return _start([str(self.program), *options, "127.0.0.1", str(port)])

    def run(self, port: int, *options: str) -> None:
        finish([self.start(port, *options)])


def generated(connection: int, size_bytes: int, seed: int = 1, torn_bytes: int = 0) -> bytes:
    """What connection number ``connection`` of the C program sends; the formula stands at the top of its source."""
    place = np.arange(1, size_bytes + 1, dtype=np.uint64) + np.uint64((seed * 65536 + connection) << 32)
    y = place * np.uint64(0x9E3779B97F4A7C15)
    x = (y ^ (y >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return (x >> np.uint64(56)).astype(np.uint8).tobytes() + b"\xee" * torn_bytes


def _start(command: Sequence[str], stdin: object = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdin=stdin, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # type: ignore[call-overload,no-any-return]
