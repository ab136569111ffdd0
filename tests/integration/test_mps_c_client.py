"""contrib/mps_client.c against servers that are written here from docs/protocol.md, good ones and nasty ones.

The nasty server cuts connections anywhere, tears answers, refuses, loses what it has not acknowledged, and keeps what a
correct client makes it keep; the oracle is the pattern that the client's own header promises. Every test runs with the
sanitizers too. ``MPSERVERD_TEST_SEED`` repeats a run, ``MPSERVERD_TEST_MPS_CUTS`` scales the number of connections.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import re
import select
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.integration.driver import DEADLINE_S, SLOWNESS
from tests.integration.senders import ROOT, needs

SEED = int(os.environ.get("MPSERVERD_TEST_SEED", random.SystemRandom().randrange(2**32)))
CUTS = int(os.environ.get("MPSERVERD_TEST_MPS_CUTS", "60"))
SIZE = 16
EPOCH = "00c0ffee00c0ffee"
HELLO = re.compile(
    rb"MPS/1 (?P<id>[\w.-]+) (?P<size>\d+)(?: token=(?P<token>[!-~]+))?"
    rb"(?: epoch=(?P<epoch>[0-9a-f]{16}) first=(?P<first>\d+))?\n"
)
FLAGS = {
    "optimized": ["-O2", "-std=c99", "-pedantic"],
    "sanitized": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
Serve = Callable[[socket.socket], None]


def compiled(directory: pathlib.Path, kind: str, *more: str) -> pathlib.Path:
    needs("gcc")
    path = directory / f"mps_client_{kind}"
    flags = [*FLAGS[kind], "-Wall", "-Wextra", "-Werror", *more]
    command = ["gcc", *flags, "-o", str(path), str(ROOT / "contrib" / "mps_client.c")]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    return path


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The client, with the sanitizers, so that each test is one of its memory too."""
    return compiled(tmp_path_factory.mktemp("mps_client"), "sanitized")


