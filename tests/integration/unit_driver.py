"""The daemon under the stand-in for systemd, for tests of what outlives the supervisor."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import signal
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from mpserverd.arena.live import open_state
from mpserverd.arena.report import ledger
from mpserverd.arena.state import Con, StateTable
from mpserverd.control.client import request, request_state
from mpserverd.load.stand_in import StandIn, UnitSettings
from tests.integration.oracle import stored_streams

DAEMON = [sys.executable, "-c", "import sys; from mpserverd.cli.daemon import main; sys.exit(main())"]
SEED = int(os.environ.get("MPSERVERD_TEST_SEED", "4"))
CONFIG = """
[server]
workers = {workers}
max_clients = {max_clients}
control_socket = "{home}/control.sock"
{server}
[buffers]
bytes = "{buffers}"
[[listener]]
name = "raw"
address = "127.0.0.1:{port}"
packet_size = 16
on_full = "block"
handshake_timeout_s = 0
{listener}
[spool]
path = "{home}/spool"
min_free_bytes = 0
segment_bytes = "16 MiB"
{more}
"""


class Unit:
    """The daemon under the stand-in."""

    def __init__(
        self, home: pathlib.Path, *, crashes_count: bool = False, prefix: Sequence[str] = (), **settings: Any
    ) -> None:
        self.home, self.spool = home, home / "spool"
        self.settings: dict[str, Any] = {
            "workers": 2,
            "max_clients": 20,
            "buffers": "16 MiB",
            "port": 0,
            "listener": "",
            "server": "",
            "more": "",
            **settings,
        }
        self.configure()
        self._log = (home / "log").open("ab")
        settings_of_unit = UnitSettings(restart_delay_s=0.02, restart_signal=signal.SIGTERM, seed=SEED)
        environ = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "MPSERVERD_UNIT": settings_of_unit.name}
        if not crashes_count:
            environ["MPSERVERD_CRASHES_MAX"] = "0"
        self.system = StandIn(
            [*prefix, *DAEMON, "--config", str(home / "mpserverd.toml")],
            directory=home,
            settings=settings_of_unit,
            environ=environ,
            output=self._log.fileno(),
        )

    def configure(self, **settings: Any) -> None:
        self.settings.update(settings)
        (self.home / "mpserverd.toml").write_text(CONFIG.format(home=self.home, **self.settings))

    def __enter__(self) -> Unit:
        self.system.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self.system.state.ready:  # every test that moves packets is one of the ledger too
                assert ledger(open_state(f"{self.home}/control.sock"), every_stream=False)["holds"]
        finally:
            left = self.system.close()
            self._log.close()
        if kind is not None:
            sys.stderr.write(self.log()[-6000:])
        else:
            assert "Traceback" not in self.log()
            assert not left

    def log(self) -> str:
        return (self.home / "log").read_text(errors="replace")

    @property
    def port(self) -> int:
        match = re.findall(r"raw=127\.0\.0\.1:(\d+)", self.log())
        return int(match[-1])

    def ask(self, command: str, **arguments: Any) -> Any:
        return request(f"{self.home}/control.sock", command, **arguments)

    @contextlib.contextmanager
    def tables(self) -> Iterator[Any]:
        _, state_fd, table_fd = request_state(f"{self.home}/control.sock")
        try:
            yield StateTable(state_fd, read_only=True)
        finally:
            os.close(state_fd)
            os.close(table_fd)

    def active(self) -> int:
        with self.tables() as state:
            return int((state.connections[:, Con.STATE] != 0).sum())

    def durable(self) -> int:
        """Bytes on disk, by the catalog."""
        if not (self.spool / "catalog.sqlite").exists():
            return 0
        with contextlib.closing(sqlite3.connect(f"file:{self.spool}/catalog.sqlite?mode=ro", uri=True)) as catalog:
            return int(catalog.execute("SELECT coalesce(sum(durable), 0) FROM stream").fetchone()[0])

    def stored(self) -> list[str]:
        return sorted(stream.sha256 for stream in stored_streams(self.spool))

    def own_state(self) -> StateTable:
        """The daemon's own tables, to be written to."""
        for name in os.listdir(f"/proc/{self.system.state.pid}/fd"):
            path = f"/proc/{self.system.state.pid}/fd/{name}"
            if "mpserverd-state" in os.readlink(path):
                return StateTable(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        raise AssertionError("the daemon has no state table")

    def kill(self) -> None:
        """kill -9, and wait until it is ready again."""
        self.system.wait_ready(start=self.system.kill())

    def restart(self) -> None:
        """As systemd does it without ExecStop=: SIGTERM alone."""
        self.system.wait_ready(start=self.system.restart())

    def leave(self) -> None:
        start = self.system.state.starts + 1
        assert self.ask("leave")["left"]
        self.system.wait_ready(start=start)
