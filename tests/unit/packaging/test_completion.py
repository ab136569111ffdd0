"""Completions offer what the parsers accept, in bash, zsh and fish."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess

import pytest

from tests.unit.packaging.rendered import PARSERS, commands_of, option_names, render

every_program = pytest.mark.parametrize("program", PARSERS)
needs_fish = pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
needs_zsh = pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")


@pytest.fixture(scope="module")
def completions(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return render("completion", tmp_path_factory.mktemp("completion"))


def bash_offers(completions: pathlib.Path, *words: str) -> set[str]:
    """What bash offers for the last word."""
    quoted = " ".join(f"'{word}'" for word in words)
    script = f"""
        source '{completions}/bash/{words[0]}'
        COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}
        _{words[0]}
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-eu", "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return set(done.stdout.split())


def fish_offers(completions: pathlib.Path, *words: str) -> set[str]:
    script = f"source '{completions}/fish/{words[0]}.fish'; complete -C '{' '.join(words)}'"
    done = subprocess.run(["fish", "--no-config", "-c", script], capture_output=True, text=True, check=True)
    return {line.split("\t")[0] for line in done.stdout.splitlines()}


@every_program
def test_bash_offers_exactly_the_options_of_each_command(completions: pathlib.Path, program: str) -> None:
    for name, parser in commands_of(PARSERS[program]).items():
        offered = bash_offers(completions, *([program, name] if name else [program]), "-")
        wanted = option_names(parser)
        if program == "mpload" and not name:
            wanted |= option_names(commands_of(parser)["run"])
        assert offered == wanted, name


@every_program
def test_bash_offers_every_command(completions: pathlib.Path, program: str) -> None:
    names = set(commands_of(PARSERS[program])) - {""}
    assert {word for word in bash_offers(completions, program, "") if not word.startswith("-")} == names


def test_bash_knows_values_that_are_words_and_skips_those_of_options(completions: pathlib.Path) -> None:
    assert bash_offers(completions, "mpserverctl", "--socket", "stats", "export", "--format", "") == {
        "raw", "csv", "npy", "parquet",
    }  # fmt: skip
    assert bash_offers(completions, "mpserverctl", "loglevel", "d") == {"debug"}
    assert bash_offers(completions, "mpload", "--clients", "") == set()


def test_bash_completes_paths(completions: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "site.toml").touch()
    assert bash_offers(completions, "mpserverd", "--config", f"{tmp_path}/s") == {f"{tmp_path}/site.toml"}


@every_program
@needs_fish
def test_fish_offers_exactly_the_options_of_each_command(completions: pathlib.Path, program: str) -> None:
    for name, parser in commands_of(PARSERS[program]).items():
        if name:
            words = [program, name]
            wanted = option_names(parser) | option_names(PARSERS[program])
        else:
            words = [program]
            wanted = option_names(parser)
            if program == "mpload":
                wanted |= option_names(commands_of(parser)["run"])
        long = {word for word in fish_offers(completions, *words, "--") if word.startswith("--")}
        assert long == {option for option in wanted if option.startswith("--")}, name


@needs_fish
def test_fish_offers_commands_and_values(completions: pathlib.Path) -> None:
    assert fish_offers(completions, "mpserverctl", "st") == {"stats", "streams"}
    assert fish_offers(completions, "mpserverctl", "export --format ") == {"raw", "csv", "npy", "parquet"}


@every_program
@needs_zsh
def test_zsh_reads_the_file(completions: pathlib.Path, program: str) -> None:
    done = subprocess.run(
        ["zsh", "-n", completions / "zsh" / f"_{program}"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@every_program
def test_zsh_has_the_options_of_each_command(completions: pathlib.Path, program: str) -> None:
    text = (completions / "zsh" / f"_{program}").read_text()
    blocks = dict(
        re.findall(r"^            \(([\w-]+)\)\n((?:.+\n)+?)(?=^            \(|^        esac)", text, re.MULTILINE)
    )
    for name, parser in commands_of(PARSERS[program]).items():
        block = blocks[name] if name else text
        offered = set(re.findall(r"^ +'(?:\([^)]*\))?(-[-\w]+)\[", block, re.MULTILINE))
        assert offered >= option_names(parser)
        assert not name or offered == option_names(parser)
