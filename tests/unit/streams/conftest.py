"""A fresh spool a test, written by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from spool_writer import SpoolWriter


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[SpoolWriter]:
    with SpoolWriter(tmp_path / "spool") as writer:
        yield writer
