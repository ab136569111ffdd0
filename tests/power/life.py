"""One life of a daemon on a disk: it starts, clients go on where they stood, it is killed or stopped.

What clients were promised, and the log of the disk, are kept: together they say what must be there after a power cut at
any instant of that life.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from tests.integration.driver import SLOWNESS, session_pids, to_toml
from tests.integration.oracle import stored_streams
from tests.power import tails
from tests.power.clients import HOST, PORT_MPS, PORT_RAW, Client, Crowd, Mark, Source
from tests.power.disk import SPOOL, Disk, Pair

BIN = pathlib.Path(sys.executable).parent
DEADLINE_S = 30.0
KIB, MIB = 1 << 10, 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What one seed chose. ``raw`` of the clients have no protocol, the others speak MPS/1. ``kills`` of children."""

    packet_sizes: Sequence[int]
    raw: int
    segment_bytes: int
    commit_interval_s: float
    retained_bytes: int
    kills: int

    def kept_bytes_min(self, durable: int) -> int:
        """What retention leaves of a stream: it takes whole segments."""
        return min(durable, self.retained_bytes - self.segment_bytes) if self.retained_bytes else durable

    def settings(self, spool: pathlib.Path, directory: pathlib.Path) -> dict[str, Any]:
        listeners: list[dict[str, Any]] = [
            {"name": "raw", "address": f"{HOST}:{PORT_RAW}", "packet_size": 16, "on_full": "block"}
        ]
        if self.raw < len(self.packet_sizes):
            listeners.append({"name": "mps", "address": f"{HOST}:{PORT_MPS}", "protocol": "mps", "packet_size": 0})
        return {
            "server": {
                "workers": 2,
                "max_clients": 32,
                "control_socket": str(directory / "control.sock"),
                "stop_timeout_s": 20.0,
            },
            "buffers": {"bytes": "4 MiB", "chunk_bytes": "16 KiB"},
            "listener": listeners,
            "client": [{"id": f"press-{n + 1}", "address": f"127.0.1.{n + 1}"} for n in range(self.raw)],
            "spool": {
                "path": str(spool),
                "segment_bytes": self.segment_bytes,
                "commit_interval_s": self.commit_interval_s,
                "max_bytes": 0,
                "max_bytes_per_stream": self.retained_bytes,
                "min_free_bytes": 0,
            },
            "log": {"level": "debug", "target": ["stderr"]},
        }


