"""An operator's first day: install, start, look, reload, break, upgrade, remove, purge, on a machine with real systemd.

The tests of this module share one machine and run in the order of the file; each leaves the daemon serving.
"""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator

import pytest

from mpserverd.log_ids import MessageId
from tests.system.machine import ROOT, Machine

UNIT = "mpserverd"
SEND = """
import hashlib, socket, sys
packets, stay = int(sys.argv[1]), len(sys.argv) > 2
content = b"".join(number.to_bytes(16, "little") for number in range(packets))
with socket.create_connection(("127.0.0.1", 8888)) as client:
    client.sendall(content)
    print(client.getsockname()[1], hashlib.sha256(content).hexdigest(), flush=True)
    if stay:
        sys.stdin.read()
    client.shutdown(socket.SHUT_WR)
    client.recv(1)
"""
"""A plain sender; not ours."""


@pytest.fixture(scope="module")
def machine(debs: dict[str, pathlib.Path], next_deb: pathlib.Path, depends: list[str]) -> Iterator[Machine]:
    with Machine([*debs.values(), next_deb], depends) as machine:
        machine.apt("install", f"/srv/{debs['mpserverd'].name}")
        machine.wait_until_serving()
        yield machine


def send(machine: Machine, packets: int) -> tuple[int, str]:
    """Local port of the sender and hash of what it sent, once the daemon has closed the connection."""
    done = machine.run("python3", "-c", SEND, str(packets))
    port, digest = done.stdout.split()
    return int(port), digest


def stream_of(machine: Machine, port: int) -> str:
    names = [stream["name"] for stream in machine.ctl("streams") if re.search(rf"\b{port}\b", stream["name"])]
    assert len(names) == 1, names
    return str(names[0])


def assert_serves(machine: Machine) -> None:
    """A plain client's packets are stored, and come back byte for byte."""
    port, digest = send(machine, 500)
    machine.wait_for(lambda: not any(stream["connected"] for stream in machine.ctl("streams")))
    stored = machine.sh(f"mpserverctl read {stream_of(machine, port)} --format raw | sha256sum").stdout.split()[0]
    assert stored == digest
    machine.run("mpserverctl", "check")


def set_config(machine: Machine, text: str) -> None:
    machine.write("/etc/mpserverd/conf.d/90-test.toml", text)


# -- install


def test_installs_without_build_dependencies_and_starts(machine: Machine) -> None:
    assert machine.show(UNIT, "ActiveState") == "active"
    assert machine.out("systemctl", "is-enabled", UNIT) == "enabled"
    installed = machine.out("dpkg-query", "-W", "-f", "${Package}\n").splitlines()
    assert not {"debhelper", "gcc", "python3-pip", "python3-setuptools", "python3-pytest"} & set(installed)


def test_first_packets_are_stored_and_read_back(machine: Machine) -> None:
    assert_serves(machine)


def test_user_group_and_directories_are_as_promised(machine: Machine) -> None:
    assert machine.out("id", "-nG", "_mpserverd") == "mpserverd"
    assert machine.out("stat", "-c", "%a %U %G", "/var/lib/mpserverd") == "750 _mpserverd mpserverd"
    assert machine.out("stat", "-c", "%a %U %G", "/run/mpserverd/control.sock") == "660 _mpserverd mpserverd"
    assert machine.out("ps", "-o", "user=", "-p", str(machine.main_pid())) in ("_mpserverd", "_mpserve+")


def test_shipped_file_is_a_conffile_and_is_fine(machine: Machine) -> None:
    assert "/etc/mpserverd/mpserverd.toml" in machine.out("dpkg-query", "-W", "-f", "${Conffiles}", UNIT)
    assert machine.out("mpserverd", "--check-config").startswith("configuration is fine")