@pytest.fixture(scope="module")
def optimized(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The client as its own header says to compile it."""
    return compiled(tmp_path_factory.mktemp("mps_client"), "optimized")


def test_it_is_a_small_library_too(tmp_path: pathlib.Path) -> None:
    assert len((ROOT / "contrib" / "mps_client.c").read_text().splitlines()) < 300
    compiled(tmp_path, "optimized", "-DMPS_NO_MAIN", "-c")


def pattern(count: int, size: int = SIZE, first: int = 0) -> bytes:
    """What ``-n count -f first`` sends, by the comment at the top of the source."""
    packets = (
        (k.to_bytes(8, "little") + bytes((131 * k + j) % 256 for j in range(8, size)))[:size]
        for k in range(first, first + count)
    )
    return b"".join(packets)


def run(
    program: pathlib.Path, *arguments: str, exit_code: int = 0, content: bytes | None = None
) -> subprocess.CompletedProcess[bytes]:
    answer = subprocess.run(
        [program, "-v", "-d", f"{3 * DEADLINE_S * SLOWNESS:.0f}", *arguments],
        input=content, capture_output=True, timeout=4 * DEADLINE_S * SLOWNESS, check=False,
    )  # fmt: skip
    assert answer.returncode == exit_code, (answer.stdout[-2000:], answer.stderr[-4000:].decode())
    return answer


class Server:
    """Runs one function after the other, each with the next connection; the last one again and again."""

    def __init__(self, *serve: Serve) -> None:
        self._serve = serve
        self.served = 0
        self.faults: list[BaseException] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            client.settimeout(DEADLINE_S * SLOWNESS)
            with client, contextlib.suppress(ConnectionError):
                try:
                    self._serve[min(self.served, len(self._serve) - 1)](client)
                except (AssertionError, TimeoutError) as fault:
                    self.faults.append(fault)
            self.served += 1

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        assert not self.faults, self.faults


@contextlib.contextmanager
def serving(*serve: Serve) -> Iterator[Server]:
    server = Server(*serve)
    try:
        yield server
    finally:
        server.close()


def hello(client: socket.socket) -> re.Match[bytes]:
    line = b""
    while not line.endswith(b"\n"):
        byte = client.recv(1)
        if not byte:
            raise ConnectionError("closed before the hello")
        line += byte
    found = HELLO.fullmatch(line)
    assert found is not None, line
    return found


def receive(client: socket.socket, size_bytes: int) -> bytes:
    received = b""
    while len(received) < size_bytes:
        some = client.recv(size_bytes - len(received))
        if not some:
            raise ConnectionError("closed early")
        received += some
    return received


def refuse(text: str) -> Serve:
    def serve(client: socket.socket) -> None:
        hello(client)
        client.sendall(f"ERR {text}\n".encode())

    return serve


class Keeper:
    """A correct server: takes ``upto`` packets a connection, acknowledges each one, and checks every hello."""

    def __init__(self, epoch: str = EPOCH, upto: int = 10**9) -> None:
        self.epoch, self.upto = epoch, upto
        self.content = b""
        self.hellos: list[bytes] = []

    def __call__(self, client: socket.socket) -> None:
        said = hello(client)
        self.hellos.append(said[0])
        if said["epoch"] is not None and said["epoch"].decode() != self.epoch:
            client.sendall(b"ERR epoch another one\n")
            return
        assert said["first"] is None or int(said["first"]) <= self.next
        client.sendall(f"OK {self.next} durable {self.epoch}\n".encode())
        for _ in range(self.upto):
            self.content += receive(client, SIZE)
            client.sendall(f"ACK {self.next}\n".encode())

    @property
    def next(self) -> int:
        return len(self.content) // SIZE


def test_generated_packets_arrive_and_are_counted_as_they_are_acknowledged(program: pathlib.Path) -> None:
    keeper = Keeper()
    with serving(keeper) as server:
        answer = run(program, "-i", "press-7", "-n", "500", "-f", "2", "-t", "s3=cret", f"127.0.0.1:{server.port}")
    assert keeper.content == pattern(500, first=2)
    assert keeper.hellos == [b"MPS/1 press-7 16 token=s3=cret\n"]
    assert answer.stdout.split() == [word for n in range(1, 501) for word in (b"acked", b"%d" % n)]


def test_input_arrives_and_what_ends_inside_a_packet_is_said(program: pathlib.Path) -> None:
    content = random.Random(1).randbytes(SIZE * 300)
    keeper = Keeper()
    with serving(keeper) as server:
        run(program, f"localhost:{server.port}", content=content)
        answer = run(program, f"127.0.0.1:{server.port}", content=content + b"half", exit_code=1)
    assert keeper.content == content * 2
    assert b"input ends inside a packet" in answer.stderr


def test_a_rate_is_kept(program: pathlib.Path) -> None:
    keeper = Keeper()
    with serving(keeper) as server:
        late = run(program, "-n", "1000000", "-r", "200", "-d", "1", f"127.0.0.1:{server.port}", exit_code=1)
    assert b"mps_client:" in late.stderr
    assert 1 <= keeper.next <= 202
    assert keeper.content == pattern(keeper.next)


def test_a_lost_connection_is_resumed_with_the_epoch_and_the_oldest_packet(program: pathlib.Path) -> None:
    keeper = Keeper(upto=10)
    with serving(keeper) as server:
        run(program, "-n", "25", "-b", "4", f"127.0.0.1:{server.port}")
    assert keeper.content == pattern(25)
    assert keeper.hellos[0] == b"MPS/1 mps-client 16\n"
    for line, at_most in zip(keeper.hellos[1:], (10, 20), strict=True):
        first = int(line.rsplit(b"=", 1)[1])
        assert line == b"MPS/1 mps-client 16 epoch=%s first=%d\n" % (EPOCH.encode(), first)
        assert at_most - 4 <= first <= at_most


@pytest.mark.parametrize("code", ["syntax", "version", "client-id", "packet-size", "epoch", "token", "tomorrow"])
def test_a_final_refusal_ends_it_and_is_named(program: pathlib.Path, code: str) -> None:
    with serving(refuse(f"{code} because")) as server:
        answer = run(program, "-n", "5", f"127.0.0.1:{server.port}", exit_code=1)
        assert server.served <= 1
    assert f"ERR {code} because".encode() in answer.stderr


@pytest.mark.parametrize("code", ["timeout", "in-use", "busy", "unavailable", "quarantined"])
def test_a_passing_refusal_is_tried_again(program: pathlib.Path, code: str) -> None:
    keeper = Keeper()
    with serving(refuse(f"{code} later"), keeper) as server:
        run(program, "-n", "5", f"127.0.0.1:{server.port}")
    assert keeper.content == pattern(5)


def test_a_goodbye_with_a_time_is_obeyed(program: pathlib.Path) -> None:
    keeper = Keeper()

    def goodbye(client: socket.socket) -> None:
        hello(client)
        client.sendall(f"OK 0 durable {EPOCH}\nBYE superseded retry=1\n".encode())

    with serving(goodbye, keeper) as server:
        answer = run(program, "-n", "5", f"127.0.0.1:{server.port}")
    assert b"BYE superseded retry=1" in answer.stderr
    assert keeper.content == pattern(5)
    assert keeper.hellos == [b"MPS/1 mps-client 16 epoch=%s first=0\n" % EPOCH.encode()]


@pytest.mark.parametrize(
    "nonsense",
    [b"HTTP/1.1 400 Bad Request\n", b"x" * 600, b"OK 0\n", f"OK 0 durable {EPOCH}\nACK 1000000\n".encode()],
    ids=["http", "overlong", "short-ok", "ack-of-what-was-not-sent"],
)
def test_a_server_that_talks_nonsense_is_left_and_asked_again(program: pathlib.Path, nonsense: bytes) -> None:
    keeper = Keeper()

    def babble(client: socket.socket) -> None:
        hello(client)
        client.sendall(nonsense)
        while client.recv(4096):
            pass

    with serving(babble, keeper) as server:
        run(program, "-n", "5", f"127.0.0.1:{server.port}")
    assert keeper.content == pattern(5)


def test_a_numbering_that_is_not_ours_ends_it(program: pathlib.Path) -> None:
    keeper = Keeper(upto=3)
    with serving(
        keeper, lambda client: (hello(client), client.sendall(f"OK 900 durable {EPOCH}\n".encode()))
    ) as server:  # type: ignore[func-returns-value,arg-type,return-value]
        answer = run(program, "-n", "5", f"127.0.0.1:{server.port}", exit_code=1)
    assert b"another device" in answer.stderr


def test_the_next_server_is_taken_and_numbers_by_itself(program: pathlib.Path) -> None:
    """The first dies for good after 10 packets; the second knows another epoch. Nothing is missing between the two."""
    first, second = Keeper(upto=10), Keeper(epoch="00000000deadbeef")
    other = serving(second)
    with other as spare:
        server = Server(first)
        done = threading.Event()

        def serve_once(client: socket.socket) -> None:
            first(client)
            done.set()

        server._serve = (serve_once,)
        with subprocess.Popen(
            [program, "-n", "30", "-b", "8", "-d", "30", f"127.0.0.1:{server.port},127.0.0.1:{spare.port}"]
        ) as client:
            assert done.wait(DEADLINE_S * SLOWNESS)
            server.close()
            assert client.wait(2 * DEADLINE_S * SLOWNESS) == 0
    whole = pattern(30)
    kept, rest = first.content[: 16 * 10], second.content
    assert whole.startswith(kept) and whole.endswith(rest)
    assert len(kept) + len(rest) >= len(whole)
    assert second.hellos[0].startswith(b"MPS/1 mps-client 16 epoch=" + EPOCH.encode())
    assert second.hellos[1] == b"MPS/1 mps-client 16\n"


def test_the_bare_hello_is_for_the_server_that_has_not_our_epoch(program: pathlib.Path) -> None:
    """It refuses the epoch and is gone when it is asked without; the one that gave the epoch is told of it as ever."""
    hellos: list[bytes] = []

    def serve(client: socket.socket) -> None:
        """Ten packets of which five are kept, nothing, and the other five."""
        hellos.append(hello(client)[0])
        if len(hellos) == 2:
            return
        first = 5 if len(hellos) > 1 else 0
        client.sendall(b"OK %d durable %s\n" % (first, EPOCH.encode()))
        client.recv((10 - first) * SIZE, socket.MSG_WAITALL)  # all of them: what is unread would be a reset
        client.sendall(b"ACK %d\n" % (first + 5))
        if first:
            client.recv(1)

    with (
        socket.create_server(("127.0.0.1", 0)) as second,
        serving(serve) as server,
        subprocess.Popen(
            [program, "-n", "10", "-d", "30", f"127.0.0.1:{server.port},127.0.0.1:{second.getsockname()[1]}"]
        ) as client,
    ):
        second.settimeout(DEADLINE_S * SLOWNESS)
        refused, _ = second.accept()
        second.close()
        with refused:
            assert hello(refused)[0] == b"MPS/1 mps-client 16 epoch=%s first=5\n" % EPOCH.encode()
            refused.sendall(b"ERR epoch another one\n")
        assert client.wait(2 * DEADLINE_S * SLOWNESS) == 0
    assert hellos == [b"MPS/1 mps-client 16\n"] + [b"MPS/1 mps-client 16 epoch=%s first=5\n" % EPOCH.encode()] * 2


def test_a_server_that_knows_nothing_is_not_given_the_epoch_of_another(program: pathlib.Path) -> None:
    """The first takes packets, acknowledges none, and is gone: the second numbers from 0 under an epoch of its own."""
    keeper = Keeper(epoch="00000000deadbeef")
    with (
        socket.create_server(("127.0.0.1", 0)) as first,
        serving(keeper) as server,
        subprocess.Popen(
            [program, "-n", "10", "-d", "30", f"127.0.0.1:{first.getsockname()[1]},127.0.0.1:{server.port}"]
        ) as client,
    ):
        first.settimeout(DEADLINE_S * SLOWNESS)
        taken, _ = first.accept()
        first.close()
        with taken:
            hello(taken)
            taken.sendall(b"OK 0 durable %s\n" % EPOCH.encode())
            taken.recv(SIZE)
        assert client.wait(2 * DEADLINE_S * SLOWNESS) == 0
    assert keeper.hellos[0] == b"MPS/1 mps-client 16\n"
    assert keeper.content == pattern(10)


def test_bad_usage_is_said(program: pathlib.Path) -> None:
    for arguments in ([], ["-s", "x", "h:1"], ["-s", "0", "h:1"], ["-b", "0", "h:1"], ["-q", "h:1"], ["h:1", "h:2"]):
        answer = subprocess.run([program, *arguments], capture_output=True, check=False, timeout=DEADLINE_S * SLOWNESS)
        assert answer.returncode == 2, arguments
        assert answer.stderr


def test_a_server_that_cannot_be_reached_is_named(program: pathlib.Path) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        for server in (f"127.0.0.1:{bound.getsockname()[1]}", "nocolon,[::1:1,:1"):
            answer = run(program, "-n", "1", "-d", "1", server, exit_code=1)
            for each in server.split(","):
                assert f"mps_client: {each}: ".encode() in answer.stderr


# -- the nasty one


class Nasty:
    """Keeps ``content``, of which ``durable`` bytes survive a power cut; each connection ends in some bad way."""

    def __init__(self, rng: random.Random, size: int, cuts: int) -> None:
        self.rng, self.size, self.cuts = rng, size, cuts
        self.content = b""
        self.acked = 0
        self.epoch: str | None = None
        self.power_cuts = 0

    def __call__(self, client: socket.socket) -> None:
        rng = self.rng
        said = hello(client)
        assert int(said["size"]) == self.size
        if self.epoch is None or (said["epoch"] is None and not self.content):
            self.epoch = f"{rng.randrange(2**64):016x}"
        if said["epoch"] is not None:
            assert said["epoch"].decode() == self.epoch
            assert int(said["first"]) <= self.acked, "the client let go of what was not acknowledged"
        else:
            assert not self.content, "the client had an OK and forgot its epoch"
        if self._spoil(client, "OK " + self._where()):
            return
        rest = b""
        while True:
            some = client.recv(rng.choice((1, 5, 100, 4096)))
            rest += some
            whole = len(rest) - len(rest) % self.size
            self.content, rest = self.content + rest[:whole], rest[whole:]
            if not some:
                return
            if self.cuts and rng.random() < 0.15:
                self._end(client)
                return
            waits = not select.select([client], [], [], 0)[0]  # perhaps for us: an answer is owed in the end
            if (waits and self.acked * self.size < len(self.content)) or rng.random() < 0.4:
                self._acknowledge(client)

    def _where(self) -> str:
        self.acked = len(self.content) // self.size
        return f"{self.acked} {self.rng.choice(('durable', 'stored'))} {self.epoch}\n"

    def _acknowledge(self, client: socket.socket) -> None:
        """Sometimes a worker died in the middle of a line: its successor begins with LF."""
        before = self.acked
        line = "ACK " + self._where().split()[0] + "\n"
        torn = ("ACK " + str(before + self.rng.randrange(self.acked - before + 1)))[: self.rng.randrange(6)]
        client.sendall((torn + "\n" + line if self.rng.random() < 0.3 else line).encode())

    def _spoil(self, client: socket.socket, line: str) -> bool:
        """Sends the OK, or not quite; True when the connection is over."""
        kind = self.rng.randrange(12) if self.cuts else 11
        if kind > 3:
            client.sendall(line.encode())
            return False
        self.cuts -= 1
        client.sendall(
            (b"", b"BYE stopping retry=0\n", b"ERR unavailable disk\n", line[: self.rng.randrange(20)].encode())[kind]
        )
        return True

    def _end(self, client: socket.socket) -> None:
        self.cuts -= 1
        kind = self.rng.randrange(4)
        if kind == 0:
            self.content = self.content[: self.acked * self.size]
            self.power_cuts += 1
        elif kind == 1:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif kind == 2:
            client.sendall(b"BYE kicked retry=0\n")


def survive(program: pathlib.Path, size: int, capacity: int, count: int) -> None:
    print(f"MPSERVERD_TEST_SEED={SEED}")
    nasty = Nasty(random.Random(SEED), size, CUTS // 3)
    with serving(nasty) as server:
        answer = run(program, "-s", str(size), "-n", str(count), "-b", str(capacity), f"127.0.0.1:{server.port}")
    acknowledged = [int(word) for word in re.findall(rb"acked (\d+)", answer.stdout)]
    assert nasty.content == pattern(count, size)
    assert acknowledged == sorted(set(acknowledged))
    assert nasty.acked == count


@pytest.mark.parametrize(("size", "capacity", "count"), [(16, 64, 3000), (1, 7, 4000), (1000, 3, 400)])
def test_nothing_is_lost_or_doubled_through_cuts_torn_answers_and_power_cuts(
    program: pathlib.Path, size: int, capacity: int, count: int
) -> None:
    survive(program, size, capacity, count)


def test_the_optimized_one_does_the_same(optimized: pathlib.Path) -> None:
    survive(optimized, 804, 50, 1000)