class Life:
    """A context: whatever happens, no process of the daemon is left and the disk is unmounted; its log remains."""

    def __init__(
        self,
        plan: Plan,
        disk: Disk | Pair,
        directory: pathlib.Path,
        sources: Sequence[Source],
        marks: Sequence[Mark],
    ) -> None:
        self.plan = plan
        self.disk = disk
        self.log_path = directory / "daemon.log"
        self._directory = directory
        self._spool = disk.path / SPOOL
        self._socket_path = directory / "control.sock"
        self._process: subprocess.Popen[bytes] | None = None
        self.clients = [
            Client(source, mark, None, is_raw=number < plan.raw, number=number)
            for number, (source, mark) in enumerate(zip(sources, marks, strict=True))
        ]
        self.acked_at_start = sum(mark.acked for mark in marks)
        self.crowd = Crowd(self.clients)
        self._tails = tails.Tails()

    def __enter__(self) -> Life:
        self._socket_path.unlink(missing_ok=True)  # of the one that was killed
        self._tails = tails.look(self._spool)
        config = self._directory / "mpserverd.toml"
        config.write_text(to_toml(self.plan.settings(self._spool, self._directory)))
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [BIN / "mpserverd", "--config", config],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.crowd.close()
        self.disk.unmount()

    def kill(self) -> None:
        """SIGKILL to everything of the daemon, at once."""
        if self._process is None:
            return
        while pids := session_pids(self._process.pid):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def kill_a_child(self, choose: random.Random) -> None:
        """SIGKILL to a worker or the storer."""
        assert self._process is not None
        children = [pid for pid in sorted(session_pids(self._process.pid)) if pid != self._process.pid]
        if children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(choose.choice(children), signal.SIGKILL)

    # -- what happens in it

    def run_until(self, condition: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> None:
        deadline = time.monotonic() + deadline_s * SLOWNESS
        while not condition():
            self._require_running()
            if time.monotonic() > deadline:
                where = [(c.source.name, c.mark, c.target, c.is_connected) for c in self.clients]
                raise AssertionError(f"waited {deadline_s:g} s for {what}: {where}")
            self.crowd.turn()

    def run_for(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            self._require_running()
            self.crowd.turn()

    def _require_running(self) -> None:
        assert self._process is not None
        if self._process.poll() is not None:
            raise AssertionError(f"mpserverd exited {self._process.returncode}")

    def go_on(self, habit: random.Random | None, bytes_more: int) -> None:
        """Every client is to send so much more; with ``habit`` they come and go."""
        for client in self.clients:
            size = client.source.packet_size
            client.target = client.mark.sent + bytes_more
            client.target -= client.target % size
            client.set_habit(habit)

    def take_up_raw(self) -> None:
        """Raw clients learn from the daemon where they are, while none of them is connected."""
        if self.plan.raw:
            self.run_until(self._socket_path.exists, "the control socket")
        found = self.durable() if self.plan.raw else {}
        for client in self.clients[: self.plan.raw]:
            client.go_on_from(found.get(client.source.name, 0))

    def run_until_under_load(self) -> None:
        """Every client is served, and something was acknowledged in this life."""
        self.run_until(lambda: all(client.is_served for client in self.clients), "every client to be served")
        self.run_until(self._is_anything_acknowledged, "something to be acknowledged")

    def _is_anything_acknowledged(self) -> bool:
        if self.plan.raw == len(self.clients):  # else asking would only delay the others
            self.promise_raw()
        return sum(client.mark.acked for client in self.clients) > self.acked_at_start

    def is_all_acknowledged(self) -> bool:
        """Raw clients are asked about when everything else is done: asking takes longer than sending."""
        raw, others = self.clients[: self.plan.raw], self.clients[self.plan.raw :]
        if all(client.is_done for client in others) and all(client.mark.sent >= client.target for client in raw):
            self.promise_raw()
        return all(client.is_done for client in self.clients)

    def durable(self) -> dict[str, int]:
        """What the daemon says."""
        answer = self.ctl("--json", "streams")
        return {stream["name"]: int(stream["durable_bytes"]) for stream in json.loads(answer)}

    def promise_raw(self) -> None:
        found = self.durable() if self.plan.raw else {}
        for client in self.clients[: self.plan.raw]:
            client.promise(found.get(client.source.name, 0))

    def ctl(self, *arguments: str) -> str:
        """Fails unless it exits 0. The clients wait meanwhile."""
        command = [BIN / "mpserverctl", "--socket", self._socket_path, *arguments]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S * SLOWNESS, check=False)
        if answer.returncode:
            raise AssertionError(
                f"mpserverctl {' '.join(arguments)}: {answer.returncode}\n{answer.stdout}{answer.stderr}"
            )
        return answer.stdout

    def stop(self) -> None:
        """A regular end: exit code 0, no traceback."""
        assert self._process is not None
        self._process.terminate()
        code = self._process.wait(DEADLINE_S * SLOWNESS)
        assert code == 0, f"exit code {code} after SIGTERM"
        assert not session_pids(self._process.pid), "processes left"
        assert "Traceback" not in self.log(), "a traceback in the log"

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    # -- what must be true at its end

    def compare_cut(self) -> int:
        """What the power cut left behind the durable offsets was named and counted. Returns how many bytes that was."""
        self._tails.compare(self.log(), self._spool / "catalog.sqlite")
        return self._tails.bytes

    def compare(self) -> int:
        """Every stream is what its client sent, byte for byte. Returns how many bytes were compared."""
        stored = {}
        for stream in stored_streams(self._spool):  # a name's newest epoch is its last
            stored[stream.name] = stream
        compared = 0
        for client in self.clients:
            source, mark = client.source, client.mark
            stream = stored.get(source.name)
            if stream is None:
                assert mark.acked == 0, f"{source.name} is gone, {mark.acked} bytes were acknowledged"
                continue
            assert stream.durable >= mark.acked, f"{source.name} has {stream.durable}, {mark.acked} were acknowledged"
            assert stream.durable <= mark.sent, f"{source.name} has {stream.durable}, {mark.sent} were sent"
            assert stream.epoch == mark.epoch or client.is_raw, f"{source.name} has another epoch"
            kept, wanted_bytes = stream.durable - stream.first_offset, self.plan.kept_bytes_min(stream.durable)
            assert kept >= wanted_bytes, f"{source.name} has {kept} bytes from {stream.first_offset} on"
            wanted = source.content(stream.first_offset, stream.durable)
            if stream.content != wanted:
                raise AssertionError(f"{source.name} differs {difference(stream.content, wanted, stream.first_offset)}")
            compared += len(wanted)
        return compared


def difference(found: bytes, wanted: memoryview, first: int) -> str:
    """Where two contents differ, for people."""
    length = min(len(found), len(wanted))
    at = next((n for n in range(length) if found[n] != wanted[n]), length)
    again = next((n for n in range(at, length) if found[n] == wanted[n]), length)
    lengths = f"it has {len(found)} bytes of {len(wanted)}"
    return f"from offset {first + at} to {first + again}; {lengths}, {found[at:again][:32]!r}"