def test_start_to_ready_takes_well_under_a_second(machine: Machine, record_property: pytest.RecordProperty) -> None:
    times_ms = []
    for _ in range(5):
        machine.run("systemctl", "stop", UNIT)
        script = "import subprocess, time; t = time.monotonic(); "
        script += "subprocess.run(['systemctl', 'start', 'mpserverd'], check=True); print(time.monotonic() - t)"
        times_ms.append(1000 * float(machine.python(script)))
    median_ms = statistics.median(times_ms)
    record_property("start_to_ready_ms", [round(each) for each in times_ms])
    print(f"systemctl start to ready: {', '.join(f'{each:.0f}' for each in times_ms)} ms, median {median_ms:.0f} ms")
    assert median_ms < 3000


# -- look


def test_stats_work_for_root_and_for_operators_and_not_for_others(machine: Machine) -> None:
    machine.run("useradd", "--groups", "mpserverd", "olga")
    machine.run("useradd", "stranger")
    for user in ("", "olga"):
        stats = machine.ctl("stats", user=user)
        assert stats["phase"] == "serving"
        assert stats["workers"] == 4
    refused = machine.run("mpserverctl", "stats", check=False, user="stranger")
    assert refused.returncode == 3
    assert "Traceback" not in refused.stderr
    assert re.match(r"mpserverctl: .*(permission|denied)", refused.stderr, re.IGNORECASE)


def test_operators_read_streams_and_others_do_not(machine: Machine) -> None:
    port, _ = send(machine, 10)
    machine.wait_for(lambda: any(re.search(rf"\b{port}\b", each["name"]) for each in machine.ctl("streams")))
    name = stream_of(machine, port)
    assert len(machine.run("mpserverctl", "read", name, user="olga").stdout.splitlines()) >= 10
    refused = machine.run("mpserverctl", "read", name, check=False, user="stranger")
    assert refused.returncode != 0
    assert "Traceback" not in refused.stderr


def test_operators_read_streams_while_the_daemon_is_stopped(machine: Machine) -> None:
    machine.run("systemctl", "stop", UNIT)
    assert machine.ctl("streams", user="olga")
    machine.run("systemctl", "start", UNIT)


def test_journal_explains_its_lines(machine: Machine) -> None:
    ready = machine.entries("-u", UNIT, f"MESSAGE_ID={MessageId.DAEMON_READY.value}")
    assert ready[-1]["_SYSTEMD_UNIT"] == "mpserverd.service"
    assert "raw=0.0.0.0:8888" in ready[-1]["LISTENERS"]
    assert "mps=0.0.0.0:8889" in ready[-1]["LISTENERS"]
    explained = machine.journal("-x", "-u", UNIT, f"MESSAGE_ID={MessageId.DAEMON_READY.value}")
    assert "Subject: mpserverd accepts connections" in explained
    assert "mpserverctl stats shows what arrives" in explained
    listed = machine.out("journalctl", "--list-catalog")
    assert {message_id.value for message_id in MessageId} <= {line.split()[0] for line in listed.splitlines()}


def test_journal_finds_the_lines_of_one_stream_and_of_one_reason(machine: Machine) -> None:
    port, _ = send(machine, 20)
    name = stream_of(machine, port)
    machine.wait_for(lambda: bool(machine.entries("-u", UNIT, f"STREAM={name}")), what="the line of the stream")
    ended = machine.entries("-u", UNIT, f"STREAM={name}", f"MESSAGE_ID={MessageId.CLIENT_ENDED.value}")
    assert len(ended) == 1
    assert ended[0]["REASON"] == "ended"
    assert name in machine.journal("-u", UNIT, "REASON=ended")


def test_status_line_tells_what_it_does(machine: Machine) -> None:
    assert re.search(r"\d+ clients, \d+ packets/s|serving", machine.show(UNIT, "StatusText"))


# -- reload


def test_reload_of_a_good_file_takes_effect_and_keeps_connections(machine: Machine) -> None:
    pid = machine.main_pid()
    client = machine.popen("python3", "-c", SEND, "100", "stay")
    try:
        port = int(client.stdout.readline().split()[0])
        set_config(machine, "[server]\nworkers = 2\n")
        machine.run("systemctl", "reload", UNIT)
        machine.wait_for(lambda: machine.ctl("stats")["workers"] == 2, what="two workers")
        assert machine.main_pid() == pid
        assert any(str(port) in json.dumps(each) for each in machine.ctl("clients"))
    finally:
        client.communicate("", timeout=30)
    assert client.returncode == 0


