"""The commands for an installation as an operator types them: text, JSON, exit codes, faults in one line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from spool_writer import SpoolWriter, noise

from mpserverd.cli import ctl, ops_commands


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "c.toml"
    path.write_text(
        f'[server]\ncontrol_socket = "{tmp_path}/c.sock"\n[spool]\npath = "{tmp_path}"\nmin_free_bytes = "512 TiB"\n'
    )
    return path


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = ctl.main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_doctor_says_the_worst_first_and_exits_1_with_a_fault(
    capsys: pytest.CaptureFixture[str], config: Path
) -> None:
    code, out, err = run(capsys, "doctor", "--config", config)
    assert (code, err) == (1, "")
    lines = out.splitlines()
    assert lines[0].startswith("FAULT")
    assert lines[1].lstrip().startswith("-> ")
    assert " fault" in lines[-1]
    code, out, _ = run(capsys, "--json", "doctor", "--config", config)
    assert code == 1
    assert json.loads(out)["fine"] is False


def test_on_a_terminal_findings_are_broken_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    finding = {"check": "disk space", "level": "warning", "text": "word " * 40, "command": "type " * 30}
    counts = {"fault": 0, "warning": 1, "note": 0, "ok": 0}
    out = Terminal()
    ops_commands._print_findings({"findings": [finding], "counts": counts}, out)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.count("word") for line in lines) == 40
    plain = io.StringIO()
    ops_commands._print_findings({"findings": [finding], "counts": counts}, plain)
    assert len(plain.getvalue().splitlines()) == 4


def test_tune_names_every_setting_with_its_reason(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    code, out, err = run(capsys, "tune", "--config", config)
    assert code in {0, 1}
    assert err == ""
    assert "net.core.rmem_max: the kernel's own" in out
    report = json.loads(run(capsys, "--json", "tune", "--config", config)[1])
    assert [row["name"] for row in report["settings"]][:2] == ["net.core.rmem_max", "net.core.wmem_max"]
    assert report["applied"] == []


def test_a_plan_ends_with_settings_to_paste(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("plan", "--clients", 10, "--rate", 10050, "--size", 16, "--days", 30)
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert "disk for 30 days" in out
    assert out.endswith(json.loads(run(capsys, "--json", *words)[1])["toml"])


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("plan", "--clients", 0, "--rate", 1, "--size", 16, "--days", 1), "--clients 0 must be from 1"),
        (("plan", "--clients", 1, "--rate", "nan", "--size", 16, "--days", 1), "--rate nan must be from"),
        (("plan", "--clients", 1), "required"),
        (("backup",), "--output"),
        (("support-bundle",), "--output"),
    ],
)
def test_what_makes_no_sense_is_one_line_and_exits_2(
    capsys: pytest.CaptureFixture[str], words: tuple[Any, ...], text: str
) -> None:
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert text in err
    assert len(err.splitlines()) == 1


def test_a_backup_says_what_it_did_and_exits_1_when_the_copy_is_damaged(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with SpoolWriter(tmp_path / "spool") as spool:
        stream = spool.add("a", noise(3200), cuts=[1600])
        words = ("backup", "--spool", spool.path, "--output")
        code, out, _ = run(capsys, *words, tmp_path / "copy")
        assert code == 0
        assert "1 stream of" in out
        assert out.endswith("the copy is verified\n")
        spool.segment_paths(stream)[0].write_bytes(bytes(1600))
        code, out, _ = run(capsys, *words, tmp_path / "other")
        assert code == 1
        assert out.endswith("the copy is DAMAGED\n")
        assert json.loads(run(capsys, "--json", *words, tmp_path / "third")[1])["fine"] is False


def test_a_place_that_cannot_be_written_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, config: Path
) -> None:
    (tmp_path / "file").write_text("")
    with SpoolWriter(tmp_path / "spool") as spool:
        code, _, err = run(capsys, "backup", "--spool", spool.path, "--output", tmp_path / "file" / "x")
    assert code == 1
    assert err == f"mpserverctl: {tmp_path}/file/x: Not a directory\n"
    code, _, err = run(capsys, "support-bundle", "--config", config, "--output", tmp_path / "none" / "x.tar.gz")
    assert code == 1
    assert "No such file or directory" in err


def test_an_unknown_stream_of_a_backup_names_the_nearest(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with SpoolWriter(tmp_path / "spool") as spool:
        spool.add("press-7", noise(160))
        code, _, err = run(capsys, "backup", "--spool", spool.path, "--output", tmp_path / "copy", "press-8")
    assert code == 1
    assert "the nearest is press-7" in err
