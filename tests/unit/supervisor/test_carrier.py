"""Carriers: what they hold is never in none of them, wherever the exchange is cut off."""

from __future__ import annotations

import contextlib
import functools
import gc
import mmap
import os
import pathlib
import random
import signal
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest

from mpserverd.arena.state import StateTable
from mpserverd.errors import StartError
from mpserverd.load.stand_in_socket import NotifySocket
from mpserverd.load.stand_in_store import FdStore as Stored
from mpserverd.supervisor import takeover
from mpserverd.supervisor.carrier import SINGLES_MAX, Carrier, CarrierFullError
from mpserverd.supervisor.fd_store import FdStore
from mpserverd.supervisor.keeping import Keeping, carrier_names, carrier_number
from mpserverd.supervisor.loop import Loop
from mpserverd.supervisor.takeover import Unloading, whole_carriers

KILLS = int(os.environ.get("MPSERVERD_TEST_KILLS", "100"))
SEED = int(os.environ.get("MPSERVERD_TEST_SEED", "10"))
CONNECTIONS = 300
COOKIES = 1 << 20
"""Cookies that one run of the gate may use."""
STORE_MAX = 256
"""FileDescriptorStoreMax of the unit."""
UNUSED, CARRIED, OVER = 0, 1, 2


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
    gc.collect()  # what other tests left may close descriptors
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
        self.held = Stored(STORE_MAX, SEED)

    def close(self) -> None:
        self.socket.close()
        self.held.close()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """It hears while the body runs."""
        over = threading.Event()

        def run() -> None:
            while not over.wait(0.001):
                self.hear()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.hear()

    def keep(self, number: int, carrier: Carrier) -> None:
        """As if it had been pushed."""
        for name, end in zip(carrier_names(number), carrier.ends, strict=True):
            self.held.push([os.dup(end)], name)

    def towards(self) -> FdStore:
        return FdStore({"NOTIFY_SOCKET": self.socket.name})

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


@pytest.fixture
def store(tmp_path: pathlib.Path) -> Iterator[Store]:
    with contextlib.closing(Store(tmp_path)) as made:
        yield made


@functools.cache
def state_table() -> StateTable:
    return StateTable.create(connections=2, streams=2, slots=2)


def small_core() -> Any:
    """As much of a core as Keeping looks at."""
    return types.SimpleNamespace(loop=Loop(), state=state_table())


def keeping_of(store: Store, live: Callable[[], list[tuple[int, int]]]) -> tuple[Keeping, Callable[[], None]]:
    """One that has its first carrier in the store, and what makes it hear the store's answers."""
    core = small_core()
    keeping = Keeping(core, store.towards(), live)

    def settle() -> None:
        deadline_s = time.monotonic() + 20
        while keeping.not_kept():
            assert time.monotonic() < deadline_s
            store.hear()
            core.loop.run_once()
        store.hear()

    keeping.begin()
    settle()
    return keeping, settle


def fill_up(carrier: Carrier, fd: int) -> None:
    """As the kernel does when it has no room for more."""
    with pytest.raises(CarrierFullError):
        for number in range(COOKIES, 2 * COOKIES):
            carrier.put([(number, fd)])


def test_a_newcomer_is_carried_before_carriers_are_exchanged(store: Store, files: list[int]) -> None:
    """Packing takes milliseconds; a kill meanwhile must not find it in none."""
    connections: list[tuple[int, int]] = []
    seen: list[bool] = []

    def live() -> list[tuple[int, int]]:
        store.hear()
        if connections:
            seen.append(len(connections) + 1 in store.cookies())
        return connections

    keeping, settle = keeping_of(store, live)
    with contextlib.closing(keeping):
        for entry in entries(files[: SINGLES_MAX + 1]):
            keeping.carry(*entry)
            connections.append(entry)
        assert seen == [True]
        settle()
        assert store.cookies() == {cookie for cookie, _ in connections}


def test_who_got_into_the_old_carrier_only_gets_into_another_one(store: Store, files: list[int]) -> None:
    connections = entries(files[:20])
    keeping, settle = keeping_of(store, lambda: connections)
    with contextlib.closing(keeping):
        keeping.pack()
        fill_up(keeping._carriers[-1][1], files[0])
        keeping.carry(21, files[20])
        connections.append((21, files[20]))
        settle()
        assert {cookie for cookie, _ in connections} <= store.cookies()