def test_reload_of_a_bad_file_fails_names_the_fault_and_changes_nothing(machine: Machine) -> None:
    pid = machine.main_pid()
    set_config(machine, "[server]\nwokers = 3\n")
    refused = machine.run("systemctl", "reload", UNIT, check=False)
    assert refused.returncode != 0
    assert 'did you mean "workers"?' in machine.journal("-u", UNIT, "-n", "20")
    machine.run("kill", "-HUP", str(pid))  # without the check before
    machine.wait_for(
        lambda: bool(machine.entries("-u", UNIT, f"MESSAGE_ID={MessageId.RELOAD_REFUSED.value}")),
        what="the refusal in the journal",
    )
    assert (machine.main_pid(), machine.ctl("stats")["workers"]) == (pid, 2)
    machine.run("rm", "/etc/mpserverd/conf.d/90-test.toml")
    machine.run("systemctl", "reload", UNIT)
    assert_serves(machine)


# -- break


def test_killed_supervisor_is_back_within_two_seconds_and_leaves_no_process(machine: Machine) -> None:
    before = machine.main_pid()
    old = set(machine.out("pgrep", "-u", "_mpserverd").split())
    started_s = time.monotonic()
    machine.run("kill", "-KILL", str(before))
    machine.wait_until_serving(not_pid=before)
    assert time.monotonic() - started_s < 2 * max(1.0, machine.slowness)
    assert not old & set(machine.out("pgrep", "-u", "_mpserverd").split())
    assert_serves(machine)


def test_hung_supervisor_is_replaced_by_the_watchdog(machine: Machine) -> None:
    drop_in = "/run/systemd/system/mpserverd.service.d/watchdog.conf"
    machine.write(drop_in, "[Service]\nWatchdogSec=2s\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", UNIT)
    before = machine.wait_until_serving()
    machine.run("kill", "-STOP", str(before))
    machine.wait_until_serving(not_pid=before)
    assert "watchdog" in machine.journal("-u", UNIT, "-n", "60").lower()
    assert_serves(machine)
    machine.run("rm", drop_in)
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", UNIT)


def test_wrong_file_at_the_start_is_named_and_the_unit_serves_once_it_is_right(machine: Machine) -> None:
    set_config(machine, "[spool]\nmax_bytes = -1\n")
    assert machine.run("systemctl", "restart", UNIT, check=False).returncode != 0
    assert "spool.max_bytes = -1" in machine.journal("-u", UNIT, "-n", "20")
    machine.run("rm", "/etc/mpserverd/conf.d/90-test.toml")
    machine.wait_until_serving()
    assert_serves(machine)


# -- confine


def test_exposure_is_at_most_that_of_the_best_peer(machine: Machine) -> None:
    assert exposure(machine) <= 1.2


def exposure(machine: Machine) -> float:
    text = machine.run("systemd-analyze", "security", "--no-pager", UNIT, check=False).stdout
    return float(re.search(r"Overall exposure level for \S+: ([\d.]+)", text)[1])  # type: ignore[index]


def test_host_without_outbound_connections_is_served_with_half_a_point(machine: Machine) -> None:
    example = "/usr/share/doc/mpserverd/examples/no-outbound"
    drop_in = "/etc/systemd/system/mpserverd.service.d"
    machine.sh(f"""
        install -D -m 644 {example}/no-outbound.conf {drop_in}/no-outbound.conf
        install -m 644 {example}/*.socket /etc/systemd/system/
        systemctl daemon-reload
        systemctl stop mpserverd
        systemctl enable --now mpserverd.socket mpserverd-mps.socket
        systemctl start mpserverd
    """)
    assert exposure(machine) <= 0.5
    assert_serves(machine)
    machine.run("systemctl", "restart", UNIT)
    assert_serves(machine)
    machine.sh(f"""
        systemctl stop mpserverd.socket mpserverd-mps.socket mpserverd
        systemctl disable mpserverd.socket mpserverd-mps.socket
        rm -r {drop_in} /etc/systemd/system/mpserverd.socket /etc/systemd/system/mpserverd-mps.socket
        systemctl daemon-reload
        systemctl start mpserverd
    """)
    assert_serves(machine)


