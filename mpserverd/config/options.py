"""The table of all options: one row a key.

It feeds validation and its messages, ``mpserverd --help-options``, ``mpserverctl config --default``, the manual and the
check of the shipped file. Nothing else in the program repeats a default, a bound or a unit; a key that is not here is
refused, so every row must do something.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from mpserverd import limits
from mpserverd.config.kinds import (
    AbsolutePath,
    AddressOrNetwork,
    Choice,
    Endpoint,
    Fields,
    Flag,
    Integer,
    Kind,
    ListOf,
    Number,
    Size,
    Text,
)
from mpserverd.config.words import Applies, LogLevel, LogTarget, OnFull, Protocol, Sync


class Shape(enum.Enum):
    """How a section is written."""

    TABLE = "[{name}]"
    ARRAY = "[[{name}]]"
    NAMED = "[{name}.NAME]"


SECTIONS: dict[str, Shape] = {
    "server": Shape.TABLE,
    "buffers": Shape.TABLE,
    "listener": Shape.ARRAY,
    "client": Shape.ARRAY,
    "layout": Shape.NAMED,
    "spool": Shape.TABLE,
    "log": Shape.TABLE,
}

SECTION_LENGTH_MAX = {
    "listener": limits.LISTENERS_MAX,
    "client": limits.CLIENT_TABLES_MAX,
    "layout": limits.LAYOUTS_MAX,
}


class Missing(enum.Enum):
    """Defaults that are no value. REQUIRED: the key must be written. DERIVED: see the row's ``default_text``."""

    REQUIRED = "required"
    DERIVED = "derived"


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One key. ``unit`` is "" where the kind says it all."""

    section: str
    name: str
    kind: Kind
    default: Any
    applies: Applies
    help: str
    unit: str = ""
    default_text: str = ""

    @property
    def key(self) -> str:
        return f"{self.section}.{self.name}"


_START, _RELOAD = Applies.START, Applies.RELOAD
_SAFE_NAME = "letters, digits, dot, dash and _, the first a letter or digit"
_NAME = Text(limits.CLIENT_ID_PATTERN, _SAFE_NAME, limits.LISTENER_NAME_BYTES_MAX)
_CLIENT_ID = Text(limits.CLIENT_ID_PATTERN, _SAFE_NAME, limits.CLIENT_ID_BYTES_MAX)
_ACCOUNT = Text(r"[a-z_][a-z0-9_-]*\$?|[0-9]{1,10}", "a name or a number", 32, empty="unchanged")
_NETWORKS_NONE = ListOf(AddressOrNetwork(), limits.NETWORKS_MAX, empty="nobody")
_NETWORKS_ALL = ListOf(AddressOrNetwork(), limits.NETWORKS_MAX, empty="everybody")
_PACKET = Integer(limits.PACKET_BYTES_MIN, limits.PACKET_BYTES_MAX)
_PACKET_OR_ANY = Integer(limits.PACKET_BYTES_MIN, limits.PACKET_BYTES_MAX, zero="each client says its own; mps only")
_CLIENTS = Integer(1, limits.CLIENTS_MAX, zero="no limit of its own")
_SOCKET_BUFFER = Size(1, limits.SOCKET_BUFFER_BYTES_MAX, zero="leave it to the kernel")
_PATIENCE = Number(0.001, limits.TIMEOUT_S_MAX, zero="for ever")
_SPOOL_SIZE = Size(1, limits.SPOOL_BYTES_MAX, zero="no limit of its own")
_LAYOUT_FIELD = Text(r"[A-Za-z_][A-Za-z0-9_]*", "the name of a field", 64)

_SERVER = (
    Option("server", "workers", Integer(1, limits.WORKERS_MAX), 4, _RELOAD, "Worker processes that read connections."),
    Option(
        "server",
        "max_clients",
        Integer(1, limits.CLIENTS_MAX),
        10,
        _RELOAD,
        "Connections at one time; more are refused and counted. A reload raises it as far as the start made room.",
    ),
    Option(
        "server",
        "backlog",
        Integer(1, limits.BACKLOG_MAX),
        1024,
        _RELOAD,
        "Connections that the kernel queues for one listener.",
    ),
    Option(
        "server",
        "cpu_affinity",
        ListOf(Integer(0, limits.CPUS_MAX - 1), limits.CPUS_MAX, empty="the kernel chooses"),
        (),
        _RELOAD,
        "CPU numbers for the workers: worker i runs on entry i, counted round and round.",
    ),
    Option(
        "server",
        "control_socket",
        AbsolutePath(limits.SOCKET_PATH_BYTES_MAX),
        "/run/mpserverd/control.sock",
        _START,
        "Unix socket that mpserverctl talks to.",
    ),
    Option("server", "user", _ACCOUNT, "", _START, "User to become; with --daemon only."),
    Option("server", "group", _ACCOUNT, "", _START, "Group to become; with --daemon only, the user's own by default."),
    Option(
        "server",
        "nice",
        Integer(limits.NICE_MIN, limits.NICE_MAX),
        0,
        _START,
        "Added to the scheduling priority, negative is more urgent; with --daemon only.",
    ),
    Option(
        "server",
        "stop_timeout_s",
        Number(limits.STOP_TIMEOUT_S_MIN, limits.TIMEOUT_S_MAX),
        10.0,
        _RELOAD,
        "A stop that takes longer ends by force, and says what was at risk.",
        "s",
    ),
    Option(
        "server",
        "reload_timeout_s",
        Number(0.5, limits.TIMEOUT_S_MAX),
        15.0,
        _RELOAD,
        "At a reload, an old worker that has not handed over by then is killed, and its connections are adopted.",
        "s",
    ),
    Option(
        "server",
        "restart_timeout_s",
        Number(0.5, limits.TIMEOUT_S_MAX),
        2.0,
        _RELOAD,
        "A restart leaves after so long also when systemd has not taken everything yet, and says what is missing.",
        "s",
    ),
    Option(
        "server",
        "heartbeat_timeout_s",
        Number(limits.HEARTBEAT_TIMEOUT_S_MIN, limits.TIMEOUT_S_MAX),
        10.0,
        _RELOAD,
        "A worker that gives no sign of life for so long is killed and replaced.",
        "s",
    ),
    Option(
        "server",
        "restart_backoff_s_max",
        Number(0.1, limits.TIMEOUT_S_MAX),
        30.0,
        _RELOAD,
        "Longest wait before a child that keeps dying is started again.",
        "s",
    ),
)

_BUFFERS = (
    Option(
        "buffers",
        "bytes",
        Size(limits.BUFFERS_BYTES_MIN, limits.BUFFERS_BYTES_MAX),
        64 * limits.MIB,
        _START,
        "Shared memory for packets that are not on disk yet; taken at the start, never more.",
        "bytes",
    ),
    Option(
        "buffers",
        "chunk_bytes",
        Size(limits.CHUNK_BYTES_MIN, limits.CHUNK_BYTES_MAX, multiple_of=limits.CHUNK_BYTES_MIN),
        64 * limits.KIB,
        _START,
        "Piece of that memory that one stream holds at a time; each connection needs two.",
        "bytes",
    ),
)

_LISTENER = (
    Option("listener", "name", _NAME, "raw", _RELOAD, "Its name in logs and counters; unique."),
    Option("listener", "address", Endpoint(), "0.0.0.0:8888", _RELOAD, "Address and port; port 0: any free one."),
    Option(
        "listener",
        "protocol",
        Choice(Protocol),
        Protocol.RAW,
        _RELOAD,
        "What clients speak: raw is packets from the first byte; mps says hello, is acknowledged, and can resume.",
    ),
    Option(
        "listener", "packet_size", _PACKET_OR_ANY, 16, _RELOAD, "Size of every packet; give this or a layout.", "bytes"
    ),
    Option(
        "listener",
        "layout",
        _NAME,
        Missing.DERIVED,
        _RELOAD,
        "Name of a [layout.NAME] that says the size and what to check.",
        default_text="none: packets are opaque",
    ),
    Option("listener", "store", Flag(), True, _RELOAD, "false: only count and check, write nothing."),
    Option(
        "listener",
        "on_full",
        Choice(OnFull),
        Missing.DERIVED,
        _RELOAD,
        "With the memory full: stop reading, or drop a stream's oldest packets and count them.",
        default_text='"drop-oldest" for raw, "block" for mps',
    ),
    Option("listener", "allow", _NETWORKS_ALL, (), _RELOAD, "Addresses and networks that may connect."),
    Option("listener", "deny", _NETWORKS_NONE, (), _RELOAD, "Addresses and networks that may not, even when allowed."),
    Option("listener", "max_connections", _CLIENTS, 0, _RELOAD, "Connections to this listener at one time."),
    Option("listener", "max_connections_per_address", _CLIENTS, 0, _RELOAD, "The same for any one peer address."),
    Option(
        "listener",
        "handshake_timeout_s",
        _PATIENCE,
        60.0,
        _RELOAD,
        "A connection that has sent nothing for so long since it was made is closed.",
        "s",
    ),
    Option(
        "listener",
        "idle_timeout_s",
        _PATIENCE,
        0.0,
        _RELOAD,
        "A connection that has sent before, and nothing for so long, is closed.",
        "s",
    ),
    Option(
        "listener", "receive_buffer_bytes", _SOCKET_BUFFER, 131_072, _RELOAD, "SO_RCVBUF of each connection.", "bytes"
    ),
    Option("listener", "send_buffer_bytes", _SOCKET_BUFFER, 131_072, _RELOAD, "SO_SNDBUF of each connection.", "bytes"),
    Option("listener", "nodelay", Flag(), True, _RELOAD, "TCP_NODELAY: answers leave at once."),
    Option(
        "listener",
        "keepalive",
        Flag(),
        True,
        _RELOAD,
        "TCP keepalive: a peer that vanished is noticed after two minutes.",
    ),
)

_CLIENT = (
    Option("client", "id", _CLIENT_ID, Missing.REQUIRED, _RELOAD, "Name of the client and of its stream; unique."),
    Option(
        "client",
        "address",
        AddressOrNetwork(),
        Missing.REQUIRED,
        _RELOAD,
        "Peer address, or network, by which it is known; the longest prefix wins.",
    ),
    Option(
        "client",
        "max_spool_bytes",
        _SPOOL_SIZE,
        0,
        _RELOAD,
        "Most that its stream keeps on disk, instead of spool.max_bytes_per_stream.",
        "bytes",
    ),
)

_LAYOUT = (
    Option("layout", "size", _PACKET, Missing.REQUIRED, _START, "Size of a packet: the sum of its fields.", "bytes"),
    Option("layout", "fields", Fields(), Missing.REQUIRED, _START, "Fields in order, nothing between them."),
    Option(
        "layout",
        "sequence",
        _LAYOUT_FIELD,
        Missing.DERIVED,
        _START,
        "Field that counts packets: gaps, repeats and reordering are counted.",
        default_text="none: not checked",
    ),
    Option(
        "layout",
        "time",
        _LAYOUT_FIELD,
        Missing.DERIVED,
        _START,
        "Field with the send time in unix ns: latency is measured.",
        default_text="none: not measured",
    ),
)

_SPOOL = (
    Option("spool", "path", AbsolutePath(), "/var/lib/mpserverd", _START, "Directory that holds the streams."),
    Option(
        "spool",
        "segment_bytes",
        Size(limits.SEGMENT_BYTES_MIN, limits.SEGMENT_BYTES_MAX),
        64 * limits.MIB,
        _START,
        "Size of one file of a stream, a multiple of buffers.chunk_bytes; retention frees whole files.",
        "bytes",
    ),
    Option(
        "spool",
        "commit_interval_s",
        Number(limits.COMMIT_INTERVAL_S_MIN, limits.COMMIT_INTERVAL_S_MAX),
        0.1,
        _RELOAD,
        "Shortest time between two rounds of writing and syncing.",
        "s",
    ),
    Option(
        "spool",
        "sync",
        Choice(Sync),
        Sync.DURABLE,
        _START,
        "durable survives a power cut; with none the kernel writes back when it likes.",
    ),
    Option(
        "spool",
        "max_bytes",
        _SPOOL_SIZE,
        10 * limits.GIB,
        _RELOAD,
        "All streams together; the oldest segments go first.",
        "bytes",
    ),
    Option(
        "spool",
        "max_bytes_per_stream",
        _SPOOL_SIZE,
        0,
        _RELOAD,
        "Any one stream; its oldest segments go first.",
        "bytes",
    ),
    Option(
        "spool",
        "max_age_s",
        Number(1.0, limits.AGE_S_MAX, zero="no limit of its own"),
        0.0,
        _RELOAD,
        "Segments whose last packet is older than this go.",
        "s",
    ),
    Option(
        "spool",
        "min_free_bytes",
        Size(1, limits.SPOOL_BYTES_MAX, zero="nothing is left free"),
        limits.GIB,
        _RELOAD,
        "Free space that the file system keeps: the oldest segments go for it, if all of them can make it.",
        "bytes",
    ),
)

_LOG = (
    Option("log", "level", Choice(LogLevel), LogLevel.INFO, _RELOAD, "Least urgent lines that are written."),
    Option(
        "log",
        "target",
        ListOf(Choice(LogTarget), len(LogTarget)),
        (LogTarget.STDERR,),
        _RELOAD,
        "Where lines go; journal takes structured fields.",
    ),
    Option(
        "log",
        "file",
        AbsolutePath(),
        "/var/log/mpserverd/mpserverd.log",
        _RELOAD,
        'File for the target "file"; SIGUSR2 opens it again after a rotation.',
    ),
)

OPTIONS: tuple[Option, ...] = (*_SERVER, *_BUFFERS, *_LISTENER, *_CLIENT, *_LAYOUT, *_SPOOL, *_LOG)

_BY_KEY = {option.key: option for option in OPTIONS}


def of_section(section: str) -> dict[str, Option]:
    """The rows of one section by key name, in the order of the table."""
    return {option.name: option for option in OPTIONS if option.section == section}


def default(key: str) -> Any:
    """The default of ``section.name``, for the settings' classes. Raises KeyError; ValueError where there is none."""
    value = _BY_KEY[key].default
    if isinstance(value, Missing):
        raise ValueError(f"{key} has no default value")
    return value
