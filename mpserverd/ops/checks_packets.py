"""Does the configured packet size fit what clients really send? A guess from stored bytes.

With a layout that counts packets: nearly every packet of the newest ones jumps. Without one: connections end in the
middle of a packet again and again, and what is left over has a size of its own. It reads the spool only.
"""

from __future__ import annotations

import collections
import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mpserverd.errors import MpserverdError
from mpserverd.ops.findings import Finding, fault, note, ok, warning
from mpserverd.ops.site import Site
from mpserverd.streams.catalog_file import ask
from mpserverd.streams.catalog_view import StreamSnapshot, all_streams
from mpserverd.streams.reader import open_stream
from mpserverd.streams.text import counted

STREAMS_MAX = 16
"""The newest streams tell; more would only take longer."""
SAMPLE_PACKETS = 2048
JUMPS_SHARE_HIGH = 0.9
ENDS_MIN = 4
CUT_SHARE_HIGH = 0.75
CUT_SHARE_HINT = 0.25
"""With a common divisor that is smaller than the packet, fewer cut ends say enough."""
SIZES = (4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 128, 192, 256, 512, 1024)


def packet_size(site: Site) -> Iterator[Finding]:
    spool = Path(site.settings.spool.path)
    try:
        streams = all_streams(spool)
        truncated = ask(spool, lambda connection: dict(connection.execute("SELECT id, truncated FROM stream")))
    except MpserverdError as error:
        yield note(f"no stored bytes to judge from: {error}")
        return
    found = [*_jumps(spool, streams), *_cut_ends(streams, truncated)]
    yield from found or [ok(f"nothing in {counted(len(streams), 'stream')} contradicts the packet size")]


# -- with a sequence


def _jumps(spool: Path, streams: Sequence[StreamSnapshot]) -> Iterator[Finding]:
    newest = sorted(streams, key=lambda stream: stream.row.updated_unix_ns, reverse=True)
    suspects: dict[int, list[tuple[str, int, int, int | None]]] = collections.defaultdict(list)
    looked: collections.Counter[int] = collections.Counter()
    for stream in newest[:STREAMS_MAX]:
        with contextlib.suppress(MpserverdError, OSError):
            judged = _judge(spool, stream)
            if judged is not None:
                looked[stream.row.packet_size] += 1
                if judged[0] > JUMPS_SHARE_HIGH * judged[1]:
                    suspects[stream.row.packet_size].append((stream.row.full_name, *judged))
    for size, bad in suspects.items():
        name, jumps, packets, fitting = bad[0]
        text = (
            f"stream {name}: the sequence jumps at {jumps:,} of {packets:,} packets of {size} bytes, in "
            f"{len(bad)} of {looked[size]} streams"
        )
        if fitting is not None:
            yield fault(f"{text}; with packets of {fitting} bytes it counts", f"change the layout: size = {fitting}")
        else:
            yield fault(f"{text}: packets have another size or layout", f"mpserverctl read {name} --packets -20:")


def _judge(spool: Path, stream: StreamSnapshot) -> tuple[int, int, int | None] | None:
    """Jumps, steps looked at, and the size that would count; None without a sequence or enough packets."""
    layout = stream.row.layout
    if layout.sequence is None:
        return None
    with open_stream(stream.row.full_name, spool=spool) as opened:
        start = max(opened.first_index, opened.end_index - SAMPLE_PACKETS)
        content = b"".join(bytes(view) for view in opened.read_bytes(start, opened.end_index))
    field = layout.dtype.fields[layout.sequence] if layout.dtype.fields else None
    if field is None or len(content) < 16 * layout.size:
        return None
    code, offset = field[0], int(field[1])
    steps = len(content) // layout.size - 1
    jumps = _jump_count(content, layout.size, offset, code)
    fitting = next(
        (
            size
            for size in SIZES
            if size != layout.size
            and size >= offset + code.itemsize
            and len(content) >= 16 * size
            and _counts_somewhere(content, size, offset, code)
        ),
        None,
    )
    return jumps, steps, fitting


def _jump_count(content: bytes, size: int, offset: int, code: np.dtype[np.generic]) -> int:
    count = (len(content) - offset - code.itemsize) // size + 1
    values = np.ndarray((count,), code, content, offset, (size,)).astype(np.uint64)
    return int(np.count_nonzero(np.diff(values) != 1))


def _counts_somewhere(content: bytes, size: int, offset: int, code: np.dtype[np.generic]) -> bool:
    """Whether the field counts at this distance, wherever in the stream the first whole packet begins."""
    for shift in range(0, size, 4):
        part = content[shift:]
        if len(part) >= 8 * size:
            steps = (len(part) - offset - code.itemsize) // size
            if _jump_count(part, size, offset, code) < (1 - JUMPS_SHARE_HIGH) * steps:
                return True
    return False


# -- without one


def _cut_ends(streams: Sequence[StreamSnapshot], truncated: dict[int, int | None]) -> Iterator[Finding]:
    """Ended streams by packet size, and what the ends of their connections left over."""
    ended: dict[int, list[int]] = collections.defaultdict(list)
    for stream in streams:
        left = int(truncated.get(stream.row.id) or 0)
        if not stream.row.connected and left < stream.row.packet_size:  # more: several connections together
            ended[stream.row.packet_size].append(left)
    for size, lefts in ended.items():
        cut = [left for left in lefts if left]
        if len(cut) < ENDS_MIN:
            continue
        share = len(cut) / len(lefts)
        hint = math.gcd(size, *cut)
        commonest, times = collections.Counter(cut).most_common(1)[0]
        text = (
            f"{len(cut):,} of {len(lefts):,} connections ended within a packet of {size} bytes, "
            f"{times:,} with {commonest} bytes over"
        )
        if 1 < hint < size and share >= CUT_SHARE_HINT:
            yield fault(f"{text}: clients seem to send packets of {hint} bytes", f"set packet_size = {hint}")
        elif share >= CUT_SHARE_HIGH:
            yield warning(f"{text}: packets may have another size", "mpserverctl read STREAM --packets -20:")
