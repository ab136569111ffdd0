"""The journal's catalog explains each number of the log, and journalctl takes it."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess

import pytest

from mpserverd.log_ids import MessageId

ROOT = pathlib.Path(__file__).resolve().parents[3]
CATALOG = ROOT / "packaging" / "catalog" / "mpserverd.catalog"

Entry = tuple[dict[str, str], str]


def entries() -> dict[str, Entry]:
    """Headers and text by number."""
    found = {}
    for part in re.split(r"^-- ", CATALOG.read_text(), flags=re.MULTILINE)[1:]:
        number, _, rest = part.partition("\n")
        head, _, text = rest.partition("\n\n")
        found[number] = (dict(line.split(": ", 1) for line in head.splitlines()), text.strip())
    return found


def test_every_number_of_the_log_has_an_entry_and_no_other() -> None:
    assert sorted(entries()) == sorted(each.value for each in MessageId)


@pytest.mark.parametrize("message_id", MessageId, ids=lambda each: each.name)
def test_entry_says_what_happened_what_it_means_and_what_to_do(message_id: MessageId) -> None:
    headers, text = entries()[message_id.value]
    assert headers["Subject"] and headers["Defined-By"] == "mpserverd"
    assert len(text) > 80
    quiet = {"STATUS_SUMMARY", "CHILD_STARTED", "CLIENT_CONNECTED", "CLIENT_KICKED", "ARENA_RELIEVED"}
    assert message_id.name in quiet or "\nNext: " in text


def test_lines_fit_a_terminal() -> None:
    assert max(len(line) for line in CATALOG.read_text().splitlines() if not line.startswith("#")) <= 78


@pytest.mark.skipif(shutil.which("journalctl") is None, reason="needs journalctl (package systemd)")
def test_journalctl_takes_the_catalog(tmp_path: pathlib.Path) -> None:
    shipped = tmp_path / "usr/lib/systemd/catalog"
    for directory in (shipped, tmp_path / "var/lib/systemd/catalog"):
        directory.mkdir(parents=True)
    shutil.copy(CATALOG, shipped)
    command = ["journalctl", f"--root={tmp_path}"]
    made = subprocess.run([*command, "--update-catalog"], capture_output=True, text=True, check=True)
    assert made.stderr == ""
    listed = subprocess.run([*command, "--list-catalog"], capture_output=True, text=True, check=True).stdout
    assert {line.split()[0] for line in listed.splitlines()} == {each.value for each in MessageId}
