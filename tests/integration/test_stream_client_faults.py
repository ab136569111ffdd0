"""Both clients against a server that cuts, forgets, refuses and tears (mps_server.py), and what they do at the end.

The oracle is the memory of the server, compared with what was handed over: a packet says who made it, and its number.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import random
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable

import pytest

from mpserverd import AsyncStreamClient, StreamClient
from mpserverd.client import file_buffer
from mpserverd.client.errors import (
    BufferFullError,
    ClientClosedError,
    NotAcknowledgedError,
    RefusedError,
    StreamTakenError,
)
from tests.integration.driver import DEADLINE_S, SLOWNESS
from tests.integration.mps_server import Faults, Kept, MpsServer

ROOT = pathlib.Path(__file__).parents[2]
SEEDS = range(12)
SIZE = 16
BACKOFF = (0.001, 0.02)
NASTY = Faults(
    refuse=0.1, cut_before_ok=0.1, cut=1.0, cut_after_bytes_max=4_000, forget=0.5, bye=0.3, tear=0.3,
    ack_every_bytes=500,
)  # fmt: skip


def packet(maker: int, number: int) -> bytes:
    return struct.pack("<QQ", maker, number)


def batch(maker: int, first: int, count: int) -> bytes:
    return b"".join(packet(maker, number) for number in range(first, first + count))


def address(server: MpsServer) -> str:
    return f"127.0.0.1:{server.port}"


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S * SLOWNESS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def assert_each_once(kept: Kept, makers: int, count: int) -> None:
    """All packets of each maker, in its order, in one row of ``content``."""
    numbers = [0] * makers
    for maker, number in struct.iter_unpack("<QQ", kept.content):
        assert number == numbers[maker]
        numbers[maker] += 1
    assert numbers == [count] * makers
    assert kept.holes == []


# -- a nasty server


@pytest.mark.parametrize("seed", SEEDS)
def test_four_threads_and_a_nasty_server_lose_and_double_nothing(seed: int) -> None:
    def make(client: StreamClient, maker: int) -> None:
        chance, at = random.Random(f"{seed} {maker}"), 0
        while at < 1500:
            count = min(chance.randrange(1, 60), 1500 - at)
            assert client.send(batch(maker, at, count)) == count
            at += count

    with MpsServer(seed, NASTY) as server:
        with StreamClient(address(server), "press-7", SIZE, buffer_bytes=4_000, backoff_s=BACKOFF) as client:
            makers = [threading.Thread(target=make, args=(client, maker)) for maker in range(4)]
            for thread in makers:
                thread.start()
            for thread in makers:
                thread.join()
            client.flush()
            assert (client.acked, client.held) == (6000, 0)
        assert_each_once(server.stream("press-7"), 4, 1500)
        assert server.connections > 10


@pytest.mark.parametrize("seed", SEEDS)
def test_asyncio_and_a_nasty_server_lose_and_double_nothing(seed: int, tmp_path: pathlib.Path) -> None:
    """Every second time with a buffer file, and a client that is closed in the middle and goes on from it."""
    file = tmp_path / "buffer" if seed % 2 else None

    async def make(client: AsyncStreamClient, maker: int, first: int) -> None:
        for at in range(first, first + 300, 30):
            assert await client.send(batch(maker, at, 30)) == 30

    async def life(first: int, server: MpsServer) -> None:
        client = AsyncStreamClient(
            address(server), "press-7", SIZE, buffer_bytes=40_000, buffer_file=file, buffer_sync=seed % 4 == 1,
            backoff_s=BACKOFF,
        )  # fmt: skip
        await asyncio.gather(*(make(client, maker, first) for maker in range(3)))
        if file is None or first:
            await client.flush()
        await client.close(0.0 if file else 60.0)

    with MpsServer(seed, NASTY) as server:
        for first in (0, 300) if file else (0,):
            asyncio.run(life(first, server))
        assert_each_once(server.stream("press-7"), 3, 600 if file else 300)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_dropped_for_a_nasty_server_is_a_hole_and_everything_else_is_in_its_place(seed: int) -> None:
    chance = random.Random(seed)
    with MpsServer(seed, NASTY) as server:
        with StreamClient(
            address(server), "press-7", SIZE, buffer_bytes=2_000, on_full="drop-oldest", backoff_s=BACKOFF
        ) as client:
            client.send(packet(0, 0))
            client.flush()  # numbered: what is dropped from now on has an index
            at = 1
            while at < 3000:
                count = chance.randrange(1, 40)
                client.send(batch(0, at, count))
                at += count
                if chance.random() < 0.05:
                    with contextlib.suppress(NotAcknowledgedError):
                        client.flush(0.02)
            client.flush()
            dropped = client.dropped
        kept = server.stream("press-7")
        assert kept.next == at
        missing = {index for first, end in kept.holes for index in range(first, end)}
        for index, (_, number) in enumerate(struct.iter_unpack("<QQ", kept.content)):
            assert index in missing or number == index
        assert len(missing) <= dropped


PROGRAM = """
import asyncio, struct, sys
import mpserverd

