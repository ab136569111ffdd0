"""What a program hands over, as whole packets in blocks of bytes. Imports no numpy: who passes an array has it already.

    bytes, bytearray, memoryview, array.array ...   packets in a row
    numpy array, structured                         an element is a packet
    numpy array of numbers                          packets in a row; the rows of one with two axes are packets
    an iterable                                     each item is one packet, bytes or the like

Rules: what is not a whole number of packets is a PacketLengthError that says both numbers. An array is checked before
anything of it is taken, an iterable item by item.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from mpserverd.client.errors import PacketLengthError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Packets = bytes | bytearray | memoryview | npt.NDArray[Any] | np.generic | Iterable[bytes | bytearray | memoryview]

GATHER_BYTES = 65_536
"""Packets of an iterable are gathered up to this size before the buffer's lock is taken."""


def blocks(packets: Packets, packet_size: int) -> Iterator[memoryview]:
    """The packets as bytes in a row, each block a whole number of packets. Views, not copies, where possible."""
    whole = _as_bytes(packets, packet_size)
    if whole is not None:
        if len(whole) % packet_size:
            raise PacketLengthError(f"{len(whole)} bytes are no whole number of packets of {packet_size}")
        return iter((whole,)) if whole else iter(())
    if isinstance(packets, str) or not isinstance(packets, Iterable):
        raise TypeError(f"packets are bytes, an array or an iterable of bytes, not {type(packets).__name__}")
    return _gathered(packets, packet_size)


def _as_bytes(packets: Any, packet_size: int) -> memoryview | None:
    """None for what has no buffer of its own."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(packets, (numpy.ndarray, numpy.generic)):
        return _of_array(packets, packet_size)
    try:
        view = memoryview(packets)
    except TypeError:
        return None
    return view.cast("B") if view.c_contiguous else memoryview(view.tobytes())


def _of_array(array: Any, packet_size: int) -> memoryview:
    dtype = array.dtype
    if dtype.hasobject:
        raise TypeError(f"an array of {dtype} holds references, not packets")
    is_record = dtype.names is not None or dtype.kind in "SV"
    if is_record and dtype.itemsize != packet_size:
        raise PacketLengthError(f"an element of this array has {dtype.itemsize} bytes, a packet {packet_size}")
    if not is_record and array.ndim > 1 and (row := array.shape[-1] * dtype.itemsize) != packet_size:
        raise PacketLengthError(f"a row of this array has {row} bytes, a packet {packet_size}")
    if array.ndim == 0 or not array.flags.c_contiguous or array.size == 0:
        return memoryview(array.tobytes())
    return memoryview(array.reshape(-1).view("u1"))


def _gathered(packets: Iterable[Any], packet_size: int) -> Iterator[memoryview]:
    block = bytearray()
    for number, packet in enumerate(packets):
        one = _as_bytes(packet, packet_size) if not isinstance(packet, str) else None
        if one is None:
            raise TypeError(f"packet {number} is bytes or the like, not {type(packet).__name__}")
        if len(one) != packet_size:
            raise PacketLengthError(f"packet {number} has {len(one)} bytes, not {packet_size}")
        block += one
        if len(block) >= GATHER_BYTES:
            yield memoryview(block)
            block = bytearray()
    if block:
        yield memoryview(block)
