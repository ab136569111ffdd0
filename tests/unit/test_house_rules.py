"""Rules that hold for the whole tree: who may import whom, how shared words are written, what no file may say."""

from __future__ import annotations

import ast
import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mpserverd"

LEVELS = (
    {"cli", "compat"},
    {"ops"},
    {"supervisor", "worker", "storer", "forward", "monitor", "load"},
    {"net", "streams", "arena", "client"},
    {"protocol", "control", "config", "log", "log_ids", "log_targets", "log_text", "systemd"},
    {"errors", "limits", "version"},
)
"""Imports go down or stay on their level. ``PROCESSES`` do not know each other."""
PROCESSES = LEVELS[2]

MODULES = sorted(PACKAGE.rglob("*.py"))


def part_of(module: str) -> str | None:
    """``mpserverd.net.channel`` is of the part ``net``."""
    names = module.split(".")
    return names[1] if names[0] == "mpserverd" and len(names) > 1 else None


def imported_parts(path: pathlib.Path) -> set[str]:
    """The parts of this project that a module imports anywhere, imports inside functions included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "mpserverd" else [f"mpserverd.{alias.name}" for alias in node.names]
        found |= {part for name in names if (part := part_of(name)) is not None}
    return found


def level_of(part: str) -> int:
    for level, parts in enumerate(LEVELS):
        if part in parts:
            return level
    raise AssertionError(f"{part} is new: put it on one of the LEVELS of this test and of the README")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: pathlib.Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for part in imported_parts(path) - {own}:
        assert level_of(part) >= level_of(own), f"{own} imports {part}, which is above it"
        assert not {own, part} <= PROCESSES, f"{own} imports {part}; process packages do not know each other"


def test_shared_words_are_never_packed_in_place() -> None:
    """struct.pack_into zeroes the place first, and other processes see that."""
    for path in MODULES:
        assert not re.search(r"\bpack_into\s*\(", path.read_text()), path


def test_no_file_names_a_place_of_some_machine() -> None:
    """Paths of a home or work directory, and hosts of package registries."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout: what belongs to the tree is not known")
    places = r"/(root|home)/[a-z]|/work" + r"/|pypi\.(org|io)|files\.pythonhosted|registry\.npmjs"
    answer = subprocess.run(
        ["git", "grep", "-nIE", places, "--", ":!tests/unit/test_house_rules.py"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert answer.returncode == 1, answer.stdout + answer.stderr


def test_every_module_says_what_it_is_for() -> None:
    for path in MODULES:
        tree = ast.parse(path.read_text())
        assert not tree.body or ast.get_docstring(tree), f"{path} has no docstring"
