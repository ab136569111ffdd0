"""doctor, support-bundle and backup beside a real daemon, under load; plan and its settings with the real program."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import socket
import sqlite3
import subprocess
import tarfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.integration.driver import BIN, Daemon, connect
from tests.integration.oracle import api_bytes
from tests.integration.senders import payload

EXACT = {"listener": {"on_full": "block"}}
RETIRING = {**EXACT, "spool": {"segment_bytes": "64 KiB", "max_bytes": "2 MiB"}, "buffers": {"chunk_bytes": "4 KiB"}}
NAMED = {"client": [{"id": "press-7", "address": "127.0.0.7"}]}


class Feed:
    """Sends reproducible packets over several connections until told to stop; ``sent`` is what each one sent."""

    def __init__(self, port: int, sources: Sequence[str]) -> None:
        self._stop = threading.Event()
        self.contents = [payload(10 + number, 1 << 20) for number in range(len(sources))]
        self.sent_bytes = [0] * len(sources)
        self._threads = [
            threading.Thread(target=self._send, args=(number, connect(port, source=source)))
            for number, source in enumerate(sources)
        ]

    def _send(self, number: int, client: socket.socket) -> None:
        content, at = self.contents[number], 0
        with client:
            while not self._stop.wait(0.002):
                piece = content[at : at + 16 * 804]
                client.sendall(piece)
                self.sent_bytes[number] += len(piece)
                at = (at + len(piece)) % len(content)

    def expected(self, number: int, first: int, end: int) -> bytes:
        content = self.contents[number]
        times = end // len(content) + 1
        return (content * times)[first:end]

    def __enter__(self) -> Feed:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def ctl(*words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """mpserverctl without a daemon."""
    answer = subprocess.run([BIN / "mpserverctl", *map(str, words)], capture_output=True, text=True, check=False)
    assert not check or answer.returncode == 0, f"{words}: {answer.returncode}\n{answer.stdout}{answer.stderr}"
    return answer


def rows(spool: pathlib.Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(ctl("--json", "streams", "--spool", spool).stdout)}


# -- backup


def test_a_backup_under_load_is_a_verified_spool_with_exactly_what_was_sent(tmp_path: pathlib.Path) -> None:
    copy = tmp_path / "copy"
    with Daemon(tmp_path, {**EXACT, **NAMED}) as daemon:
        with Feed(daemon.port(), ["127.0.0.7", "127.0.0.8"]) as feed:
            daemon.wait_for(lambda: daemon.account("durable_bytes") > 3 << 20)
            first = daemon.ctl_json("backup", "--output", str(copy))
            daemon.wait_for(lambda: daemon.account("durable_bytes") > 6 << 20)
            daemon.wait_for(lambda: any(row["sha256"] for row in sealed(daemon.spool)), what="a checksum")
            second = daemon.ctl_json("backup", "--output", str(copy))
        daemon.wait_until_quiet()
        daemon.ledger()
    assert first["fine"] and second["fine"]
    assert first["streams"] == second["streams"] == 2
    assert second["kept_segments"] > 0
    assert second["copied_bytes"] < rows_bytes(copy)
    copied = rows(copy)
    assert not any(row["connected"] for row in copied.values())
    for name, row in copied.items():
        number = 0 if name == "press-7" else 1
        content = api_bytes(copy, name)
        assert len(content) == row["durable_offset"] > 1 << 20
        assert content == feed.expected(number, 0, len(content))
    assert ctl("verify", "--spool", copy).returncode == 0
    assert_no_second_names(copy)


def test_a_backup_survives_retention_that_takes_files_away_meanwhile(tmp_path: pathlib.Path) -> None:
    with Daemon(tmp_path, {**RETIRING, **NAMED}) as daemon:
        with Feed(daemon.port(), ["127.0.0.7", "127.0.0.8"]) as feed:
            daemon.wait_for(lambda: daemon.account("retired_bytes") > 1 << 20, what="retention")
            for number in range(6):
                copy = tmp_path / f"copy-{number % 2}"
                report = daemon.ctl_json("backup", "--output", str(copy))
                assert report["fine"], report
                content = api_bytes(copy, "press-7")
                row = rows(copy)["press-7"]
                assert content == feed.expected(0, row["first_offset"], row["durable_offset"])
        daemon.wait_until_quiet()


def test_a_daemon_goes_on_from_a_backup(tmp_path: pathlib.Path) -> None:
    copy, content = tmp_path / "copy", payload(3, 16 * 5000)
    with Daemon(tmp_path, {**EXACT, **NAMED}) as daemon:
        with connect(daemon.port(), source="127.0.0.7") as client:
            client.sendall(content)
            daemon.wait_for_total("durable_bytes", len(content))
            daemon.ctl("backup", "--output", str(copy))
        daemon.wait_until_quiet()
    (tmp_path / "second").mkdir()
    with Daemon(tmp_path / "second", {**EXACT, **NAMED, "spool": {"path": str(copy)}}) as daemon:
        with connect(daemon.port(), source="127.0.0.7") as client:
            client.sendall(content)
        daemon.wait_until_quiet()
        daemon.wait_for_total("durable_bytes", 2 * len(content))
        refused = daemon.ctl("backup", "--spool", str(daemon.spool), "--output", str(copy), check=False)
        assert refused.returncode == 2
    assert api_bytes(copy, "press-7") == content * 2


def test_a_backup_is_refused_where_a_daemon_keeps_its_spool(tmp_path: pathlib.Path) -> None:
    (tmp_path / "other").mkdir()
    with Daemon(tmp_path) as daemon, Daemon(tmp_path / "other") as other:
        answer = daemon.ctl("backup", "--output", str(other.spool), check=False)
        assert answer.returncode == 1
        assert "in use by a daemon" in answer.stderr


def sealed(spool: pathlib.Path) -> list[dict[str, Any]]:
    with contextlib.closing(sqlite3.connect(f"file:{spool}/catalog.sqlite?mode=ro", uri=True)) as catalog:
        return [{"sha256": row[0]} for row in catalog.execute("SELECT sha256 FROM segment WHERE state = 'sealed'")]


def rows_bytes(spool: pathlib.Path) -> int:
    return sum(row["held_bytes"] for row in rows(spool).values())


def assert_no_second_names(spool: pathlib.Path) -> None:
    for path in spool.rglob("*.seg"):
        assert path.stat().st_nlink == 1, path


# -- doctor


def doctor(daemon: Daemon, *words: str) -> tuple[int, dict[str, list[dict[str, str]]]]:
    """Exit code, and findings by check."""
    answer = daemon.ctl("--json", "doctor", *words, check=False)
    report = json.loads(answer.stdout)
    found: dict[str, list[dict[str, str]]] = {}
    for finding in report["findings"]:
        found.setdefault(finding["check"], []).append(finding)
    return answer.returncode, found


def levels(found: dict[str, list[dict[str, str]]], check: str) -> set[str]:
    return {finding["level"] for finding in found[check]}


def test_the_doctor_finds_no_fault_with_a_healthy_daemon(tmp_path: pathlib.Path) -> None:
    with Daemon(tmp_path, EXACT) as daemon:
        with connect(daemon.port()) as client:
            client.sendall(payload(1, 16_000))
            daemon.wait_for_total("durable_bytes", 16_000)
            code, found = doctor(daemon, "--probe")
        daemon.wait_until_quiet()
        assert (code, [f for fs in found.values() for f in fs if f["level"] == "fault"]) == (0, [])
        for check in ("configuration", "daemon", "ports", "storer", "ledger", "swap", "memory", "descriptors"):
            assert levels(found, check) == {"ok"}, found[check]
        assert "bytes/s" in found["disk speed"][0]["text"]
        assert any("a connection from here took" in finding["text"] for finding in found["ports"])
        assert not list(daemon.spool.glob(".doctor-*"))
        text = daemon.ctl("doctor").stdout
        assert text.rstrip().endswith("ok")


def test_the_doctor_reads_the_limit_of_the_running_daemon(tmp_path: pathlib.Path) -> None:
    settings = {"server": {"max_clients": 64}, "buffers": {"bytes": "16 MiB"}}
    with Daemon(tmp_path, settings, prefix=["prlimit", "--nofile=600:600"]) as daemon:
        code, found = doctor(daemon)
        assert code == 1
        assert levels(found, "descriptors") == {"fault"}
        assert "may open 600 files, 64 clients need 1,216" in found["descriptors"][0]["text"]


def test_the_doctor_names_what_a_reload_would_change(tmp_path: pathlib.Path) -> None:
    with Daemon(tmp_path) as daemon:
        daemon.settings["server"]["workers"] = 1
        daemon.write_config()
        _, found = doctor(daemon)
        assert "server.workers" in found["configuration"][0]["text"]
        daemon.config_path.write_text("[server]\nworkerz = 2\n")
        code, found = doctor(daemon)
        assert code == 1
        assert "workerz" in found["configuration"][0]["text"]
        daemon.write_config()


def test_the_doctor_sees_a_listener_that_turns_everybody_away(tmp_path: pathlib.Path) -> None:
    with Daemon(tmp_path, {"listener": {"deny": ["127.0.0.0/8"]}}) as daemon:
        _, found = doctor(daemon, "--probe")
        assert any("closed at once" in finding["text"] for finding in found["ports"])


def test_the_doctor_sees_a_packet_size_that_the_bytes_contradict(tmp_path: pathlib.Path) -> None:
    with Daemon(tmp_path, {"listener": {"packet_size": 32, "on_full": "block"}}) as daemon:
        for number in range(6):
            with connect(daemon.port()) as client:
                client.sendall(payload(number, 16 * (2 * number + 3)))
        daemon.wait_until_served(6)
        code, found = doctor(daemon)
    assert code == 1
    assert "clients seem to send packets of 16 bytes" in found["packet size"][0]["text"]


def test_the_doctor_names_who_holds_a_port(tmp_path: pathlib.Path) -> None:
    config = tmp_path / "mpserverd.toml"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config.write_text(
            f'[[listener]]\naddress = "127.0.0.1:{taken.getsockname()[1]}"\n'
            f'[server]\ncontrol_socket = "{tmp_path}/control.sock"\n[spool]\npath = "{tmp_path}/spool"\n'
        )
        answer = ctl("--json", "doctor", "--config", config, check=False)
    assert answer.returncode == 1
    finding = next(one for one in json.loads(answer.stdout)["findings"] if one["check"] == "ports")
    assert finding["level"] == "fault"
    assert f"(pid {os.getpid()})" in finding["text"]


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize(
    ("options", "check", "words"),
    [
        ("size=1m,ro", "file system", "mounted read-only"),
        ("size=8m", "file system", "tmpfs is memory"),
        ("size=8m", "disk space", "8,388,608 bytes are free, spool.min_free_bytes is 1,073,741,824"),
    ],
)
def test_the_doctor_sees_what_is_wrong_with_the_disk(
    tmp_path: pathlib.Path, options: str, check: str, words: str
) -> None:
    spool, config = tmp_path / "spool", tmp_path / "mpserverd.toml"
    spool.mkdir()
    config.write_text(f'[server]\ncontrol_socket = "{tmp_path}/control.sock"\n[spool]\npath = "{spool}"\n')
    script = f"mount -t tmpfs -o {options} none {spool} && exec {BIN}/mpserverctl --json doctor --config {config}"
    answer = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, check=False)
    if "mount" in answer.stderr:
        pytest.skip(f"mounts are not allowed here: {answer.stderr.strip()}")
    assert answer.returncode == 1, answer.stderr
    found = [one for one in json.loads(answer.stdout)["findings"] if one["check"] == check]
    assert found[0]["level"] == "fault"
    assert words in found[0]["text"]


# -- support-bundle

SECRETS = ("hunter2-token", "s3cr3t-redis", "k3y-material", "pl41n-password", "bearer-abcdef123", "h4sh-of-token")


@pytest.fixture
def bundle_path(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    yield tmp_path / "bundle.tar.gz"


def unpacked(path: pathlib.Path) -> dict[str, str]:
    with tarfile.open(path) as archive:
        return {
            member.name.partition("/")[2]: content.read().decode()
            for member in archive.getmembers()
            if (content := archive.extractfile(member)) is not None
        }


def test_a_bundle_of_a_running_daemon_has_everything_and_no_packet(
    tmp_path: pathlib.Path, bundle_path: pathlib.Path
) -> None:
    content = hashlib.sha256(b"packet").hexdigest().encode() * 16
    with Daemon(tmp_path, {**EXACT, **NAMED, "log": {"target": ["stderr"]}}) as daemon:
        with connect(daemon.port(), source="127.0.0.7") as client:
            client.sendall(content)
            daemon.wait_for_total("durable_bytes", len(content))
            daemon.ctl("support-bundle", "--output", str(bundle_path))
            named = tmp_path / "named.tar.gz"
            daemon.ctl("support-bundle", "--output", str(named), "--names")
        daemon.wait_until_quiet()
    members = unpacked(bundle_path)
    manifest = json.loads(members["MANIFEST.json"])
    assert set(manifest["left_out"]) <= {"log.txt"}
    assert json.loads(members["stats.json"])["total_bytes"] == len(content)
    assert json.loads(members["clients.json"])["count"] == 1
    assert json.loads(members["ledger.json"])["holds"]
    processes = json.loads(members["processes.json"])
    assert set(processes) == {"supervisor", "worker-0", "worker-1", "storer"}
    assert "Max open files" in processes["supervisor"]["limits"]
    assert "press-7" not in members["catalog.json"]
    assert "press-7" in unpacked(named)["catalog.json"]
    assert content[:32].decode() not in "".join(members.values())
    assert bundle_path.stat().st_mode & 0o777 == 0o600
    assert bundle_path.stat().st_size < 1 << 20


def test_a_bundle_without_a_daemon_says_what_is_missing_and_has_no_secret(
    tmp_path: pathlib.Path, bundle_path: pathlib.Path
) -> None:
    token, redis, key, password, bearer, hashed = SECRETS
    log = tmp_path / "mpserverd.log"
    log.write_text(
        f"INFO started url=redis://user:{password}@db:6379/0\n"
        f'ERROR reload refused: monitor.token = "{token}": unknown key\n'
        f"DEBUG Authorization: Bearer {bearer}\n"
        f"INFO key {key} read\n"
    )
    config = tmp_path / "mpserverd.toml"
    config.write_text(
        f'[server]\nworkers = 3\ncontrol_socket = "{tmp_path}/control.sock"\n[spool]\npath = "{tmp_path}/spool"\n'
        f'[monitor]\ntoken = "{token}"\nredis_url = "redis://:{redis}@db/0"\n'
        f'[[listener]]\ntokens = ["{hashed}"]\ntls_key = "{key}"\n'
        f'[[sink]]\nname = "x"\nurl = "nats://u:{password}@n"\n'
    )
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "torn.toml").write_text(f'[log]\ntarget = ["file"\npassword = "{password}"\n')
    ctl("support-bundle", "--config", config, "--output", bundle_path)
    members = unpacked(bundle_path)
    left_out = json.loads(members["MANIFEST.json"])["left_out"]
    assert {"stats.json", "ledger.json", "clients.json", "events.json"} <= set(left_out)
    settings = json.loads(members["config.json"])[str(config)]
    assert settings["server"]["workers"] == 3
    assert settings["monitor"]["token"] == "(masked)"
    assert settings["listener"][0]["tokens"] == "(masked)"
    everything = "".join(members.values())
    for secret in SECRETS:
        assert secret not in everything, secret


def test_secrets_in_the_log_file_are_cut_out(tmp_path: pathlib.Path, bundle_path: pathlib.Path) -> None:
    token, redis, key, password, bearer, _ = SECRETS
    log, config = tmp_path / "mpserverd.log", tmp_path / "mpserverd.toml"
    log.write_text(
        f"INFO started url=redis://user:{password}@db:6379/0 redis_password={redis}\n"
        f'ERROR reload refused: monitor.token = "{token}": unknown key\n'
        f"DEBUG Authorization: Bearer {bearer}\n"
        f"-----BEGIN PRIVATE KEY-----\n{key}\n-----END PRIVATE KEY-----\nINFO the last line\n"
    )
    config.write_text(
        f'[server]\ncontrol_socket = "{tmp_path}/control.sock"\n[spool]\npath = "{tmp_path}/spool"\n'
        f'[log]\ntarget = ["file"]\nfile = "{log}"\n'
    )
    ctl("support-bundle", "--config", config, "--output", bundle_path)
    text = unpacked(bundle_path)["log.txt"]
    assert "INFO the last line" in text
    for secret in (token, redis, key, password, bearer):
        assert secret not in text, secret


# -- plan


@pytest.mark.parametrize("clients", [1, 10, 1000, 10_000])
@pytest.mark.parametrize("size", [1, 16, 65_536])
def test_the_settings_of_a_plan_are_accepted_by_the_daemon(tmp_path: pathlib.Path, clients: int, size: int) -> None:
    words = ["--clients", clients, "--rate", 10_050 if size < 1000 else 1, "--size", size, "--days", 2]
    report = json.loads(ctl("--json", "plan", *words).stdout)
    config = tmp_path / "mpserverd.toml"
    config.write_text(report["toml"])
    answer = subprocess.run(
        [BIN / "mpserverd", "--config", config, "--check-config"], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
