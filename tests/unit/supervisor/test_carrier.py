"""Carriers: what they hold is never in none of them, wherever the exchange is cut off."""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import signal
import time
import types
from collections.abc import Iterator
from typing import NoReturn

import pytest

from mpserverd.load.stand_in_socket import NotifySocket
from mpserverd.load.stand_in_store import FdStore as Stored
from mpserverd.supervisor.carrier import SINGLES_MAX, Carrier
from mpserverd.supervisor.fd_store import FdStore
from mpserverd.supervisor.keeping import Keeping, carrier_names, carrier_number
from mpserverd.supervisor.loop import Loop
from mpserverd.supervisor.takeover import Unloading, whole_carriers

KILLS = int(os.environ.get("MPSERVERD_TEST_KILLS", "100"))
SEED = int(os.environ.get("MPSERVERD_TEST_SEED", "10"))
CONNECTIONS = 300


def entries(fds: list[int]) -> list[tuple[int, int]]:
    return [(number + 1, fd) for number, fd in enumerate(fds)]


@pytest.fixture
def files() -> Iterator[list[int]]:
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(CONNECTIONS)]
    yield fds
    for fd in fds:
        os.close(fd)


def test_names_tell_their_number() -> None:
    assert [carrier_number(name) for name in carrier_names(17)] == [17, 17]
    assert [carrier_number(name) for name in ("state", "carrier-x-in", "carrier-1", "listener-carrier-1-in")] == [
        None
    ] * 4


def test_what_is_put_in_comes_out_with_its_cookie(files: list[int]) -> None:
    with contextlib.closing(Carrier.make()) as carrier:
        carrier.fill(entries(files))
        assert not carrier.wants_packing
        taken = dict(carrier.take_all())
        assert sorted(taken) == list(range(1, CONNECTIONS + 1))
        for fd in taken.values():
            os.close(fd)
        assert list(carrier.take_all()) == []


def test_only_what_is_wanted_moves_to_another_carrier(files: list[int]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with contextlib.closing(Carrier.make()) as old, contextlib.closing(Carrier.make()) as fresh:
        old.fill(entries(files))
        moved = list(fresh.refill_from(old, lambda cookie: cookie % 3 == 0))
        assert [cookie for cookie, _ in moved] == list(range(3, CONNECTIONS + 1, 3))
        again = list(fresh.take_all())
        assert [cookie for cookie, _ in again] == [cookie for cookie, _ in moved]
        for _, fd in moved + again:
            os.close(fd)
    assert len(os.listdir("/proc/self/fd")) == before


def test_singles_fit_beside_sixteen_thousand_packed_ones(files: list[int]) -> None:
    """What LimitNOFILE of the unit allows, until it is packed anew."""
    with contextlib.closing(Carrier.make()) as carrier:
        carrier.fill((number, files[0]) for number in range(14_000))
        for number in range(SINGLES_MAX):
            assert not carrier.wants_packing
            carrier.put([(number, files[0])])
        assert carrier.wants_packing
        assert not carrier.is_full


@pytest.mark.parametrize("packed", [0, 4_700, 14_000])
def test_a_carrier_says_in_time_that_it_is_full(files: list[int], packed: int) -> None:
    with contextlib.closing(Carrier.make()) as carrier:
        carrier.fill((number, files[0]) for number in range(packed))
        count = 0
        while not carrier.is_full:
            carrier.put([(count, files[0])])
            count += 1
        assert count > SINGLES_MAX


class Store:
    """The service manager's side: takes notifications, and looks into the carriers that it has."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.socket = NotifySocket(directory / "notify")
        self.held = Stored(64, SEED)

    def close(self) -> None:
        self.socket.close()
        self.held.close()

    def hear(self, *, drop: bool = False) -> None:
        while (message := self.socket.receive()) is not None:
            if message.says("FDSTORE=1") and not drop:
                self.held.push(message.fds, message.value("FDNAME"))
                continue
            if message.says("FDSTOREREMOVE=1") and not drop:
                self.held.remove(message.value("FDNAME") or "")
            for fd in message.fds:
                os.close(fd)

    def numbers(self) -> set[int]:
        return {number for name in self.held.names() if (number := carrier_number(name)) is not None}

    def ends(self) -> dict[int, dict[str, int]]:
        """Copies of what is in the store, by number and name."""
        found: dict[int, dict[str, int]] = {}
        for entry in self.held.hand_back():
            number = carrier_number(entry.name)
            if number is not None:
                found.setdefault(number, {})[entry.name] = os.dup(entry.fd)
        return found

    def carriers(self) -> list[tuple[int, Carrier]]:
        """Each whole pair in the store, on copies of its ends."""
        return whole_carriers(self.ends(), FdStore({}))

    def cookies(self) -> set[int]:
        """Of everything that lies in the carriers: taken out, and put back."""
        found: set[int] = set()
        for _, carrier in self.carriers():
            with contextlib.closing(carrier), contextlib.closing(Carrier.make()) as aside:
                moved = list(aside.refill_from(carrier, lambda _: True))
                back = list(carrier.refill_from(aside, lambda _: True))
                found |= {cookie for cookie, _ in moved}
                for _, fd in moved + back:
                    os.close(fd)
        return found


def exchange_for_ever(store: Store) -> NoReturn:
    """What a supervisor does with carriers, from its start on."""
    towards = FdStore({"NOTIFY_SOCKET": store.socket.name})
    unloading = Unloading(towards, whole_carriers(store.ends(), towards), max(store.numbers()) + 1)
    fresh = unloading.run()
    assert fresh is not None
    core = types.SimpleNamespace(loop=Loop())
    keeping = Keeping(core, towards, lambda: list(unloading.fds.items()))  # type: ignore[arg-type]
    keeping.take_up(*fresh)
    while True:
        keeping.pack()
        for cookie, fd in list(unloading.fds.items())[:100]:
            keeping.carry(cookie, fd)
        core.loop.run_once()


def killed_after(store: Store, life_s: float, *, deaf: bool) -> None:
    """One life of the exchange. ``deaf``: what it said last is never heard."""
    pid = os.fork()
    if pid == 0:
        try:
            exchange_for_ever(store)
        finally:
            os._exit(1)
    killed_s = time.monotonic() + life_s
    while time.monotonic() < killed_s:
        store.hear()
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    store.hear(drop=deaf)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, "the exchange failed by itself"


def test_no_connection_is_in_no_carrier_wherever_the_exchange_is_killed(
    tmp_path: pathlib.Path, files: list[int]
) -> None:
    chance = random.Random(SEED)
    with contextlib.closing(Store(tmp_path)) as store:
        with contextlib.closing(Carrier.make()) as first:
            first.fill(entries(files))
            for name, end in zip(carrier_names(1), first.ends, strict=True):
                store.held.push([os.dup(end)], name)
        everything, numbers = set(range(1, CONNECTIONS + 1)), set()
        for kill in range(KILLS):
            killed_after(store, chance.uniform(0, 0.012), deaf=chance.random() < 0.5)
            assert store.cookies() == everything, f"kill {kill} of seed {SEED}"
            numbers |= store.numbers()
        assert len(numbers) > KILLS / 4, "hardly any exchange came far enough to be cut off"