# -- beside systemd


def test_rotated_log_file_is_opened_again(machine: Machine) -> None:
    machine.apt("install", "logrotate")
    set_config(machine, '[log]\ntarget = ["journal", "file"]\n')
    machine.run("systemctl", "restart", UNIT)
    log = "/var/log/mpserverd/mpserverd.log"
    machine.wait_for(lambda: machine.exists(log), what="the log file")
    machine.run("logrotate", "--force", "/etc/logrotate.d/mpserverd")
    assert machine.exists(f"{log}.1")
    port, _ = send(machine, 5)
    machine.wait_for(lambda: f":{port}" in machine.out("cat", log), what="a line in the new file")
    assert f":{port}" not in machine.out("cat", f"{log}.1")
    machine.run("rm", "/etc/mpserverd/conf.d/90-test.toml")
    machine.run("systemctl", "restart", UNIT)


def test_sysv_script_starts_reloads_and_stops(machine: Machine) -> None:
    machine.run("systemctl", "stop", UNIT)
    script = "/usr/share/doc/mpserverd/examples/sysv/mpserverd"
    assert machine.run(script, "status", check=False).returncode == 3
    machine.run(script, "start")
    assert "runs, pid" in machine.out(script, "status")
    assert "runs already" in machine.out(script, "start")
    assert_serves(machine)
    machine.run(script, "reload")
    set_config(machine, "[server]\nwokers = 3\n")
    assert machine.run(script, "reload", check=False).returncode == 1
    machine.run("rm", "/etc/mpserverd/conf.d/90-test.toml")
    assert_serves(machine)
    machine.run(script, "restart")
    assert_serves(machine)
    machine.run(script, "stop")
    assert machine.run(script, "status", check=False).returncode == 3
    assert machine.run("pgrep", "-u", "_mpserverd", check=False).returncode == 1
    machine.run("systemctl", "start", UNIT)
    assert_serves(machine)


def test_openrc_script_starts_reloads_and_stops(machine: Machine) -> None:
    machine.run("systemctl", "stop", UNIT)
    machine.apt("install", "openrc")
    machine.sh("""
        install -m 755 /usr/share/doc/mpserverd/examples/openrc/mpserverd /etc/init.d/mpserverd-openrc
        mkdir -p /run/openrc
        touch /run/openrc/softlevel
    """)
    machine.run("rc-service", "--nodeps", "mpserverd-openrc", "start")
    assert_serves(machine)
    machine.run("rc-service", "mpserverd-openrc", "reload")
    assert_serves(machine)
    machine.run("rc-service", "--nodeps", "mpserverd-openrc", "stop")
    assert machine.run("pgrep", "-u", "_mpserverd", check=False).returncode == 1
    machine.run("rm", "/etc/init.d/mpserverd-openrc")
    machine.apt("purge", "openrc")
    machine.run("systemctl", "start", UNIT)
    assert_serves(machine)


def test_limits_of_sessions_are_those_of_operators_only(machine: Machine) -> None:
    # a container has less to give than the file asks for, and pam_limits then gives nothing
    machine.sh("sed -i s/65536/4096/ /etc/security/limits.d/60-mpserverd.conf")
    assert machine.out("su", "-", "olga", "-c", "ulimit -n") == "4096"
    assert machine.out("su", "-", "stranger", "-c", "ulimit -n") != "4096"
    machine.sh("sed -i s/4096/65536/ /etc/security/limits.d/60-mpserverd.conf")


def test_kernel_settings_are_where_the_next_boot_finds_them(machine: Machine) -> None:
    found = machine.out("systemd-analyze", "cat-config", "sysctl.d/60-mpserverd.conf")
    assert "net.core.rmem_max = 134217728" in found
    assert "net.core.wmem_max = 134217728" in found


