"""Fixtures of the storer's tests."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.unit.storer.rig import Rig

RigMaker = Callable[..., Rig]


@pytest.fixture
def make_rig(tmp_path: pathlib.Path) -> Iterator[RigMaker]:
    """Rigs that are closed at the end of the test."""
    rigs: list[Rig] = []

    def make(path: pathlib.Path | None = None, **settings: Any) -> Rig:
        rigs.append(Rig(path or tmp_path, **settings))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture
def rig(make_rig: RigMaker) -> Rig:
    return make_rig()
