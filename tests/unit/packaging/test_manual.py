"""Manual pages have every option, command, key, counter, reason and exit code, and render without a warning."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess

import pytest

from mpserverd.arena.counters import COUNTERS
from mpserverd.arena.state import CloseReason, RefuseReason
from mpserverd.cli import ctl, load
from mpserverd.config.options import OPTIONS
from mpserverd.version import VERSION
from tests.unit.packaging.rendered import PARSERS, commands_of, option_names, render

PAGES = {"mpserverd": "mpserverd.8", "mpserverctl": "mpserverctl.8", "mpload": "mpload.1"}
ALL = (*PAGES.values(), "mpserverd.toml.5", "mpserverd-protocol.7")
every_page = pytest.mark.parametrize("page", ALL)
every_program = pytest.mark.parametrize("program", PAGES)


@pytest.fixture(scope="module")
def manual(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return render("manual", tmp_path_factory.mktemp("manual"))


def plain(page: pathlib.Path) -> str:
    """The page without what makes it bold, words apart by one space."""
    text = re.sub(r"\\f[BIR]|^\.[A-Z]+ ?", "", page.read_text(), flags=re.MULTILINE)
    return " ".join(text.replace("\\-", "-").replace("\\&", "").replace("\\e", "\\").split())


def section_of(page: pathlib.Path, heading: str) -> str:
    """Roff between a .SH or .SS line and the next one of either kind."""
    found = re.search(rf"^\.S[HS] {re.escape(heading)}\n(.*?)(?=^\.S[HS] |\Z)", page.read_text(), re.M | re.S)
    assert found is not None, f"{page.name} has no section {heading}"
    return found[1]


def test_pages_are_those_that_are_promised(manual: pathlib.Path) -> None:
    assert {page.name for page in manual.iterdir()} == set(ALL)


@every_page
def test_no_placeholder_is_left_and_the_version_is_there(manual: pathlib.Path, page: str) -> None:
    text = (manual / page).read_text()
    assert not re.search(r"^@|@[A-Z]+@", text, re.MULTILINE)
    assert f'"mpserverd {VERSION}"' in text


@every_program
def test_page_has_the_options_of_its_program(manual: pathlib.Path, program: str) -> None:
    text = plain(manual / PAGES[program])
    for name, parser in commands_of(PARSERS[program]).items():
        for option in option_names(parser):
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", text), f"{name} {option}"


@pytest.mark.parametrize("program", ["mpserverctl", "mpload"])
def test_every_command_has_a_section_with_its_own_options(manual: pathlib.Path, program: str) -> None:
    common = option_names(PARSERS[program])
    for name, parser in commands_of(PARSERS[program]).items():
        if name:
            section = section_of(manual / PAGES[program], name).replace("\\-", "-")
            assert option_names(parser) - common <= set(re.findall(r"--?[a-z-]+", section)), name


@pytest.mark.parametrize(("program", "codes"), [("mpserverctl", ctl.EXIT_CODES), ("mpload", load.EXIT_CODES)])
def test_page_has_the_exit_codes(manual: pathlib.Path, program: str, codes: dict[int, str]) -> None:
    listed = re.findall(r"^\.TP\n\\fB(\d+)\\fR", section_of(manual / PAGES[program], "EXIT STATUS"), re.MULTILINE)
    assert [int(code) for code in listed] == list(codes)


def test_exit_codes_of_the_daemon_are_those_of_its_help(manual: pathlib.Path) -> None:
    listed = re.findall(r"^\.B (\d+)$", section_of(manual / "mpserverd.8", "EXIT STATUS"), re.MULTILINE)
    epilog = PARSERS["mpserverd"].epilog or ""
    assert set(re.findall(r"\b\d+\b", epilog)) <= set(listed)


def test_page_of_the_file_has_every_key_with_its_help(manual: pathlib.Path) -> None:
    text = plain(manual / "mpserverd.toml.5")
    for option in OPTIONS:
        assert f"{option.name} {option.help}" in text, option.key


def test_page_of_the_daemon_has_every_counter_and_reason(manual: pathlib.Path) -> None:
    text = plain(manual / "mpserverd.8")
    for counter in COUNTERS:
        assert f"{counter.role.value}.{counter.name} {counter.help}" in text, counter.name
    for reason in (*CloseReason, *RefuseReason):
        assert not reason or re.search(rf"\b{reason.word}\b", text), reason


@every_page
@pytest.mark.skipif(shutil.which("groff") is None, reason="needs groff")
def test_page_renders_without_a_warning(manual: pathlib.Path, page: str) -> None:
    command = ["groff", "-man", "-Tutf8", "-Kutf8", "-ww", "-rLL=80n", manual / page]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""


@every_page
@pytest.mark.skipif(shutil.which("mandoc") is None, reason="needs mandoc")
def test_mandoc_finds_nothing_to_mend(manual: pathlib.Path, page: str) -> None:
    done = subprocess.run(["mandoc", "-Tlint", manual / page], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