def test_who_got_into_no_carrier_is_tried_again_within_a_second(store: Store, files: list[int]) -> None:
    connections = entries(files[:20])
    keeping, settle = keeping_of(store, lambda: connections)
    with contextlib.closing(keeping):
        fill_up(keeping._carriers[-1][1], files[0])
        keeping._carriers[-1][1]._single_count = 0  # nothing but the tick makes for another carrier
        keeping.carry(21, files[20])
        connections.append((21, files[20]))
        assert 21 not in store.cookies()
        keeping.tick()
        settle()
        assert store.cookies() == set(range(1, 22))


def test_an_exchange_that_failed_is_made_up_for(store: Store, files: list[int]) -> None:
    connections = entries(files[:20])
    more = [(number, files[0]) for number in range(100, 40_000)]
    keeping, settle = keeping_of(store, lambda: connections)
    with contextlib.closing(keeping):
        keeping.pack()
        fill_up(keeping._carriers[-1][1], files[0])
        keeping.carry(21, files[20])
        connections += [(21, files[20]), *more]  # so many fit into no carrier
        settle()
        assert 21 not in store.cookies()
        del connections[21:]
        keeping.tick()
        settle()
        assert store.cookies() == set(range(1, 22))


def test_more_singles_than_one_carrier_takes_go_into_two(store: Store, files: list[int]) -> None:
    """Those that had ended when the newest was packed, and all who came while the store did not answer."""
    every_one = [(number, files[0]) for number in range(1, 601)]
    with contextlib.closing(Carrier.make()) as older, contextlib.closing(Carrier.make()) as newest:
        for entry in every_one[:150]:
            older.put([entry])
        for entry in every_one[150:]:
            newest.put([entry])
        assert not newest.is_full
        store.keep(1, older)
        store.keep(2, newest)
    towards = store.towards()
    unloading = Unloading(towards, whole_carriers(store.ends(), towards), 3)
    with store.listening():
        fresh = unloading.run()
    assert [number for number, _ in fresh] == [3, 4] and store.numbers() == {3, 4}
    assert sorted(unloading.fds) == [cookie for cookie, _ in every_one]
    assert store.cookies() == set(unloading.fds)
    keeping = Keeping(small_core(), towards, lambda: list(unloading.fds.items()))
    keeping.take_up(fresh, unloading.next_number)
    keeping.begin()
    with store.listening():
        deadline_s = time.monotonic() + 20
        while keeping.not_kept():
            assert time.monotonic() < deadline_s
            keeping._core.loop.run_once()
    assert store.numbers() == {5}
    assert store.cookies() == set(unloading.fds)
    keeping.close()
    for fd in unloading.fds.values():
        os.close(fd)


