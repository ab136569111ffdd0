"""A real daemon for one test: the installed programs, a directory of its own, ports that the kernel chooses.

Rules: nothing here looks inside the daemon; what it says comes from its log, from mpserverctl and from /proc. Waiting
is always for a condition, with a deadline. Leaving the ``with`` block stops the daemon and then insists that it exited
0, printed no traceback and left no process and no socket.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

BIN = pathlib.Path(sys.executable).parent
SLOWNESS = float(os.environ.get("MPSERVERD_TEST_SLOWNESS", "1"))
"""Every deadline is multiplied by this; raise it on a machine that is slow or loaded."""
DEADLINE_S = 20.0
POLL_S = 0.02
STEADY_LOOKS = 20

Settings = Mapping[str, Any]


class Daemon:
    """``settings`` is a configuration as nested dicts; what it leaves out comes from ``default_settings``.

    ``prefix`` is put before the command line, for programs such as prlimit and setpriv. The daemon runs in a session of
    its own, so that all of its processes can be found, whoever their parent is by then.
    """

    def __init__(
        self, directory: pathlib.Path, settings: Settings | None = None, *, prefix: Sequence[str] = ()
    ) -> None:
        self.directory = directory
        self.runtime = pathlib.Path(tempfile.mkdtemp(prefix="mpsd-"))  # a socket's path must be short
        self.runtime.chmod(0o777)
        self.socket_path = self.runtime / "control.sock"
        self.log_path = directory / "daemon.log"
        self.config_path = directory / "mpserverd.toml"
        self.settings = merged(default_settings(directory, self.socket_path), settings or {})
        self.prefix = list(prefix)
        self.process: subprocess.Popen[bytes] | None = None
        self.expected_exit = 0
        self.ledger_expected = True
        """Before it is stopped the accounts are looked at: every test that moves packets is one of the ledger too."""
        self.tracebacks_expected = False

    # -- life

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self.process is not None and self.process.poll() is None:
                if kind is None:
                    if self.ledger_expected:
                        self.ledger()
                    self.stop()
                else:
                    self._end_by_force()
            if kind is None:
                self.assert_nothing_left()
        finally:
            if kind is not None:
                sys.stderr.write(f"--- {self.log_path}\n{self.log()[-8000:]}\n")
            self.discard()

    def discard(self) -> None:
        """End whatever still runs and remove what lies outside the test's directory."""
        self._end_by_force()
        shutil.rmtree(self.runtime, ignore_errors=True)

    @property
    def spool(self) -> pathlib.Path:
        return pathlib.Path(self.settings["spool"]["path"])

    def launch(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Write the configuration and start the program, without waiting for anything."""
        self.write_config()
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, BIN / "mpserverd", "--config", self.config_path, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self.process

    def start(self, *arguments: str) -> Self:
        """Launch and wait until the daemon answers and all of its children run."""
        try:
            process = self.launch(*arguments)
            self.wait_for(lambda: process.poll() is not None or self.is_ready(), what="the daemon to be ready")
            assert process.poll() is None, f"mpserverd exited {process.returncode} at its start:\n{self.log()}"
        except BaseException:
            self.discard()
            raise
        return self

    def is_ready(self) -> bool:
        answer = self.ctl("--json", "stats", check=False)
        if answer.returncode != 0:
            return False
        stats = json.loads(answer.stdout)
        pids = [int(worker["pid"]) for worker in stats["worker_list"]]
        return len(pids) == int(stats["workers"]) and min(pids) > 0

    def stop(self, deadline_s: float = DEADLINE_S) -> int:
        """SIGTERM, and the exit code."""
        assert self.process is not None
        self.process.terminate()
        try:
            code = self.process.wait(deadline_s * SLOWNESS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not stopped {deadline_s:g} s after SIGTERM:\n{self.log()[-4000:]}") from None
        assert code == self.expected_exit, f"exit code {code} after SIGTERM:\n{self.log()[-4000:]}"
        return code

    def run_to_its_end(self, *arguments: str, deadline_s: float = DEADLINE_S) -> int:
        """For starts that must fail: the exit code. The daemon must end by itself."""
        process = self.launch(*arguments)
        try:
            return process.wait(deadline_s * SLOWNESS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {deadline_s:g} s:\n{self.log()}") from None

    def _end_by_force(self) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def reload(self) -> None:
        """Write the (changed) settings and have the daemon take them over, after a reload that is under way."""
        self.write_config()

        def reloaded() -> bool:
            answer = self.ctl("reload", check=False)
            assert answer.returncode == 0 or "under way" in answer.stderr, answer.stderr
            return answer.returncode == 0

        self.wait_for(reloaded, what="a reload")

    def write_config(self) -> None:
        self.config_path.write_text(to_toml(self.settings))

    # -- what an operator can ask

    def ctl(
        self, *arguments: str, check: bool = True, deadline_s: float = DEADLINE_S
    ) -> subprocess.CompletedProcess[str]:
        """Run mpserverctl against this daemon."""
        answer = subprocess.run(
            [BIN / "mpserverctl", "--socket", self.socket_path, *arguments],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S * SLOWNESS,
            check=False,
        )
        if check and answer.returncode != 0:
            raise AssertionError(
                f"mpserverctl {' '.join(arguments)}: {answer.returncode}\n{answer.stdout}{answer.stderr}"
            )
        return answer

    def ctl_json(self, *arguments: str, check: bool = True) -> Any:
        return json.loads(self.ctl("--json", *arguments, check=check).stdout)

    def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = self.ctl_json("stats")
        return stats

    def port(self, listener: str = "raw") -> int:
        """The real port of a listener that was configured with port 0."""
        for entry in self.stats()["listeners"]:
            if entry["name"] == listener:
                return int(entry["port"])
        raise KeyError(listener)

    def clients(self) -> list[dict[str, Any]]:
        clients: list[dict[str, Any]] = self.ctl_json("clients")
        return clients

    def streams(self) -> list[dict[str, Any]]:
        streams: list[dict[str, Any]] = self.ctl_json("streams")
        return streams

    def ledger(self) -> dict[str, int]:
        """The totals; fails the test when the equations do not hold."""
        answer = self.ctl("--json", "ledger", check=False)
        assert answer.returncode == 0, f"the ledger does not balance:\n{answer.stdout}{answer.stderr}"
        totals: dict[str, int] = json.loads(answer.stdout)["totals"]
        return totals

    def account(self, name: str) -> int:
        """One account of the ledger's totals, whether or not the ledger balances just now."""
        return int(self.ctl_json("ledger", check=False)["totals"][name])

    def counter(self, name: str) -> int:
        """An error by its reason, such as ``refused-denied``, or closed connections by theirs, such as ``idle``."""
        stats = self.stats()
        return int({**stats["closed_by_reason"], **stats["errors_by_reason"]}[name])

    # -- waiting

    def wait_for(self, condition: Callable[[], Any], deadline_s: float = DEADLINE_S, what: str = "a condition") -> Any:
        """The first true value of ``condition``; fails with the log's end after the deadline."""
        deadline = time.monotonic() + deadline_s * SLOWNESS
        while True:
            value = condition()
            if value:
                return value
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {deadline_s:g} s for {what}:\n{self.log()[-4000:]}")
            time.sleep(POLL_S)

    def wait_for_total(self, account: str, value: int, deadline_s: float = DEADLINE_S) -> dict[str, int]:
        """Wait until an account of the ledger's total is exactly ``value``; more than that fails at once."""
        last = -1

        def reached() -> bool:
            nonlocal last
            last = self.account(account)
            assert last <= value, f"{account} is {last}, more than the {value} that were sent"
            return last == value

        try:
            self.wait_for(reached, deadline_s)
        except AssertionError as error:
            raise AssertionError(f"{account} is {last}, not {value}; {error}") from None
        return self.ledger()

    def wait_until_steady(self, value: Callable[[], int], at_least: int) -> int:
        """The value once it is ``at_least`` so much and has not changed for 20 looks."""
        last, looks = -1, 0

        def is_steady() -> bool:
            nonlocal last, looks
            now = value()
            last, looks = now, looks + 1 if now == last else 0
            return looks >= STEADY_LOOKS and now >= at_least

        self.wait_for(is_steady, what=f"a steady value of at least {at_least}")
        return last

    def wait_until_connected(self, connections: int) -> None:
        """Exactly so many connections are open; 0 is allowed."""
        self.wait_for(lambda: self.stats()["active_connections"] == connections, what=f"{connections} connections")

    def wait_until_served(self, connections: int) -> None:
        """So many came since the start, all are gone, and all of their bytes are in files."""
        self.wait_for(lambda: self.stats()["total_connections"] == connections, what=f"connection {connections}")
        self.wait_until_quiet()

    def wait_until_quiet(self) -> None:
        """All connections are over, and all of their bytes are accounted for in files."""
        self.wait_until_connected(0)
        self.wait_for(lambda: not any(s["connected"] for s in self.streams()), what="all streams to be put away")

    # -- processes

    def pids(self) -> list[int]:
        """Every process of the daemon's session, itself included, zombies left out."""
        return [] if self.process is None else session_pids(self.process.pid)

    def worker_pids(self) -> list[int]:
        return [worker["pid"] for worker in self.stats()["worker_list"]]

    def pid_of(self, name: str) -> int:
        """``supervisor``, ``storer`` or ``worker-N``."""
        stats = self.stats()
        pids = {"supervisor": stats["pid"], "storer": stats["storer"]["pid"]}
        pids |= {f"worker-{worker['index']}": worker["pid"] for worker in stats["worker_list"]}
        return int(pids[name])

    def kill(self, name: str, signal_number: int = signal.SIGKILL) -> int:
        """Send a signal to one process, and return its pid."""
        pid = self.pid_of(name)
        os.kill(pid, signal_number)
        return pid

    # -- what it wrote

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def log_contains(self, text: str) -> bool:
        return text in self.log()

    def log_lines(self, text: str) -> list[str]:
        return [line for line in self.log().splitlines() if text in line]

    # -- the end

    def assert_nothing_left(self) -> None:
        """No process, no socket, no listener; the log has no traceback."""
        assert not self.pids(), f"processes left: {self.pids()}"
        assert self.tracebacks_expected or not self.log_contains("Traceback"), self.log()
        assert not self.socket_path.exists(), "the control socket is left"
        left = [path.name for path in self.runtime.iterdir()]
        assert not left, f"files left: {left}"


def session_pids(session: int) -> list[int]:
    """Processes of a session that are not zombies, from /proc."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            state, _, _, own_session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(own_session) == session and state != "Z":
                found.append(int(entry.name))
    return found


def default_settings(directory: pathlib.Path, socket_path: pathlib.Path) -> dict[str, Any]:
    """Small and quick: two workers, 8 MiB of buffers, loopback, any port."""
    return {
        "server": {"workers": 2, "max_clients": 32, "control_socket": str(socket_path), "stop_timeout_s": 10.0},
        "buffers": {"bytes": "8 MiB"},
        "listener": [{"name": "raw", "address": "127.0.0.1:0", "packet_size": 16}],
        "spool": {
            "path": str(directory / "spool"),
            "segment_bytes": "1 MiB",
            "max_bytes": "1 GiB",
            "min_free_bytes": 0,
        },
        "log": {"level": "debug", "target": ["stderr"]},
    }


def merged(base: Settings, changes: Settings) -> dict[str, Any]:
    """Tables merge, everything else is replaced. A single table for an array of tables changes its first one."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            result[key] = merged(old, value)
        elif isinstance(value, Mapping) and isinstance(old, list):
            result[key] = [merged(old[0], value), *old[1:]]
        else:
            result[key] = value
    return result


def to_toml(settings: Settings) -> str:
    """The configuration as text. Sections are tables, arrays of tables, or tables of tables."""
    lines: list[str] = []
    for section, content in settings.items():
        tables = content if isinstance(content, list) else [content]
        for table in tables:
            if any(isinstance(value, Mapping) for value in table.values()) and section == "layout":
                for name, inner in table.items():
                    lines += [f"[{section}.{name}]", *_toml_lines(inner)]
            else:
                lines += [f"[[{section}]]" if isinstance(content, list) else f"[{section}]", *_toml_lines(table)]
    return "\n".join(lines) + "\n"


def _toml_lines(table: Settings) -> list[str]:
    return [f"{key} = {_toml_value(value)}" for key, value in table.items()]


def _toml_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml_value(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(inner) for inner in value) + "]"
    return json.dumps(value)  # strings, numbers and booleans are written alike in both


def connect(port: int, *, source: str = "127.0.0.1") -> socket.socket:
    """A plain client."""
    return socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S * SLOWNESS, source_address=(source, 0))
