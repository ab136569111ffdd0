"""Tests of the worker leave no descriptors behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    """A map has a descriptor of its own until it is collected, and a worker is a cycle; other tests count them."""
    yield
    gc.collect()
