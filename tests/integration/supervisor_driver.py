"""Runs the supervisor as a process of its own, with the real worker and a small storer or the real one, for tests."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mpserverd.arena.chunks import ChunkTable
from mpserverd.arena.state import Con, StateTable, Str, StreamState
from mpserverd.control.client import request, request_state
from mpserverd.errors import UnreachableError
from mpserverd.load.stand_in_socket import NotifySocket

START_S = 20.0
WAIT_S = 15.0

CONFIG = """
[server]
workers = {workers}
max_clients = {max_clients}
control_socket = "{home}/control.sock"
stop_timeout_s = {stop_timeout_s}
heartbeat_timeout_s = {heartbeat_timeout_s}
[buffers]
bytes = "{buffers}"
[[listener]]
name = "raw"
address = "127.0.0.1:{port}"
packet_size = 16
on_full = "block"
{listener}
[spool]
path = "{home}/spool"
min_free_bytes = 0
[log]
level = "debug"
{more}
"""


def wait_for(what: Callable[[], Any], timeout_s: float = WAIT_S) -> Any:
    """The first true value of ``what()``; an assertion when there is none in time."""
    deadline_s = time.monotonic() + timeout_s
    while not (value := what()):
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.01)
    return value


class RunningSupervisor:
    """``with RunningSupervisor(tmp_path, workers=2) as supervisor``: started, and stopped at the end in any case."""

    def __init__(
        self,
        directory: Path,
        *,
        fault: str = "",
        descriptors: int = 4096,
        real_storer: bool = False,
        **settings: Any,
    ) -> None:
        self.directory = directory
        self.spool = directory / "spool"
        self.spool.mkdir(exist_ok=True)
        self.config_path = directory / "mpserverd.toml"
        self.settings: dict[str, Any] = {
            "workers": 2,
            "max_clients": 10,
            "stop_timeout_s": 10.0,
            "heartbeat_timeout_s": 10.0,
            "buffers": "8 MiB",
            "listener": "",
            "more": "",
            "port": 0,
            "home": directory,
        }
        self.configure(**settings)
        self._log = open(directory / "log", "ab")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(self.config_path), str(descriptors), str(int(real_storer))],
            stderr=self._log,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "SMALL_STORER_FAULT": fault, "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def configure(self, **settings: Any) -> None:
        self.settings.update(settings)
        self.config_path.write_text(CONFIG.format(**self.settings))

    def __enter__(self) -> RunningSupervisor:
        try:
            wait_for(lambda: self.log_contains(" ready ") or self.process.poll() is not None, START_S)
            assert self.process.poll() is None, self.log()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._log.close()

    # -- what is so

    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")

    def log_contains(self, text: str) -> bool:
        return text in self.log()

    @property
    def port(self) -> int:
        match = re.search(r"raw=127\.0\.0\.1:(\d+)", self.log())
        assert match is not None
        return int(match[1])

    def ask(self, command: str, **arguments: Any) -> Any:
        return request(f"{self.directory}/control.sock", command, **arguments)

    def facts(self) -> dict[str, Any]:
        with self.tables() as (facts, _, _):
            return facts

    @contextlib.contextmanager
    def tables(self) -> Iterator[tuple[dict[str, Any], StateTable, ChunkTable]]:
        facts, state_fd, table_fd = request_state(f"{self.directory}/control.sock")
        try:
            yield facts, StateTable(state_fd, read_only=True), ChunkTable(table_fd, read_only=True)
        finally:
            os.close(state_fd)
            os.close(table_fd)

    def word(self, column: int) -> list[int]:
        """That column of every connection row that is taken."""
        with self.tables() as (_, state, _):
            taken = state.connections[state.connections[:, Con.STATE] != 0]
            return [int(value) for value in taken[:, column]]

    def taken(self) -> list[int]:
        """Bytes that were taken from the socket, of every stream that is open."""
        with self.tables() as (_, state, _):
            open_ones = state.streams[state.streams[:, Str.STATE] == StreamState.OPEN]
            return [int(value) for value in open_ones[:, Str.SOCKET]]

    def workers(self) -> list[dict[str, Any]]:
        return [worker for worker in self.facts()["workers"] if worker["state"] == "running"]

    def stored(self) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in self.spool.iterdir() if file.name != "hold"}

    # -- what to do

    def connect(self, port: int | None = None) -> socket.socket:
        return socket.create_connection(("127.0.0.1", port or self.port), timeout=WAIT_S)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stop(self, timeout_s: float = WAIT_S) -> int:
        self.signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def answers(self) -> bool:
        try:
            return bool(self.ask("ping"))
        except UnreachableError:
            return False


class Systemd:
    """Hears what a supervisor that is started inside the ``with`` block has to say, and keeps no descriptor."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._socket = NotifySocket(directory / "notify")
        monkeypatch.setenv("NOTIFY_SOCKET", self._socket.name)
        self._said: list[str] = []

    def __enter__(self) -> Systemd:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def said(self) -> list[str]:
        """Every message so far, the oldest first."""
        while (message := self._socket.receive()) is not None:
            self._said.append("\n".join(message.lines))
            for fd in message.fds:
                os.close(fd)
        return self._said

    def heard(self, text: str) -> bool:
        return any(text in each for each in self.said())


def packets(count: int, seed: int = 1) -> bytes:
    """``count`` packets of 16 bytes that occur only once."""
    return b"".join(seed.to_bytes(8, "little") + number.to_bytes(8, "little") for number in range(count))


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(__file__))
    import small_storer

    from mpserverd.config.load import load
    from mpserverd.errors import MpserverdError
    from mpserverd.storer.main import run as run_storer
    from mpserverd.supervisor.main import run
    from mpserverd.worker.main import run as run_worker

    path, descriptors, real_storer = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    try:
        sys.exit(
            run(
                load(path),
                reload_config=lambda: load(path),
                programs={"worker": run_worker, "storer": run_storer if real_storer else small_storer.run},
            )
        )
    except MpserverdError as error:
        print(f"mpserverd: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
