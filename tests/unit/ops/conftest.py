"""A machine of files a test, and real shared tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from spool_writer import SpoolWriter

from tests.unit.arena.live_tables import Tables
from tests.unit.ops.fake_machine import Machine


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def tables() -> Iterator[Tables]:
    with Tables() as made:
        yield made


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[SpoolWriter]:
    with SpoolWriter(tmp_path / "source") as writer:
        yield writer
