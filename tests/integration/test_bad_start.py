"""A start that cannot work ends with an exit code and one message that says what to do, never with a traceback."""

from __future__ import annotations

import os
import pathlib
import socket

import pytest

from tests.integration.driver import Daemon, connect
from tests.integration.senders import needs

CONFIG_FAULT, START_FAULT = 2, 1
NOBODY = "65534"


def assert_refuses_to_start(daemon: Daemon, exit_code: int, *words: str) -> None:
    """It ends by itself with that code, says all of ``words``, and leaves nothing behind."""
    try:
        assert daemon.run_to_its_end() == exit_code, daemon.log()
        for word in words:
            assert daemon.log_contains(word), f"{word!r} is not in:\n{daemon.log()}"
        daemon.assert_nothing_left()
    finally:
        daemon.discard()


def assert_is_checked(daemon: Daemon) -> None:
    """--check-config finds nothing wrong and starts nothing."""
    try:
        assert daemon.run_to_its_end("--check-config") == 0, daemon.log()
        daemon.assert_nothing_left()
    finally:
        daemon.discard()


def test_a_port_that_is_taken_is_named(tmp_path: pathlib.Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        daemon = Daemon(tmp_path, {"listener": {"address": address}})
        assert_refuses_to_start(daemon, START_FAULT, address, "in use")


def test_an_address_of_another_machine_is_named(tmp_path: pathlib.Path) -> None:
    daemon = Daemon(tmp_path, {"listener": {"address": "192.0.2.1:8888"}})
    assert_refuses_to_start(daemon, START_FAULT, "192.0.2.1:8888")


def test_a_missing_config_is_named(tmp_path: pathlib.Path) -> None:
    daemon = Daemon(tmp_path)
    daemon.config_path = tmp_path / "no-such-directory" / "mpserverd.toml"
    daemon.write_config = lambda: None  # type: ignore[method-assign]
    assert_refuses_to_start(daemon, CONFIG_FAULT, str(daemon.config_path))


@pytest.mark.root
def test_a_config_that_may_not_be_read_is_named(tmp_path: pathlib.Path) -> None:
    daemon = as_nobody(tmp_path)
    daemon.write_config()
    daemon.config_path.chmod(0o600)
    daemon.write_config = lambda: None  # type: ignore[method-assign]
    assert_refuses_to_start(daemon, CONFIG_FAULT, str(daemon.config_path), "ermission")


def test_every_fault_of_a_config_is_told_at_once(tmp_path: pathlib.Path) -> None:
    daemon = Daemon(
        tmp_path,
        {
            "server": {"workers": 0, "max_cleints": 5},
            "listener": {"packet_size": 70_000, "protocol": "rwa"},
            "spool": {"sync": "maybe"},
        },
    )
    assert_refuses_to_start(
        daemon,
        CONFIG_FAULT,
        "server.workers",
        "max_cleints",
        "max_clients",
        "packet_size",
        "65536",
        "rwa",
        "spool.sync",
    )


@pytest.mark.parametrize(
    "text",
    ["", "[server\n", "workers = 4\n", '[listener]\nname = "x"\n', "\ufeff[server]\n", "[server]\nworkers = '4'\n"],
)
def test_a_config_that_is_no_config_is_a_fault_with_its_file(tmp_path: pathlib.Path, text: str) -> None:
    """An empty one is all defaults, and then only the port and the spool decide."""
    daemon = Daemon(tmp_path)
    daemon.write_config()
    daemon.config_path.write_text(text)
    daemon.write_config = lambda: None  # type: ignore[method-assign]
    if text:
        assert_refuses_to_start(daemon, CONFIG_FAULT, str(daemon.config_path))
    else:
        assert_is_checked(daemon)


def test_bytes_that_are_no_text_are_no_config(tmp_path: pathlib.Path) -> None:
    daemon = Daemon(tmp_path)
    daemon.config_path.write_bytes(bytes(range(256)))
    daemon.write_config = lambda: None  # type: ignore[method-assign]
    assert_refuses_to_start(daemon, CONFIG_FAULT, str(daemon.config_path))


@pytest.mark.root
def test_a_spool_that_may_not_be_written_is_named(tmp_path: pathlib.Path) -> None:
    daemon = as_nobody(tmp_path)
    daemon.spool.mkdir(mode=0o755)
    assert_refuses_to_start(daemon, START_FAULT, str(daemon.spool), "ermission")


def test_a_spool_that_is_a_file_is_named(tmp_path: pathlib.Path) -> None:
    daemon = Daemon(tmp_path)
    daemon.spool.write_text("not a directory")
    assert_refuses_to_start(daemon, START_FAULT, str(daemon.spool))


def test_a_second_daemon_on_the_same_spool_or_socket_is_refused(tmp_path: pathlib.Path) -> None:
    """The first one goes on undisturbed."""
    (tmp_path / "second").mkdir()
    with Daemon(tmp_path) as first:
        same_spool = Daemon(tmp_path / "second", {"spool": {"path": str(first.spool)}})
        assert_refuses_to_start(same_spool, START_FAULT, str(first.spool))
        same_socket = Daemon(tmp_path / "second", {"server": {"control_socket": str(first.socket_path)}})
        assert_refuses_to_start(same_socket, START_FAULT, str(first.socket_path))
        with connect(first.port()) as client:
            client.sendall(b"a" * 16)
            first.wait_for_total("durable_bytes", 16)


def test_a_control_socket_that_a_dead_daemon_left_is_no_obstacle(tmp_path: pathlib.Path) -> None:
    daemon = Daemon(tmp_path)
    with socket.socket(socket.AF_UNIX) as leftover:
        leftover.bind(str(daemon.socket_path))
    with daemon:
        assert daemon.stats()["active_connections"] == 0


def test_too_little_memory_for_the_buffers_is_said_before_anything_is_taken(tmp_path: pathlib.Path) -> None:
    daemon = Daemon(tmp_path, {"buffers": {"bytes": "1 TiB"}})
    assert_refuses_to_start(daemon, START_FAULT, "buffers")


def test_buffers_too_small_for_the_clients_are_a_fault_with_both_numbers(tmp_path: pathlib.Path) -> None:
    daemon = Daemon(tmp_path, {"buffers": {"bytes": "2 MiB"}, "server": {"max_clients": 1000}})
    assert_refuses_to_start(daemon, CONFIG_FAULT, "buffers.bytes", "2097152", "max_clients")


def test_few_descriptors_lower_the_limit_loudly(tmp_path: pathlib.Path) -> None:
    needs("prlimit")
    settings = {"server": {"max_clients": 5000}, "buffers": {"bytes": "64 MiB", "chunk_bytes": "4 KiB"}}
    with Daemon(tmp_path, settings, prefix=["prlimit", "--nofile=2000:2000"]) as daemon:
        assert daemon.log_contains("max_clients")
        with connect(daemon.port()) as client:
            client.sendall(b"a" * 16)
            daemon.wait_for_total("durable_bytes", 16)


def test_hardly_any_descriptors_are_a_clear_error_or_a_smaller_daemon(tmp_path: pathlib.Path) -> None:
    needs("prlimit")
    daemon = Daemon(tmp_path, prefix=["prlimit", "--nofile=40:40"])
    assert_refuses_to_start(daemon, START_FAULT, "descriptors")


@pytest.mark.root
def test_it_serves_without_root(tmp_path: pathlib.Path) -> None:
    with as_nobody(tmp_path) as daemon:
        with connect(daemon.port()) as client:
            client.sendall(b"a" * 16)
            daemon.wait_for_total("durable_bytes", 16)
        assert daemon.spool.stat().st_uid == int(NOBODY)


def test_check_config_says_fine_and_starts_nothing(tmp_path: pathlib.Path) -> None:
    daemon = Daemon(tmp_path)
    assert_is_checked(daemon)
    assert not daemon.spool.exists()


def as_nobody(tmp_path: pathlib.Path) -> Daemon:
    """A daemon that runs as another user, with a directory that this user may write."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    needs("setpriv")
    for parent in [tmp_path, *tmp_path.parents]:
        if parent.stat().st_mode & 0o005 != 0o005 and parent != pathlib.Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    home = tmp_path / "home"
    home.mkdir()
    daemon = Daemon(
        tmp_path,
        {"spool": {"path": str(home / "spool")}},
        prefix=["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"],
    )
    os.chown(home, int(NOBODY), int(NOBODY))
    return daemon


def test_a_file_in_the_place_of_the_control_socket_is_never_removed(tmp_path: pathlib.Path) -> None:
    precious = tmp_path / "precious.toml"
    precious.write_text("not a socket")
    daemon = Daemon(tmp_path, {"server": {"control_socket": str(precious)}})
    assert_refuses_to_start(daemon, START_FAULT, str(precious), "no socket")
    assert precious.read_text() == "not a socket"


def test_no_configuration_ends_a_daemon_that_runs(tmp_path: pathlib.Path) -> None:
    """What the parser itself stumbles over is refused like any other fault, by signal and by command."""
    with Daemon(tmp_path) as daemon, connect(daemon.port()) as client:
        good = daemon.config_path.read_text()
        for bad in ("x = " + "9" * 5000, "x = " + "[" * 100_000, "[server]\nworkers = 'two'", "\x00"):
            daemon.config_path.write_text(f"{bad}\n")
            assert daemon.ctl("reload", check=False).returncode == CONFIG_FAULT
        daemon.config_path.write_text(good)
        daemon.ctl("reload")
        client.sendall(b"a" * 160)
        daemon.wait_for_total("received_bytes", 160)
        assert daemon.log_contains("reload refused")


def test_the_first_lines_name_the_next_steps(tmp_path: pathlib.Path) -> None:
    with Daemon(tmp_path) as daemon:
        (line,) = daemon.log_lines("what to do next")
        assert "mpserverctl stats" in line
        assert f"--port {daemon.port()}" in line
        assert "mpserverctl streams" in line