def test_old_carriers_are_not_emptied_into_one_that_the_store_may_not_have(
    store: Store, files: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(takeover, "BARRIER_S", 0.05)
    with contextlib.closing(Carrier.make()) as old:
        old.fill(entries(files))
        store.keep(1, old)
    with contextlib.closing(store.towards()) as towards:
        old_ones = whole_carriers(store.ends(), towards)
        with pytest.raises(StartError, match="does not answer"):
            Unloading(towards, old_ones, 2).run()
        for _, carrier in old_ones:
            carrier.close()
    store.hear()
    assert store.numbers() == {1}
    assert store.cookies() == set(range(1, CONNECTIONS + 1))


def test_carriers_that_hold_nothing_are_removed_at_once(store: Store, files: list[int]) -> None:
    """Starts that are killed leave them behind; the store has few places, and says nothing when it is full."""
    for number in range(1, STORE_MAX // 2):
        with contextlib.closing(Carrier.make()) as one:
            if number == 7:
                one.fill(entries(files))
            store.keep(number, one)
    with contextlib.closing(store.towards()) as towards:
        unloading = Unloading(towards, whole_carriers(store.ends(), towards), STORE_MAX)
        with store.listening():
            fresh = unloading.run()
        assert store.numbers() == {STORE_MAX}
        assert store.cookies() == set(unloading.fds) == set(range(1, CONNECTIONS + 1))
        fresh[0][1].close()
        for fd in unloading.fds.values():
            os.close(fd)


# -- killed at any instant


class Life:
    """What one supervisor does with carriers from its start on, until it is killed: newcomers, ends, exchanges.

    ``ledger`` has a byte for each cookie and outlives it: CARRIED once a carrier has it, OVER before its end.
    """

    def __init__(self, store: Store, ledger: mmap.mmap, seed: int) -> None:
        self._chance = random.Random(seed)
        self._ledger = ledger
        towards = store.towards()
        unloading = Unloading(towards, whole_carriers(store.ends(), towards), max(store.numbers()) + 1)
        fresh = unloading.run()
        self._live = {cookie: fd for cookie, fd in unloading.fds.items() if ledger[cookie] != OVER}
        for cookie in self._live:
            ledger[cookie] = CARRIED
        self._next = max(ledger.rfind(bytes([CARRIED])), ledger.rfind(bytes([OVER])), *unloading.fds) + 1
        core = small_core()
        self._loop = core.loop
        self._keeping = Keeping(core, towards, lambda: list(self._live.items()))
        self._keeping.take_up(fresh, unloading.next_number)
        self._keeping.begin()

    def go_on_for_ever(self) -> NoReturn:
        while True:
            for _ in range(self._chance.randrange(2 * SINGLES_MAX)):
                if self._keeping.has_room():
                    self._come()
            while len(self._live) > self._chance.randrange(CONNECTIONS, 2 * CONNECTIONS):
                self._end()
            if self._chance.random() < 0.1:
                self._keeping.tick()
            self._loop.after(0.0005, lambda: None)
            self._loop.run_once()

    def _come(self) -> None:
        cookie, self._next = self._next, self._next + 1
        fd = os.dup(next(iter(self._live.values())))
        self._keeping.carry(cookie, fd)
        self._ledger[cookie] = CARRIED
        self._live[cookie] = fd

    def _end(self) -> None:
        cookie = next(iter(self._live))
        self._ledger[cookie] = OVER
        os.close(self._live.pop(cookie))
        self._keeping.ended()


def killed_after(store: Store, ledger: mmap.mmap, life_s: float, chance: random.Random) -> None:
    """One life. The store may be slow, and may never hear what was said last."""
    seed = chance.randrange(1 << 32)
    pid = os.fork()
    if pid == 0:
        try:
            Life(store, ledger, seed).go_on_for_ever()
        finally:
            os._exit(1)
    killed_s = time.monotonic() + life_s
    while (left_s := killed_s - time.monotonic()) > 0:
        store.hear()
        time.sleep(min(left_s, chance.choice((0.0, 0.0, 0.002, 0.01))))  # systemd is busy
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    store.hear(drop=chance.random() < 0.5)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, "the exchange failed by itself"


def test_no_connection_is_in_no_carrier_wherever_the_exchange_is_killed(store: Store, files: list[int]) -> None:
    """Newcomers and ends all the while, as many as come; starts that are killed too."""
    chance = random.Random(SEED)
    with contextlib.closing(Carrier.make()) as first, mmap.mmap(-1, COOKIES) as ledger:
        first.fill(entries(files))
        store.keep(1, first)
        ledger[1 : CONNECTIONS + 1] = bytes([CARRIED]) * CONNECTIONS
        numbers: set[int] = set()
        for kill in range(KILLS):
            killed_after(store, ledger, chance.uniform(0, 0.05), chance)
            living = {cookie for cookie in range(ledger.rfind(bytes([CARRIED])) + 1) if ledger[cookie] == CARRIED}
            missing = living - store.cookies()
            assert not missing, f"kill {kill} of seed {SEED}: {sorted(missing)[:9]} of {len(living)}"
            assert len(living) >= CONNECTIONS
            numbers |= store.numbers()
        assert len(numbers) > KILLS / 4, "hardly any exchange came far enough to be cut off"
        assert ledger.rfind(bytes([OVER])) > CONNECTIONS, "hardly anybody came and went"
