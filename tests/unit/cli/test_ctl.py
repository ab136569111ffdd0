"""mpserverctl as an operator types it: commands, options, exit codes, text for people and JSON for programs.

The daemon's side is a thread that hands out real tables; what healthy replies mean is tested with a real daemon in
tests/integration.
"""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpserverd.arena.state import FIRST_WORKER_SLOT, Gone, Head, Slot, Str
from mpserverd.cli import ctl
from mpserverd.cli.ctl_commands import COMMANDS, LogLevel
from mpserverd.config.options import default
from mpserverd.config.schema import Config
from mpserverd.config.show import as_dict, as_toml
from mpserverd.control.messages import Reply, Request
from tests.unit.arena.live_tables import Tables
from tests.unit.control.fake_server import replying, serving

EVENTS = [
    {"number": 1, "unix_ns": 1_700_000_000_123_456_789, "source": "supervisor", "kind": "ready", "clients": 10},
    {"number": 2, "unix_ns": 1_700_000_001_000_000_000, "source": "worker-1", "kind": "child died", "pid": 7},
]
RESULTS: dict[str, Any] = {
    "config": as_dict(Config()),
    "reload": {"changed": ["listener raw changed"], "needs_restart": ["buffers.bytes"]},
    "loglevel": {"level": "debug"},
    "kick": {"connections": [{"row": 0, "peer": "192.0.2.1:5000", "stream": "pump-7"}]},
}


@pytest.fixture
def tables() -> Iterator[Tables]:
    with Tables() as made:
        stream = made.open(0, name="pump-7")
        made.connect(0, stream)
        stream.receive(1600)
        yield made


class Daemon:
    """Where it listens, and what it was asked."""

    def __init__(self, path: Path, requests: list[Request]) -> None:
        self.path, self.requests = path, requests

    def asked(self) -> tuple[str, dict[str, Any]]:
        return self.requests[-1].command, self.requests[-1].arguments


@pytest.fixture
def daemon(tmp_path: Path, tables: Tables) -> Iterator[Daemon]:
    def answer(sock: socket.socket, request: Request) -> None:
        if request.command == "state":
            replying(Reply(True, tables.facts).encode(), tables.state.fd, tables.table.fd)(sock, request)
        elif request.command == "events":
            since = request.arguments["since"]
            sock.sendall(Reply(True, [event for event in EVENTS if event["number"] > since]).encode())
        else:
            sock.sendall(Reply(True, RESULTS.get(request.command, RESULTS["kick"])).encode())

    path = tmp_path / "control.sock"
    with serving(path, answer) as requests:
        yield Daemon(path, requests)


