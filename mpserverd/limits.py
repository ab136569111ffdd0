"""Every hard bound in one place, with its unit in its name and its reason beside it.

These are what the program can stand, not what an installation should use: settings (config/options.py) choose a value
within them. Nothing is imported here, so that everybody may import this.
"""

from __future__ import annotations

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB

# Packets and names

PACKET_BYTES_MIN = 1
PACKET_BYTES_MAX = 65_536
"""The largest packet of any client that we promise to take; one chunk of the default size holds it."""

STREAM_NAME_BYTES_MAX = 128
"""The name column of the state table; an address, a port and a time need 70."""

CLIENT_ID_BYTES_MAX = 64
"""Leaves room for a suffix in the stream's name, and fits one hello line with everything else in it."""

LISTENER_NAME_BYTES_MAX = 64
"""It stands in log lines and metric labels."""

CLIENT_ID_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]*"
"""Safe as a file name, a metric label and a word in a shell: no slash, no space, no leading dot or dash."""

LAYOUT_FIELDS_MAX = 256
"""Fields of one packet layout; numpy takes more, a reader of the table does not."""

LAYOUTS_MAX = 64
"""Layouts are looked up at the start of a worker only; more than this is a generated file gone wrong."""

# Processes

WORKERS_MAX = 64
"""One slot, one channel and one doorbell each, known to all; more workers than cores never pay."""

CLIENTS_MAX = 20_000
"""Twice what one machine is meant for. Each takes two chunks and about 3 KiB of the state table."""

CLIENT_TABLES_MAX = 20_000
"""As many named clients as can be connected."""

LISTENERS_MAX = 64
"""Each is polled by the supervisor and has a number in every row."""

NETWORKS_MAX = 4_096
"""Entries of one allow or deny list: they are tried one after the other at each accept."""

BACKLOG_MAX = 65_535
"""The kernel cuts it to net.core.somaxconn anyway."""

CPUS_MAX = 4_096
"""Largest CPU number plus one that the kernel can be built for is 8,192; machines end far below."""

NICE_MIN, NICE_MAX = -20, 19

TIMEOUT_S_MAX = 86_400.0
"""A day. Longer waits are meant as "never", which is written 0."""

HEARTBEAT_TIMEOUT_S_MIN = 2.5
"""Children beat once a second; less than two beats would kill a process that only lost its turn."""

STOP_TIMEOUT_S_MIN = 0.5

# Memory

CHUNK_BYTES_MIN = 4_096
"""A page, and the block that O_DIRECT writes."""

CHUNK_BYTES_MAX = 16 * MIB
"""Two chunks are guaranteed to each connection: larger ones only waste memory."""

BUFFERS_BYTES_MIN = 1 * MIB
BUFFERS_BYTES_MAX = 1 * TIB

CHUNKS_PER_CONNECTION = 2
"""Guaranteed share of each connection: one that is written to disk while the other one fills."""

CHUNKS_PER_WORKER = 8
"""Leased ahead to each worker, so that it need not ask the supervisor for every chunk."""

SOCKET_BUFFER_BYTES_MAX = 1 * GIB
"""The kernel cuts it to net.core.rmem_max and wmem_max; beyond this the option's type ends."""

# Disk

SEGMENT_BYTES_MIN = 64 * KIB
SEGMENT_BYTES_MAX = 16 * GIB
"""A segment is what retention frees and verify reads at once."""

SPOOL_BYTES_MAX = 1024 * TIB
"""Fits SQLite's signed 64-bit integers with much room for sums."""

COMMIT_INTERVAL_S_MIN, COMMIT_INTERVAL_S_MAX = 0.001, 60.0
"""Below a millisecond a cycle's own cost is the floor; above a minute the arena is the limit."""

AGE_S_MAX = 100 * 366 * 86_400
"""A hundred years."""

# Control and logging

CONTROL_LINE_BYTES_MAX = 65_536
"""One request of mpserverctl. Answers may be longer."""

SOCKET_PATH_BYTES_MAX = 107
"""sun_path of struct sockaddr_un is 108 bytes with its closing zero."""

PATH_BYTES_MAX = 4_095
"""PATH_MAX without its closing zero."""

LOG_LINE_BYTES_MAX = 4_096
"""PIPE_BUF: lines up to this long from several processes never mix in one pipe."""

LOG_VALUE_CHARACTERS_MAX = 512
"""One value in a log line; peers choose some of them."""

LOG_TRACEBACK_LINES_MAX = 64

CONFIG_FILE_BYTES_MAX = 16 * MIB
"""20,000 client tables take about 2 MiB."""

# Sockets

KEEPALIVE_IDLE_S = 60
KEEPALIVE_INTERVAL_S = 10
KEEPALIVE_PROBES = 6
"""With keepalive on, a peer that vanished is noticed after two minutes instead of the kernel's two hours."""
