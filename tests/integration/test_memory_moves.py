"""A restart gives live memory another size, another grid or another layout, while plain clients go on sending.

Every byte that they sent is compared, by its hash, with what is on disk in the end.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import re
import socket
import threading
import time
from collections.abc import Iterator

from mpserverd.arena.live import open_state
from mpserverd.arena.report import buffers as buffers_of
from mpserverd.arena.report import ledger
from mpserverd.arena.state import Str
from tests.integration import senders
from tests.integration.other_layout import daemon_of_another_layout
from tests.integration.supervisor_driver import wait_for
from tests.integration.test_supervisor_death import SEED, Unit, _copy_of_spool_lock, hashes

KILLS = int(os.environ.get("MPSERVERD_TEST_MOVE_KILLS", "12"))
"""Supervisors that are killed while they copy, store and remove."""


def buffers(size: str, chunk: str = "64 KiB") -> str:
    return f'{size}"\nchunk_bytes = "{chunk}'


class Streaming(threading.Thread):
    """A plain client that sends in pieces of odd sizes until it is told to end."""

    def __init__(self, port: int, number: int) -> None:
        super().__init__(daemon=True)
        self._chance = random.Random(SEED * 1000 + number)
        self._socket = socket.create_connection(("127.0.0.1", port))
        self.sent = bytearray()
        self.fault = ""
        self.over = threading.Event()

    def run(self) -> None:
        try:
            while not self.over.is_set():
                piece = self._chance.randbytes(self._chance.randrange(1, 40_000))
                self._socket.sendall(piece)
                self.sent += piece
                self.over.wait(self._chance.uniform(0, 0.02))
            self._socket.close()
        except OSError as error:
            self.fault = str(error)


@contextlib.contextmanager
def streaming(unit: Unit, count: int) -> Iterator[list[Streaming]]:
    """They have ended when this is over, and none of them noticed anything."""
    clients = [Streaming(unit.port, number) for number in range(count)]
    for client in clients:
        client.start()
    try:
        yield clients
    finally:
        for client in clients:
            client.over.set()
        for client in clients:
            client.join(60)
    assert [client.fault for client in clients] == [""] * count


def check_stored(unit: Unit, contents: list[bytes]) -> None:
    whole = sum(len(content) // 16 * 16 for content in contents)
    wait_for(lambda: unit.durable() == whole, 60)
    assert unit.stored() == hashes(contents)
    found = ledger(open_state(f"{unit.home}/control.sock"), every_stream=True)
    assert found["holds"], found


def geometry(unit: Unit) -> tuple[int, int]:
    live = buffers_of(open_state(f"{unit.home}/control.sock"))
    return live["bytes"], live["chunk_bytes"]


def moves(unit: Unit) -> int:
    return unit.log().count("memory moved")


MIB, KIB = 1 << 20, 1 << 10


def test_every_size_changes_at_a_restart_while_clients_stream(tmp_path: pathlib.Path) -> None:
    steps = [
        ("32 MiB", "64 KiB", 20, (32 * MIB, 64 * KIB)),  # larger
        ("24 MiB", "64 KiB", 20, (24 * MIB, 64 * KIB)),  # smaller
        ("24 MiB", "256 KiB", 20, (24 * MIB, 256 * KIB)),  # a coarser grid
        ("24 MiB", "4 KiB", 20, (24 * MIB, 4 * KIB)),  # a much finer one
        ("24 MiB", "64 KiB", 60, (24 * MIB, 64 * KIB)),  # more clients
    ]
    with Unit(tmp_path, buffers=buffers("16 MiB"), max_clients=10) as unit:
        with streaming(unit, 5) as clients:
            for number, (size, chunk, max_clients, expected) in enumerate(steps):
                unit.configure(buffers=buffers(size, chunk), max_clients=max_clients)
                (unit.leave if number % 2 else unit.kill)()
                assert geometry(unit) == expected
                assert moves(unit) == number + 1
                assert unit.active() == 5
            with contextlib.ExitStack() as stack:
                more = [stack.enter_context(socket.create_connection(("127.0.0.1", unit.port))) for _ in range(40)]
                wait_for(lambda: unit.active() == 45)
                for client in more:
                    client.sendall(bytes(16))
            unit.leave()
            assert moves(unit) == len(steps), "what is as it should be is not moved"
        check_stored(unit, [*(bytes(client.sent) for client in clients), *[bytes(16)] * 40])
        assert unit.system.stop() == 0
        assert unit.system.stored_names() == []


def fill(unit: Unit, contents: list[bytes], stack: contextlib.ExitStack) -> None:
    """Clients send everything; nobody stores it."""
    clients = [stack.enter_context(socket.create_connection(("127.0.0.1", unit.port))) for _ in contents]
    for client, content in zip(clients, contents, strict=True):
        client.sendall(content)
    with unit.tables() as state:
        wait_for(lambda: int(state.streams[:, Str.POSITION].sum()) == sum(map(len, contents)), 30)


@contextlib.contextmanager
def without_storer(unit: Unit) -> Iterator[None]:
    """As if an earlier storer hung in the kernel: whatever comes stays in memory."""
    held = _copy_of_spool_lock(unit)
    try:
        unit.kill()
        yield
    finally:
        os.close(held)


def test_an_arena_that_is_half_full_moves_whole(tmp_path: pathlib.Path) -> None:
    contents = [senders.payload(SEED + number, 1_500_000 + 1001 * number) for number in range(6)]
    with Unit(tmp_path, buffers=buffers("16 MiB")) as unit, contextlib.ExitStack() as stack:
        with without_storer(unit):
            fill(unit, contents, stack)
            for size, chunk in (("48 MiB", "64 KiB"), ("48 MiB", "8 KiB"), ("20 MiB", "128 KiB"), ("32 MiB", "64 KiB")):
                unit.configure(buffers=buffers(size, chunk))
                unit.leave()
            assert moves(unit) == 4
            assert unit.durable() == 0
        stack.close()
        check_stored(unit, contents)


def test_memory_that_is_too_small_for_what_is_held_waits_for_another_restart(tmp_path: pathlib.Path) -> None:
    contents = [senders.payload(SEED + number, 2_000_000) for number in range(4)]
    with Unit(tmp_path, buffers=buffers("16 MiB")) as unit, contextlib.ExitStack() as stack:
        with without_storer(unit):
            fill(unit, contents, stack)
            unit.configure(buffers=buffers("8 MiB"), max_clients=40)
            unit.leave()
            assert geometry(unit) == (16 * MIB, 64 * KIB)
            assert re.search(r"a setting waits.*key=buffers\.bytes.*chunks of 65536 bytes are held", unit.log())
            assert moves(unit) == 1, "what fits changes all the same: the rows for more clients"
        wait_for(lambda: unit.durable() == sum(len(content) // 16 * 16 for content in contents), 30)
        unit.leave()
        assert geometry(unit) == (8 * MIB, 64 * KIB)
        stack.close()
        check_stored(unit, contents)


def is_moving(unit: Unit, start: int) -> bool:
    """Whether that start, or a later one, has made fresh tables beside those that it found."""
    state = unit.system.state
    if state.starts < start or not state.pid:
        return False
    with contextlib.suppress(OSError):
        paths = [f"/proc/{state.pid}/fd/{name}" for name in os.listdir(f"/proc/{state.pid}/fd")]
        tables = {os.stat(path).st_ino for path in paths if "mpserverd-state" in os.readlink(path)}
        return state.ready or len(tables) > 1
    return False


def test_supervisors_that_are_killed_while_they_move_the_memory_leave_one_whole(tmp_path: pathlib.Path) -> None:
    """Each start has another size to move to, and most are killed on the way."""
    chance = random.Random(SEED)
    sizes = [buffers("48 MiB"), buffers("64 MiB", "16 KiB"), buffers("40 MiB", "256 KiB")]
    contents = [senders.payload(SEED + number, 4_000_000) for number in range(5)]
    with Unit(tmp_path, buffers=sizes[0], max_clients=20) as unit, contextlib.ExitStack() as stack:
        with without_storer(unit):
            fill(unit, contents, stack)
        with streaming(unit, 3) as clients:
            for number in range(KILLS):
                unit.configure(buffers=sizes[number % len(sizes)])
                start = unit.system.kill()
                wait_for(lambda start=start: is_moving(unit, start))  # type: ignore[misc]
                time.sleep(chance.uniform(0, 0.06))  # the moment is the point: somewhere in the move
            unit.kill()
        stack.close()
        print(f"seed {SEED}: {moves(unit)} of {KILLS + 1} moves came to their end")
        assert moves(unit)
        check_stored(unit, [*contents, *(bytes(client.sent) for client in clients)])
        assert len([name for name in unit.system.stored_names() if name.startswith("arena")]) == 1


def test_another_version_reads_the_memory_and_so_does_this_one_again(tmp_path: pathlib.Path) -> None:
    """Upgrade and downgrade with an arena half full; the other version's tables have other columns."""
    contents = [senders.payload(SEED + number, 1_200_000 + 777 * number) for number in range(6)]
    other = daemon_of_another_layout(tmp_path)
    with Unit(tmp_path, buffers=buffers("16 MiB")) as unit, contextlib.ExitStack() as stack:
        this, options = unit.system.command[:3], unit.system.command[3:]
        with without_storer(unit):
            fill(unit, contents, stack)
            unit.system.command = [*other, *options]
            unit.kill()
            unit.system.command = [*this, *options]
            unit.kill()
            assert moves(unit) == 2
            assert unit.active() == 6
        with streaming(unit, 3) as clients:
            for number in range(4):
                unit.system.command = [*(this if number % 2 else other), *options]
                unit.kill()
        stack.close()
        assert moves(unit) == 6
        assert "discarded" not in unit.log()
        check_stored(unit, [*contents, *(bytes(client.sent) for client in clients)])


def test_a_client_that_leaves_during_the_move_loses_nothing(tmp_path: pathlib.Path) -> None:
    content = senders.payload(SEED, 600_007)
    with Unit(tmp_path) as unit:
        with socket.create_connection(("127.0.0.1", unit.port)) as client:
            client.sendall(content[:100_000])
            wait_for(lambda: unit.active() == 1)
            unit.configure(buffers=buffers("24 MiB", "32 KiB"))
            start = unit.system.kill()
            client.sendall(content[100_000:])
        unit.system.wait_ready(start=start)
        wait_for(lambda: unit.active() == 0)
        assert moves(unit) == 1
        check_stored(unit, [content])