def test_completion_works_in_the_shell_of_the_machine(machine: Machine) -> None:
    machine.apt("install", "bash-completion", "fish")
    assert machine.out("fish", "-c", 'complete -C "mpserverctl st"').split()[0] == "stats"
    script = (
        "source /usr/share/bash-completion/bash_completion; _completion_loader mpserverctl; complete -p mpserverctl"
    )
    assert machine.out("bash", "-c", script) == "complete -F _mpserverctl mpserverctl"


def test_load_client_and_autopkgtests_pass(machine: Machine, debs: dict[str, pathlib.Path]) -> None:
    machine.apt("install", f"/srv/{debs['mpserverd-load'].name}")
    for test in ("serves", "load-client-alone"):
        machine.write(f"/srv/{test}", (ROOT / "debian" / "tests" / test).read_text())
        machine.sh(f"mkdir -p /tmp/{test}; cd /tmp/{test}; AUTOPKGTEST_TMP=/tmp/{test} sh /srv/{test}")
    machine.run("systemctl", "start", UNIT)


# -- upgrade, remove, purge


def test_upgrade_and_downgrade_keep_packets_and_settings(
    machine: Machine, debs: dict[str, pathlib.Path], next_deb: pathlib.Path
) -> None:
    port, digest = send(machine, 300)
    machine.wait_for(lambda: not any(stream["connected"] for stream in machine.ctl("streams")))
    name = stream_of(machine, port)
    set_config(machine, "[server]\nworkers = 3\n")
    for deb in (next_deb, debs["mpserverd"]):
        before = machine.main_pid()
        machine.run("dpkg", "-i", f"/srv/{deb.name}")
        machine.wait_until_serving(not_pid=before)
        assert machine.out("dpkg-query", "-W", "-f", "${Version}", UNIT) == deb.name.split("_")[1]
        assert machine.ctl("stats")["workers"] == 3
        assert machine.sh(f"mpserverctl read {name} --format raw | sha256sum").stdout.split()[0] == digest
        assert_serves(machine)


def test_remove_keeps_packets_and_install_finds_them_again(machine: Machine, debs: dict[str, pathlib.Path]) -> None:
    streams = {stream["name"] for stream in machine.ctl("streams")}
    machine.apt("remove", "mpserverd")
    assert machine.run("pgrep", "-u", "_mpserverd", check=False).returncode == 1
    assert not machine.exists("/run/mpserverd")
    assert machine.exists("/var/lib/mpserverd/catalog.sqlite")
    assert machine.exists("/etc/mpserverd/mpserverd.toml")
    machine.apt("install", f"/srv/{debs['mpserverd'].name}")
    machine.wait_until_serving()
    assert {stream["name"] for stream in machine.ctl("streams")} >= streams
    assert_serves(machine)


def test_purge_leaves_nothing(machine: Machine) -> None:
    machine.apt("purge", "mpserverd", "mpserverd-load")
    left = machine.run(
        "find", "/", "-xdev", "(", "-path", "/srv", "-o", "-path", "/var/log/journal", "-o", "-path", "/proc", ")",
        "-prune", "-o", "-name", "*mpserverd*", "-print",
        check=False,
    ).stdout.split()  # fmt: skip
    assert left == []
    for database in ("passwd", "group"):
        assert "mpserverd" not in machine.out("getent", database)
    assert machine.run("pgrep", "mpserverd", check=False).returncode == 1
    assert machine.run("systemctl", "is-failed", UNIT, check=False).stdout.strip() == "inactive"


# -- what lintian says


def test_lintian_finds_nothing_that_is_not_explained(debs: dict[str, pathlib.Path]) -> None:
    changes = next(debs["mpserverd"].parent.glob("*.changes"))
    done = subprocess.run(
        [str(shutil.which("lintian")), "-I", "-E", "--pedantic", "--allow-root", "--fail-on=none", changes],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/tmp", "LC_ALL": "C.UTF-8"},
    )
    found = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("running with root")]
    assert found == []


def test_every_override_has_a_reason() -> None:
    for path in (ROOT / "debian").glob("*lintian-overrides"):
        reason = False
        for line in path.read_text().splitlines():
            assert line.startswith("#") or reason, f"{path.name}: {line}"
            reason = line.startswith("#")
