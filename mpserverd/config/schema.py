"""The settings: frozen objects that are passed down to whoever needs them.

They hold what was read and checked (config/build.py), with every default filled in from the option table. Nothing here
reads a file, a clock or an environment. No module keeps settings in a global.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from mpserverd.config.kinds import Network, split_endpoint
from mpserverd.config.options import default
from mpserverd.config.words import ON_FULL_BY_PROTOCOL, LogLevel, LogTarget, OnFull, Protocol, Sync

__all__ = [
    "BuffersConfig",
    "ClientConfig",
    "Config",
    "LayoutConfig",
    "ListenerConfig",
    "LogConfig",
    "LogLevel",
    "LogTarget",
    "Network",
    "OnFull",
    "Protocol",
    "ServerConfig",
    "SpoolConfig",
    "Sync",
]


@dataclasses.dataclass(frozen=True, slots=True)
class ServerConfig:
    """``user``, ``group`` and ``nice`` count with --daemon only; "" and 0 leave things as they are."""

    workers: int = default("server.workers")
    max_clients: int = default("server.max_clients")
    backlog: int = default("server.backlog")
    cpu_affinity: tuple[int, ...] = default("server.cpu_affinity")
    control_socket: str = default("server.control_socket")
    user: str = default("server.user")
    group: str = default("server.group")
    nice: int = default("server.nice")
    stop_timeout_s: float = default("server.stop_timeout_s")
    reload_timeout_s: float = default("server.reload_timeout_s")
    restart_timeout_s: float = default("server.restart_timeout_s")
    heartbeat_timeout_s: float = default("server.heartbeat_timeout_s")
    restart_backoff_s_max: float = default("server.restart_backoff_s_max")


@dataclasses.dataclass(frozen=True, slots=True)
class BuffersConfig:
    bytes: int = default("buffers.bytes")
    chunk_bytes: int = default("buffers.chunk_bytes")


@dataclasses.dataclass(frozen=True, slots=True)
class ListenerConfig:
    """``packet_size`` is the layout's size when there is a layout. Limits and timeouts of 0 mean none."""

    name: str = default("listener.name")
    address: str = default("listener.address")
    protocol: Protocol = default("listener.protocol")  # noqa: RUF009  (a word of an enum)
    packet_size: int = default("listener.packet_size")
    layout: str | None = None
    store: bool = default("listener.store")
    on_full: OnFull = ON_FULL_BY_PROTOCOL[default("listener.protocol")]
    allow: tuple[Network, ...] = default("listener.allow")
    deny: tuple[Network, ...] = default("listener.deny")
    max_connections: int = default("listener.max_connections")
    max_connections_per_address: int = default("listener.max_connections_per_address")
    handshake_timeout_s: float = default("listener.handshake_timeout_s")
    idle_timeout_s: float = default("listener.idle_timeout_s")
    receive_buffer_bytes: int = default("listener.receive_buffer_bytes")
    send_buffer_bytes: int = default("listener.send_buffer_bytes")
    nodelay: bool = default("listener.nodelay")
    keepalive: bool = default("listener.keepalive")

    @property
    def host(self) -> str:
        """The IP address without brackets."""
        return str(split_endpoint(self.address)[0])

    @property
    def port(self) -> int:
        return split_endpoint(self.address)[1]


@dataclasses.dataclass(frozen=True, slots=True)
class ClientConfig:
    """A client that is known by its address; ``address`` is a network, of one address or more."""

    id: str
    address: Network
    max_spool_bytes: int = default("client.max_spool_bytes")


@dataclasses.dataclass(frozen=True, slots=True)
class LayoutConfig:
    """``fields``: name to numpy type code, packed in this order. ``sequence`` and ``time`` name one."""

    name: str
    size: int
    fields: Mapping[str, str]
    sequence: str | None = None
    time: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class SpoolConfig:
    path: str = default("spool.path")
    segment_bytes: int = default("spool.segment_bytes")
    commit_interval_s: float = default("spool.commit_interval_s")
    sync: Sync = default("spool.sync")  # noqa: RUF009  (a word of an enum)
    max_bytes: int = default("spool.max_bytes")
    max_bytes_per_stream: int = default("spool.max_bytes_per_stream")
    max_age_s: float = default("spool.max_age_s")
    min_free_bytes: int = default("spool.min_free_bytes")


@dataclasses.dataclass(frozen=True, slots=True)
class LogConfig:
    level: LogLevel = default("log.level")  # noqa: RUF009  (a word of an enum)
    target: tuple[LogTarget, ...] = default("log.target")
    file: str = default("log.file")


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    """Everything. ``Config()`` is what an empty file gives: the default listener and the default limits."""

    server: ServerConfig = ServerConfig()
    buffers: BuffersConfig = BuffersConfig()
    listeners: tuple[ListenerConfig, ...] = (ListenerConfig(),)
    clients: tuple[ClientConfig, ...] = ()
    layouts: Mapping[str, LayoutConfig] = dataclasses.field(default_factory=dict)
    spool: SpoolConfig = SpoolConfig()
    log: LogConfig = LogConfig()
