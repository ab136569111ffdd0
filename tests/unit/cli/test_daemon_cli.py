"""The command line of mpserverd: what it answers, with which exit code, in the foreground and in the background.

``background.start`` runs small programs here in place of the supervisor; they run in real detached processes.
"""

from __future__ import annotations

import fcntl
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mpserverd.cli import background, daemon
from mpserverd.config.load import loads
from mpserverd.config.schema import Config
from mpserverd.errors import ConfigError, MpserverdError, StartError
from mpserverd.log_targets import Target

DEADLINE_S = 10.0
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "main.toml"
    path.write_text("")
    return path


def mpserverd(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = "import sys; from mpserverd.cli.daemon import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


# Answers


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        daemon.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith("mpserverd ")


def test_unknown_arguments_are_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        daemon.main(["--wrong"])
    assert left.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


def test_help_options_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert daemon.main(["--help-options"]) == 0
    assert "spool.min_free_bytes  (default: " in capsys.readouterr().out


def test_check_config_of_a_good_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert daemon.main(["--config", str(file), "--check-config", "--set", "server.workers=2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("configuration is fine\n  2 workers, at most 10 clients\n")
    assert "listener raw: 0.0.0.0:8888, raw, packets of 16 bytes, stored, when memory is full drop-oldest" in out


def test_check_config_of_a_bad_file_prints_every_fault(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("[server]\nworkers = 0\nbacklog = 0\n")
    assert daemon.main(["--config", str(file), "--check-config"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"mpserverd: {file}: server.workers = 0: out of range; 1 to 64",
        f"mpserverd: {file}: server.backlog = 0: out of range; 1 to 65535",
    ]


def test_missing_file_names_it_and_the_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert daemon.main(["--config", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"mpserverd: {tmp_path}/none: no such file; name another one with --config\n"


def test_missing_default_file_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(daemon, "DEFAULT_CONFIG", "/nonexistent/mpserverd.toml")
    assert daemon.main([]) == 2
    assert "/nonexistent/mpserverd.toml: no such file; name another one with --config" in capsys.readouterr().err


def test_pidfile_is_for_the_background_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert daemon.main(["--pidfile", "/x"]) == 2
    assert capsys.readouterr().err == "mpserverd: --pidfile is for --daemon only\n"


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (StartError("port 8888 is taken\nby another"), 1, "mpserverd: port 8888 is taken\nmpserverd: by another\n"),
        (ConfigError(["a", "b"]), 2, "mpserverd: a\nmpserverd: b\n"),
        (OSError(28, "No space left on device", "/x"), 1, "mpserverd: /x: No space left on device\n"),
        (OSError("odd"), 1, "mpserverd: odd\n"),
        (KeyboardInterrupt(), 130, "mpserverd: interrupted\n"),
    ],
)
def test_faults_end_in_a_line_and_never_in_a_traceback(
    error: BaseException, code: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(daemon, "_dispatch", fail)
    assert daemon.main([]) == code
    assert capsys.readouterr().err == text


def test_check_config_needs_no_numpy_and_numpy_gets_one_thread(file: Path) -> None:
    program = (
        "import os, sys; from mpserverd.cli.daemon import main; "
        f"main(['--config', {str(file)!r}, '--check-config']); "
        "sys.exit('numpy' in sys.modules or os.environ['OPENBLAS_NUM_THREADS'] != '1')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr


def test_whole_command_reports_faults(file: Path) -> None:
    done = mpserverd("--config", file, "--check-config", "--set", "server.workers=x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'mpserverd: --set: server.workers = "x": not a whole number; 1 to 64\n'


def run_as(supervise: Callable[..., int], monkeypatch: pytest.MonkeyPatch, log_file: Path, *overrides: str) -> int:
    """main() in the foreground, with ``supervise(on_ready)`` in place of the supervisor and the log in a file."""
    monkeypatch.setattr(daemon, "_supervise", lambda config, reload_config, on_ready: supervise(on_ready))
    (log_file.parent / "main.toml").write_text(f'[log]\ntarget = ["file"]\nfile = "{log_file}"\n')
    arguments = [argument for override in overrides for argument in ("--set", override)]
    try:
        return daemon.main(["--config", str(log_file.parent / "main.toml"), *arguments])
    finally:
        root = logging.getLogger()
        for handler in [handler for handler in root.handlers if isinstance(handler, Target)]:
            root.removeHandler(handler)
            handler.close()


def test_settings_of_the_background_are_named_once_in_the_foreground(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def supervise(on_ready: Callable[[], None]) -> int:
        on_ready()
        return 0

    assert run_as(supervise, monkeypatch, tmp_path / "log", "server.nice=3", "server.user=nobody") == 0
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert line.endswith("WARNING settings are for --daemon only and are not applied keys=user,nice")


def test_start_that_fails_is_in_the_log_and_on_stderr(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def supervise(on_ready: Callable[[], None]) -> int:
        raise StartError("port taken")

    assert run_as(supervise, monkeypatch, tmp_path / "log") == 1
    assert capsys.readouterr().err == "mpserverd: port taken\n"
    assert (tmp_path / "log").read_text().endswith('ERROR start failed reason="port taken"\n')


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), OSError(5, "Input/output error")])
def test_error_of_the_program_itself_goes_to_the_log_with_its_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def supervise(on_ready: Callable[[], None]) -> int:
        on_ready()
        raise error

    assert run_as(supervise, monkeypatch, tmp_path / "log") == 1
    text = (tmp_path / "log").read_text()
    assert "CRITICAL error of the program itself" in text
    assert f"  | {type(error).__name__}" in text
    assert capsys.readouterr().err == ""


def test_closed_standard_descriptors_are_filled(file: Path) -> None:
    """Otherwise the first socket would be number 2, and take the log's lines."""
    program = (
        "import os, sys; os.close(0); os.close(2); from mpserverd.cli import daemon; "
        f"daemon.main(['--config', {str(file)!r}, '--check-config']); "
        "sys.exit(os.readlink('/proc/self/fd/2') != os.devnull)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=30, check=False)
    assert done.returncode == 0


# In the background


class Background:
    """Starts programs as the daemon in tmp_path, and ends them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.pidfile = directory / "run" / "pid"
        self.said: list[str] = []
        self.config = loads(
            "",
            [
                f"server.control_socket={directory}/run/control.sock",
                f"spool.path={directory}/spool",
                'log.target=["file"]',
                f"log.file={directory}/log",
            ],
        )
        self.config_text = ""

    def start(self, run: Callable[[Callable[[], None]], int], config: Config | None = None) -> int:
        return background.start(config or self.config, self.pidfile, run, self.said.append)

    def pid(self) -> int:
        return int(self.pidfile.read_text())

    def stop(self) -> None:
        """End the daemon that the pidfile names, and wait until it is gone."""
        if not self.pidfile.exists():
            return
        pid = self.pid()
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            os.kill(pid, signal.SIGTERM)
            assert select.select([pidfd], [], [], DEADLINE_S)[0], f"process {pid} does not end"
        finally:
            os.close(pidfd)


@pytest.fixture
def box(tmp_path: Path) -> Background:
    return Background(tmp_path)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline, "did not come true in time"
        os.sched_yield()


def is_free(directory: Path) -> bool:
    """Whether nobody holds a lock on it."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def serve(on_ready: Callable[[], None]) -> int:
    """Ready, then wait for SIGTERM, as the supervisor does."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    on_ready()
    signal.sigtimedwait([signal.SIGTERM], DEADLINE_S)
    return 0


def test_start_returns_when_the_daemon_is_ready_and_stop_removes_the_pidfile(box: Background) -> None:
    assert box.start(serve) == 0
    pid = box.pid()
    assert os.getsid(pid) not in (os.getsid(0), pid)  # detached, and not able to get a terminal
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert os.readlink(f"/proc/{pid}/fd/2") == os.devnull
    box.stop()
    assert not box.pidfile.exists()
    assert box.said == []


def test_daemon_inherits_no_descriptor(box: Background) -> None:
    reader, writer = os.pipe()
    try:
        assert box.start(serve) == 0
        # the pipe that said so is closed a moment later
        wait_until(lambda: sorted(os.listdir(f"/proc/{box.pid()}/fd")) == ["0", "1", "2"])
    finally:
        os.close(reader)
        os.close(writer)
        box.stop()


def test_files_of_the_daemon_are_not_for_everyone(box: Background) -> None:
    def run(on_ready: Callable[[], None]) -> int:
        (box.directory / "made").write_text("")
        return serve(on_ready)

    assert box.start(run) == 0
    box.stop()
    assert (box.directory / "made").stat().st_mode & 0o777 == 0o640


def test_second_start_is_refused_and_names_the_first(box: Background, monkeypatch: pytest.MonkeyPatch) -> None:
    # the pretended daemon is a pytest by its command line
    monkeypatch.setattr("mpserverd.cli.pidfile._is_program", lambda name: True)
    assert box.start(serve) == 0
    try:
        wait_until(lambda: is_free(box.pidfile.parent))  # the daemon closes its copy of the start's lock a moment later
        with pytest.raises(
            StartError, match=f"already running as process {box.pid()} .pidfile {box.pidfile}."
        ) as refused:
            box.start(serve)
        assert refused.value.exit_code == 1
    finally:
        box.stop()


def test_directory_of_the_pidfile_is_free_for_other_locks_when_the_daemon_runs(box: Background) -> None:
    """The supervisor locks the directory of its control socket, which is usually the same one."""

    def run(on_ready: Callable[[], None]) -> int:
        # the operator's process closes its copy of the lock at about this time, and waits for us with no lock
        wait_until(lambda: is_free(box.pidfile.parent))
        return serve(on_ready)

    assert box.start(run) == 0
    box.stop()


def test_stale_pidfile_is_replaced_with_a_remark(box: Background) -> None:
    box.pidfile.parent.mkdir()
    box.pidfile.write_text("1\n")
    assert box.start(serve) == 0
    assert box.pid() != 1
    box.stop()
    assert box.said == [f"replacing {box.pidfile}: it named process 1, which is another program"]


@pytest.mark.parametrize("error", [StartError("port taken"), ConfigError(["a: b", "c: d"])])
def test_start_that_fails_gives_the_daemons_text_and_code(box: Background, error: MpserverdError) -> None:
    def fail(on_ready: Callable[[], None]) -> int:
        raise error

    with pytest.raises(StartError) as failed:
        box.start(fail)
    assert str(failed.value) == str(error)
    assert failed.value.exit_code == error.exit_code
    assert not box.pidfile.exists()


def test_operating_fault_at_the_start_is_told_without_a_traceback(box: Background) -> None:
    def fail(on_ready: Callable[[], None]) -> int:
        open(box.directory)  # noqa: SIM115
        return 0

    with pytest.raises(StartError, match=r"cannot start in the background: .*Is a directory"):
        box.start(fail)


def test_error_of_the_program_itself_is_told_with_its_traceback(box: Background) -> None:
    def fail(on_ready: Callable[[], None]) -> int:
        raise ZeroDivisionError

    with pytest.raises(StartError, match=r"(?s)\ATraceback .*ZeroDivisionError"):
        box.start(fail)


@pytest.mark.parametrize("how", ["killed", "returned"])
def test_daemon_that_ends_before_it_is_ready_is_a_failed_start(box: Background, how: str) -> None:
    def end(on_ready: Callable[[], None]) -> int:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    with pytest.raises(StartError, match=r"the daemon ended before it was ready; its log says why") as failed:
        box.start(end)
    assert failed.value.exit_code == 1


def test_terminated_before_it_is_ready_removes_the_pidfile(box: Background) -> None:
    def stop(on_ready: Callable[[], None]) -> int:
        raise SystemExit(3)

    with pytest.raises(StartError, match=r"stopped before it was ready") as failed:
        box.start(stop)
    assert failed.value.exit_code == 3
    wait_until(lambda: not box.pidfile.exists())


def test_removed_pidfile_does_not_keep_the_daemon_from_ending(box: Background) -> None:
    assert box.start(serve) == 0
    box.pidfile = box.pidfile.rename(box.directory / "moved")
    box.stop()
    assert box.pidfile.exists()


def test_nobody_reads_stderr_in_the_background_is_said(box: Background) -> None:
    config = loads("", [f"server.control_socket={box.directory}/run/control.sock", f"spool.path={box.directory}/spool"])
    assert box.start(serve, config) == 0
    box.stop()
    assert "nobody reads standard error" in box.said[0]


@root_only
@pytest.mark.root
def test_daemon_becomes_the_user_with_all_its_groups(box: Background, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses  # noqa: PLC0415

    os.chmod(box.directory, 0o755)
    for parent in (box.directory, *box.directory.parents):
        if parent.name.startswith("pytest-"):
            os.chmod(parent, 0o755)
    monkeypatch.setattr("mpserverd.cli.account.check_program_is_readable", lambda account: None)  # maybe root's own
    server = dataclasses.replace(box.config.server, user="nobody", nice=3)
    assert box.start(serve, dataclasses.replace(box.config, server=server)) == 0
    status = dict(line.split(":\t") for line in Path(f"/proc/{box.pid()}/status").read_text().splitlines())
    nice = os.getpriority(os.PRIO_PROCESS, box.pid()) - os.getpriority(os.PRIO_PROCESS, 0)
    box.stop()
    assert status["Uid"].split() == ["65534"] * 4
    assert status["Gid"].split() == ["65534"] * 4
    assert status["Groups"].split() == ["65534"]
    assert nice == 3
    assert not box.pidfile.exists()


@root_only
@pytest.mark.root
def test_pidfile_in_a_directory_that_the_user_cannot_write_is_a_failed_start(box: Background) -> None:
    import dataclasses  # noqa: PLC0415

    box.pidfile.parent.mkdir()
    server = dataclasses.replace(box.config.server, user="nobody")
    with pytest.raises(StartError, match=r"cannot make the pidfile .* its directory must be writable"):
        box.start(serve, dataclasses.replace(box.config, server=server))


@pytest.mark.parametrize("text", ["[server]\nworkers = " + "9" * 5_000, "x = " + "[" * 100_000, "x = 0x" + "f" * 9_000])
@pytest.mark.parametrize("option", ["--check-config", None])
def test_number_or_nesting_beyond_all_bounds_is_one_line_and_bad_usage(
    file: Path, capsys: pytest.CaptureFixture[str], text: str, option: str | None
) -> None:
    file.write_text(text)
    assert daemon.main(["--config", str(file), *([option] if option else [])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mpserverd: {file}: ")