class Ctl:
    """Runs the program in this process."""

    def __init__(self, socket_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._socket, self._capsys = socket_path, capsys

    def __call__(self, *words: str) -> tuple[int, str, str]:
        code = ctl.main(["--socket", str(self._socket), *words])
        captured = self._capsys.readouterr()
        return code, captured.out, captured.err

    def json(self, *words: str) -> Any:
        code, out, err = self("--json", *words)
        assert (code, err) == (0, "")
        return json.loads(out)


@pytest.fixture
def run(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> Ctl:
    return Ctl(daemon.path, capsys)


def start(*words: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mpserverd.cli.ctl", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# -- reports


def test_stats_are_told_to_people(run: Ctl) -> None:
    code, out, err = run("stats")
    assert (code, err) == (0, "")
    for text in ("serving, up 12.5 s", "1 of 8 now, 1 in all", "100, 0 packets/s", "balances", "worker", "running"):
        assert text in out


def test_stats_are_one_object_of_json(run: Ctl) -> None:
    report = run.json("stats")
    assert report["total_packets"] == 100
    assert report["host"]["memory_percent"] > 0
    assert report["listeners"][0]["port"] == 8888


def test_clients_are_told_to_people(run: Ctl) -> None:
    code, out, _ = run("clients")
    assert code == 0
    assert "pump-7" in out
    assert "192.0.2.1:5000" in out
    assert out.endswith("1 connection\n")


def test_clients_beyond_the_rows_asked_for_are_counted(run: Ctl, tables: Tables) -> None:
    for row in range(1, 5):
        tables.connect(row, tables.open(row))
    lines = run("clients", "--rows", "2")[1].splitlines()
    assert lines[-2:] == ["... and 3 more; --rows 0 shows all, --json too", "5 connections"]
    assert len(run("clients", "--rows", "0")[1].splitlines()) == 7
    assert len(run.json("clients", "--rows", "2")) == 5


def test_workers_are_told_to_people(run: Ctl, tables: Tables) -> None:
    tables.state.slots[FIRST_WORKER_SLOT, Slot.CPU_MILLI] = 123
    tables.facts["workers"][1] |= {"pid": None, "state": "backoff"}
    out = run("workers")[1]
    assert "12.3 %" in out
    assert "backoff" in out
    assert [worker["index"] for worker in run.json("workers")] == [0, 1]


def test_a_ledger_that_balances_exits_0(run: Ctl) -> None:
    code, out, _ = run("ledger")
    assert code == 0
    assert out.endswith("the ledger balances\n")
    assert "received = stored + in_arena + dropped + unstored" in out
    assert "1,600" in out


def test_a_ledger_that_is_off_exits_1_and_names_the_stream(run: Ctl, tables: Tables) -> None:
    tables.state.streams[0, Str.SOCKET] += np.uint64(7)
    code, out, _ = run("ledger")
    assert code == 1
    assert "OFF by 7" in out
    assert "pump-7" in out
    assert out.endswith("the ledger DOES NOT BALANCE\n")


def test_the_ledger_lists_streams_on_request(run: Ctl) -> None:
    assert "pump-7" not in run("ledger")[1]
    assert "pump-7" in run("ledger", "--streams")[1]
    assert run.json("ledger", "--streams")["streams"][0]["stream"] == "pump-7"


def test_check_exits_0_when_healthy_and_1_with_the_reason_when_not(run: Ctl, tables: Tables) -> None:
    code, out, _ = run("check")
    assert (code, out.splitlines()[-1]) == (0, "healthy")
    tables.facts["storer"]["state"] = "stuck"
    code, out, _ = run("check")
    assert (code, out.splitlines()[-1]) == (1, "NOT healthy")
    assert "FAILS  stuck" in " ".join(out.replace("   ", "  ").split("\n"))


def test_watch_prints_one_object_a_line_until_interrupted(daemon: Daemon) -> None:
    with start("--json", "stats", "--watch", "--interval", "0.05", "--socket", daemon.path) as watch:
        assert watch.stdout is not None
        for _ in range(3):
            assert json.loads(watch.stdout.readline())["total_packets"] == 100
        watch.send_signal(signal.SIGINT)
        _, err = watch.communicate(timeout=20)
    assert (watch.returncode, err) == (ctl.EXIT_INTERRUPTED, "")


def test_a_reader_that_goes_away_ends_it_quietly(daemon: Daemon) -> None:
    with start("--json", "stats", "--watch", "--interval", "0.05", "--socket", daemon.path) as watch:
        assert watch.stdout is not None
        watch.stdout.readline()
        watch.stdout.close()
        assert watch.wait(20) == ctl.EXIT_READER_GONE
        assert watch.stderr is not None
        assert watch.stderr.read() == ""


def test_watch_says_when_the_daemon_is_gone(tmp_path: Path, tables: Tables) -> None:
    path = tmp_path / "short.sock"
    state = replying(Reply(True, tables.facts).encode(), tables.state.fd, tables.table.fd)
    with serving(path, state):
        watch = start("--json", "stats", "--watch", "--interval", "0.05", "--socket", path)
        assert watch.stdout is not None
        watch.stdout.readline()
    _, err = watch.communicate(timeout=20)
    assert watch.returncode == 3
    assert err.startswith(f"mpserverctl: {path}: ")


# -- requests


def test_events_are_lines_with_their_time(run: Ctl) -> None:
    code, out, _ = run("events")
    assert code == 0
    assert out.splitlines() == [
        "2023-11-14T22:13:20.123Z supervisor: ready clients=10",
        "2023-11-14T22:13:21.000Z worker-1: child died pid=7",
    ]


def test_the_newest_events_are_kept(run: Ctl) -> None:
    assert len(run("events", "--rows", "1")[1].splitlines()) == 1
    assert [event["number"] for event in run.json("events", "--rows", "1")] == [2]
    assert run.json("events")[0]["time"] == "2023-11-14T22:13:20.123Z"


def test_following_events_prints_one_object_a_line(daemon: Daemon) -> None:
    with start("--json", "events", "--follow", "--socket", daemon.path) as follow:
        assert follow.stdout is not None
        assert [json.loads(follow.stdout.readline())["number"] for _ in range(2)] == [1, 2]
        follow.send_signal(signal.SIGINT)
        assert follow.wait(20) == ctl.EXIT_INTERRUPTED


@pytest.mark.parametrize("command", ["kick", "pause", "resume"])
def test_a_target_is_passed_on(run: Ctl, daemon: Daemon, command: str) -> None:
    assert run(command, "pump-7") == (0, f"192.0.2.1:5000  pump-7\n{command}: 1 connection\n", "")
    assert daemon.asked() == (command, {"target": "pump-7"})


def test_reload_tells_what_changed(run: Ctl) -> None:
    assert run("reload") == (0, "listener raw changed\nbuffers.bytes: needs a restart\n", "")
    assert run.json("reload") == RESULTS["reload"]


def test_the_log_level_is_passed_on(run: Ctl, daemon: Daemon) -> None:
    assert run("loglevel", "debug") == (0, "log level debug\n", "")
    assert daemon.asked() == ("loglevel", {"level": "debug"})


def test_config_prints_what_loads_to_the_settings_in_force(run: Ctl) -> None:
    assert run("config") == (0, as_toml(Config()) + "", "")
    assert run.json("config") == as_dict(Config())


def test_default_config_needs_no_daemon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = Ctl(tmp_path / "nobody", capsys)
    assert "max_clients = 10" in ask("config", "--default")[1]
    assert ask.json("config", "--default") == as_dict(Config())


# -- usage and faults


def test_global_options_may_stand_before_or_after_the_command(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (
        ["--json", "--socket", str(daemon.path), "workers"],
        ["workers", "--socket", str(daemon.path), "--json"],
    ):
        assert ctl.main(words) == 0
        assert len(json.loads(capsys.readouterr().out)) == 2


@pytest.mark.parametrize(
    "words",
    [
        ["frob"],
        ["kick"],
        ["stats", "--interval", "0"],
        ["stats", "--interval", "x"],
        ["stats", "--wat"],
        ["clients", "--rows", "-1"],
        ["loglevel", "loud"],
        ["workers", "extra"],
    ],
)
def test_a_command_line_that_makes_no_sense_exits_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert ctl.main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mpserverctl: ")
    assert captured.err.count("\n") == 1


def test_no_command_prints_help_and_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert ctl.main([]) == 2
    assert "COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["stats"], ["clients"], ["ledger"], ["check"], ["events"], ["kick", "x"], ["config"]]
)
def test_a_daemon_that_is_not_there_exits_3(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = Ctl(tmp_path / "nobody", capsys)(*words)
    assert (code, out) == (3, "")
    assert "is mpserverd running?" in err


def test_what_the_daemon_refuses_exits_as_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "refusing.sock"
    with serving(path, replying(Reply.fault("no connection is called 'x'", 1).encode())):
        assert Ctl(path, capsys)("kick", "x") == (1, "", "mpserverctl: no connection is called 'x'\n")


def test_tables_of_another_version_are_refused_with_a_reason(
    tmp_path: Path, tables: Tables, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.sock"
    tables.state.words[1] = 77
    with serving(path, replying(Reply(True, tables.facts).encode(), tables.state.fd, tables.table.fd)):
        code, _, err = Ctl(path, capsys)("stats")
    assert code == 1
    assert "layout 77" in err


def test_a_spool_is_asked_of_the_daemon_and_its_absence_told_when_it_was_named(
    run: Ctl, tables: Tables, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables.facts["spool"] = str(tmp_path / "its-spool")
    assert str(tmp_path / "its-spool") in run("streams")[2]
    assert Ctl(tmp_path / "nobody", capsys)("streams")[0] == 3


def test_the_default_socket_is_the_daemons() -> None:
    assert default("server.control_socket") == ctl.DEFAULT_SOCKET


def test_a_command_that_needs_no_tables_imports_no_numpy() -> None:
    code = "import sys; from mpserverd.cli import ctl; ctl.main(['kick', 'x', '--socket', '/nowhere']); "
    code += "print([name for name in ('numpy', 'rich', 'psutil', 'mpserverd.arena') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


# -- text for people


def on_terminal(width: int, *words: str | Path) -> str:
    """What the program prints on a terminal of that width."""
    ours, theirs = pty.openpty()
    try:
        child = subprocess.Popen(
            [sys.executable, "-m", "mpserverd.cli.ctl", *map(str, words)],
            stdout=theirs,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"COLUMNS": str(width), "TERM": "xterm-256color"},
        )
        os.close(theirs)
        content = b""
        while True:
            try:
                content += os.read(ours, 65536)
            except OSError:  # EIO: the program has left
                break
        assert child.wait(20) == 0
    finally:
        os.close(ours)
    return content.decode()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_tables_fit_the_terminal(daemon: Daemon, width: int) -> None:
    out = on_terminal(width, "workers", "--socket", daemon.path)
    plain = io.StringIO(out).read().replace("\r", "")
    for code in ("\x1b[1m", "\x1b[0m"):
        plain = plain.replace(code, "")
    assert "\x1b" not in plain
    assert max(map(len, plain.splitlines())) <= width


def test_a_pipe_gets_no_lines_and_no_colours(run: Ctl, tables: Tables) -> None:
    tables.state.words[Head.GONE + Gone.STORED_BYTES] += 1
    for words in (["stats"], ["clients"], ["workers"], ["ledger"], ["check"], ["events"]):
        assert run(*words)[1].isascii()


# -- the table of commands


def test_every_command_has_help_and_says_whether_it_needs_the_daemon() -> None:
    for name, command in COMMANDS.items():
        assert command.name == name
        assert command.help
        assert command.description.endswith(".")
    assert [name for name, command in COMMANDS.items() if not command.needs_daemon] == ["config"]
    assert list(LogLevel) == ["debug", "info", "warning", "error"]


# -- what an operator mistypes, and where output goes


def test_a_wrong_level_is_refused_with_the_words_that_may_be_written(run: Ctl) -> None:
    code, _, err = run("loglevel", "xx")
    assert code == 2
    assert "invalid choice: 'xx' (choose from 'debug', 'info', 'warning', 'error')" in err


@pytest.mark.parametrize("words", [["stats"], ["config", "--default"], ["--json", "clients"]])
def test_output_that_cannot_be_written_is_said_of_standard_output(daemon: Daemon, words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            [sys.executable, "-m", "mpserverd.cli.ctl", "--socket", str(daemon.path), *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (found.returncode, found.stderr) == (1, "mpserverctl: standard output: No space left on device\n")


@pytest.mark.parametrize("words", [["--spool", "{}", "streams"], ["streams", "--spool", "{}"]])
def test_a_spool_is_named_before_or_after_the_command(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ctl.main([word.format(tmp_path) for word in words]) == 1
    assert f"{tmp_path} is not a spool" in capsys.readouterr().err


def test_a_spool_is_refused_where_the_daemon_is_asked(run: Ctl) -> None:
    code, _, err = run("--spool", "/x", "stats")
    assert (code, err) == (2, "mpserverctl: --spool is for commands that read a spool; stats asks the daemon\n")


def test_times_blocked_are_told_as_a_count_so_far(run: Ctl) -> None:
    assert "blocked so far" in run("workers")[1]


def test_a_spool_that_nobody_has_looked_at_is_unknown(run: Ctl, tables: Tables) -> None:
    tables.look_at_spool(free_bytes=0)
    assert "/spool: unknown, the storer has not looked yet" in run("stats")[1]
    assert run("check")[0] == 1
