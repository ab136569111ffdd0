"""The packages, built once, and machines to install them on."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess

import pytest

from tests.integration.other_layout import give_another_layout
from tests.system.machine import ROOT, why_not

NEXT_VERSION_SUFFIX = "+next"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_not()
    if reason and os.environ.get("CI") and os.environ.get("MPSERVERD_TEST_SYSTEM") == "1":
        raise pytest.UsageError(f"the system tests may not be skipped here: {reason}")
    for item in items:
        if reason and pathlib.Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def debs() -> dict[str, pathlib.Path]:
    """Package files by package name. The unit tests are left out of the build."""
    environment = {**os.environ, "DEB_BUILD_OPTIONS": "nocheck"}
    command = [ROOT / "packaging" / "build_deb.sh"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    paths = [pathlib.Path(line) for line in done.stdout.split()]
    return {path.name.split("_")[0]: path for path in paths}


@pytest.fixture(scope="session")
def next_deb(debs: dict[str, pathlib.Path], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The daemon's package under a higher version, with its live memory laid out in another way."""
    tree = tmp_path_factory.mktemp("next") / "tree"
    subprocess.run(["dpkg-deb", "--raw-extract", debs["mpserverd"], tree], check=True)
    control = tree / "DEBIAN" / "control"
    text, count = re.subn(r"(?m)^(Version: .*)$", rf"\1{NEXT_VERSION_SUFFIX}", control.read_text())
    assert count == 1
    control.write_text(text)
    give_another_layout(tree / "usr/lib/python3/dist-packages/mpserverd")
    command = ["dpkg-deb", "--build", "--root-owner-group", "-Znone", tree, tree.parent]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return next(tree.parent.glob("*.deb"))


@pytest.fixture(scope="session")
def depends(debs: dict[str, pathlib.Path]) -> list[str]:
    """What the packages depend on, the first of alternatives."""
    found = set()
    for deb in debs.values():
        field = subprocess.run(["dpkg-deb", "-f", deb, "Depends"], capture_output=True, text=True, check=True).stdout
        found |= {re.split(r"[ |:(]", part.strip())[0] for part in field.split(",")}
    return sorted(found)