async def main(server, file):
    client = mpserverd.AsyncStreamClient(server, "press-7", 16, buffer_file=file, backoff_s=(0.001, 0.02))
    while True:
        index = client.next_index if client.acked or client.held else 0
        await client.send(b"".join(struct.pack("<QQ", 0, index + k) for k in range(20)))
        print(index + 20, flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


def test_an_asyncio_program_that_is_killed_goes_on_from_its_buffer_file(tmp_path: pathlib.Path) -> None:
    chance = random.Random(3)
    with MpsServer(3, NASTY) as server:
        arguments = [address(server), str(tmp_path / "buffer")]
        for _ in range(4):
            with subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(PROGRAM), *arguments],
                stdout=subprocess.PIPE, text=True, cwd=ROOT,
            ) as program:  # fmt: skip
                assert program.stdout is not None
                for _ in range(chance.randrange(5, 60)):
                    handed_over = int(program.stdout.readline())
                program.kill()
                handed_over = max([handed_over, *(int(line) for line in program.stdout if line.endswith("\n"))])
        with StreamClient(arguments[0], "press-7", SIZE, buffer_file=arguments[1], backoff_s=BACKOFF) as client:
            client.flush()
            end = client.next_index
        assert end >= handed_over
        assert_each_once(server.stream("press-7"), 1, end)


# -- several servers


