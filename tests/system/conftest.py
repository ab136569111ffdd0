"""The packages, built once, and machines to install them on."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess

import pytest

from tests.system.machine import ROOT, why_not

NEXT_VERSION_SUFFIX = "+next"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_not()
    for item in items:
        if reason and pathlib.Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


def build(version: str = "") -> dict[str, pathlib.Path]:
    """Package files by package name. The unit tests are left out of the build."""
    environment = {**os.environ, "DEB_BUILD_OPTIONS": "nocheck"}
    command = [ROOT / "packaging" / "build_deb.sh", *([version] if version else [])]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    paths = [pathlib.Path(line) for line in done.stdout.split()]
    return {path.name.split("_")[0]: path for path in paths}


@pytest.fixture(scope="session")
def debs() -> dict[str, pathlib.Path]:
    return build()


@pytest.fixture(scope="session")
def next_debs(debs: dict[str, pathlib.Path]) -> dict[str, pathlib.Path]:
    """The same program under a higher version."""
    version = debs["mpserverd"].name.split("_")[1]
    return build(version + NEXT_VERSION_SUFFIX)


@pytest.fixture(scope="session")
def depends(debs: dict[str, pathlib.Path]) -> list[str]:
    """What the packages depend on, the first of alternatives."""
    found = set()
    for deb in debs.values():
        field = subprocess.run(["dpkg-deb", "-f", deb, "Depends"], capture_output=True, text=True, check=True).stdout
        found |= {re.split(r"[ |:(]", part.strip())[0] for part in field.split(",")}
    return sorted(found)
