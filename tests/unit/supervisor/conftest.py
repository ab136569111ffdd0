"""A core of small tables, as the supervisor makes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from mpserverd.config.schema import BuffersConfig, Config, ServerConfig
from mpserverd.supervisor.core import Core
from mpserverd.supervisor.making_core import make_core

CHUNK_BYTES = 4096
CHUNKS = 64


@pytest.fixture
def core() -> Iterator[Core]:
    buffers = BuffersConfig(bytes=CHUNKS * CHUNK_BYTES, chunk_bytes=CHUNK_BYTES)
    made = make_core(Config(server=dataclasses.replace(ServerConfig(), max_clients=4), buffers=buffers))
    yield made
    made.close()