def test_a_client_moves_to_the_second_server_and_its_file_remembers_whose_epoch_it_has(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "buffer"
    with MpsServer(1) as first, MpsServer(2) as second:
        servers = [address(first), address(second)]
        with StreamClient(servers, "press-7", SIZE, buffer_file=file, backoff_s=BACKOFF) as client:
            client.send(batch(0, 0, 10))
        first.on_hello = second.on_hello = lambda hello: b"ERR busy not now\n"
        client = StreamClient(servers, "press-7", SIZE, buffer_file=file, backoff_s=BACKOFF)
        client.send(batch(0, 10, 10))
        second.on_hello = lambda hello: None  # the first stays busy
        client.flush()
        client.close()
        assert bytes(second.stream("press-7").content) == batch(0, 10, 10)
        assert second.hellos[-1] == "MPS/1 press-7 16"


def test_two_devices_with_one_id_are_told_and_keep_what_was_not_stored() -> None:
    with MpsServer() as server:
        one = StreamClient(address(server), "press-7", SIZE, backoff_s=(0.01, 0.01))
        one.send(batch(1, 0, 20))
        one.flush()
        server.on_hello = lambda hello: b"ERR busy not now\n"
        server.cut_all()
        until(lambda: one.state != "streaming")
        one.send(batch(1, 20, 80))
        server.stream("press-7").content.extend(batch(2, 0, 50))
        server.on_hello = lambda hello: None
        with pytest.raises(StreamTakenError):
            one.flush()
        assert one.held == 80
        with pytest.raises(NotAcknowledgedError, match=r"80 packets are not acknowledged and will not be: .* one id"):
            one.close()


# -- the end


@pytest.mark.parametrize("left", [0, 10])
def test_a_callback_may_close_the_client(tmp_path: pathlib.Path, left: int) -> None:
    ended, faults = threading.Event(), []

    def on_ack(_: int) -> None:
        try:
            with pytest.raises(RuntimeError):
                client.flush()
            client.send(batch(0, 10, left))
            faults.append(client.close())
        except BaseException as fault:
            faults.append(fault)
        ended.set()

    file = tmp_path / "buffer"
    with MpsServer() as server:
        client = StreamClient(address(server), "press-7", SIZE, buffer_file=file, on_ack=on_ack)
        client.send(batch(0, 0, 10))
        assert ended.wait(DEADLINE_S * SLOWNESS)
        assert faults == [left]
        with pytest.raises(ClientClosedError):
            client.send(packet(0, 0))
        assert client.close() == left
        with StreamClient(address(server), "press-7", SIZE, buffer_file=file) as again:  # the lock is free
            again.flush()


def test_a_callback_that_closes_a_client_without_a_file_is_told_what_is_lost() -> None:
    told: list[int] = []
    is_sent = threading.Event()

    def on_state(state: str, why: str, detail: str) -> None:
        if state == "waiting" and is_sent.wait(DEADLINE_S * SLOWNESS):
            try:
                client.close()
            except NotAcknowledgedError as error:
                told.append(error.held)

    client = StreamClient("127.0.0.1:1", "press-7", SIZE, on_state=on_state, backoff_s=(3600, 3600))
    client.send(batch(0, 0, 3))
    is_sent.set()
    client._loop.join(DEADLINE_S * SLOWNESS)
    assert told == [3]
    assert not client._loop.is_alive()


def test_a_constructor_that_fails_leaves_the_file_free(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "buffer"
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no running event loop"):
            AsyncStreamClient("127.0.0.1:1", "press-7", SIZE, buffer_file=file)
    assert not file.exists()

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="can't start new thread"):
            StreamClient("127.0.0.1:1", "press-7", SIZE, buffer_file=file)
    monkeypatch.undo()
    assert StreamClient("127.0.0.1:1", "press-7", SIZE, buffer_file=file).close(0.0) == 0


def test_a_final_error_is_the_reason_that_close_gives() -> None:
    with MpsServer() as server:
        is_sent = threading.Event()
        refusal = b"ERR packet-size the stream has another\n"
        server.on_hello = lambda hello: refusal if is_sent.wait(DEADLINE_S * SLOWNESS) else None
        client = StreamClient(address(server), "press-7", SIZE)
        client.send(packet(0, 0))
        is_sent.set()
        with pytest.raises(RefusedError):
            client.flush()
        with pytest.raises(NotAcknowledgedError, match=r"1 packets are not acknowledged and will not be: .*size"):
            client.close(1.0)


def test_an_acknowledgement_that_does_not_come_ends_the_connection_and_costs_nothing() -> None:
    with MpsServer() as server:
        server.holds_acks.set()
        with StreamClient(address(server), "press-7", SIZE, ack_timeout_s=0.1, backoff_s=BACKOFF) as client:
            client.send(batch(0, 0, 10))
            client.flush()  # the next OK says it
            assert client.losses["ack-timeout"] >= 1
        assert_each_once(server.stream("press-7"), 1, 10)


def test_a_full_buffer_lets_threads_wait_and_close_wakes_them() -> None:
    client = StreamClient("127.0.0.1:1", "press-7", SIZE, buffer_bytes=10 * SIZE, backoff_s=(3600, 3600))
    client.send(batch(0, 0, 10))
    with pytest.raises(BufferFullError):
        client.send(packet(0, 10), timeout_s=0.01)
    woken: list[BaseException] = []

    def wait() -> None:
        try:
            client.send(packet(0, 10))
        except ClientClosedError as error:
            woken.append(error)

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(client._one_call.locked)
    with pytest.raises(NotAcknowledgedError):
        client.close(0.0)
    for thread in threads:
        thread.join(DEADLINE_S * SLOWNESS)
    assert len(woken) == 3


# -- the disk and the loop


def test_an_event_loop_never_waits_for_the_disk(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed_by: list[int] = []

    def flush(descriptor: int) -> None:
        flushed_by.append(threading.get_ident())
        os.fsync(descriptor)

    async def live(server: MpsServer) -> None:
        client = AsyncStreamClient(address(server), "press-7", SIZE, buffer_file=tmp_path / "buffer", buffer_sync=True)
        flushed_by.clear()
        await client.send(batch(0, 0, 10))
        await client.flush()
        await client.close()

    monkeypatch.setattr(file_buffer, "flush_to_disk", flush)
    with MpsServer() as server:
        asyncio.run(live(server))
    assert len(flushed_by) >= 2  # the packets and the epoch, perhaps in one, and the end
    assert threading.get_ident() not in flushed_by


@pytest.mark.parametrize("kind", ["thread", "asyncio"])
def test_no_packet_is_sent_before_its_number_is_on_the_disk(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    entered, may_end = threading.Event(), threading.Event()

    def flush(_: int) -> None:
        entered.set()
        assert may_end.wait(DEADLINE_S * SLOWNESS)

    def watch(server: MpsServer) -> None:
        assert entered.wait(DEADLINE_S * SLOWNESS)
        assert bytes(server.stream("press-7").content) == b""
        may_end.set()

    async def live(server: MpsServer) -> None:
        async with AsyncStreamClient(address(server), "press-7", SIZE, buffer_file=file) as client:
            await client.send(batch(0, 0, 1000))
            await asyncio.to_thread(watch, server)
            await client.flush()

    file = tmp_path / "buffer"
    StreamClient("127.0.0.1:1", "press-7", SIZE, buffer_file=file).close(0.0)
    monkeypatch.setattr(file_buffer, "flush_to_disk", flush)
    with MpsServer() as server:
        if kind == "asyncio":
            asyncio.run(live(server))
        else:
            with StreamClient(address(server), "press-7", SIZE, buffer_file=file) as client:
                watch(server)
                client.send(batch(0, 0, 1000))
                client.flush()
        assert_each_once(server.stream("press-7"), 1, 1000)


def test_a_close_that_is_cancelled_is_finished_by_the_next_one(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "buffer"

    async def live() -> None:
        client = AsyncStreamClient("127.0.0.1:1", "press-7", SIZE, buffer_file=file, backoff_s=(3600, 3600))
        await client.send(batch(0, 0, 10))
        closing = asyncio.create_task(client.close(0.0))
        while client.state != "closed":
            await asyncio.sleep(0)
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)
        assert await client.close() == 10

    asyncio.run(live())
    assert StreamClient("127.0.0.1:1", "press-7", SIZE, buffer_file=file).close(0.0) == 10
