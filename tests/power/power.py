"""Cuts the power of a running daemon, many times from one seed: ``power.py --kind ext4 --seed 7 --cuts 20``.

A life under load is logged by its disk. Then, for many instants of that life: the disk as a cut there leaves it, a
fresh daemon on it, and the same clients, standing where they stood at that instant. Everything that had been
acknowledged must be there, in order, once; what lies behind is named in the journal and counted; the clients go on, and
at the end every stream is what was sent. The last cut of a life is lived on under load and cut again; after
LIVES_OF_A_DISK comes a fresh disk with another plan.

It makes namespaces of its own for mounts, processes and the network, so that nothing is left when it ends, however it
ends. Prints a line for each cut; exits 1 at the first that lost something, 77 where this machine cannot do it.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import pathlib
import random
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from tests.power.clients import Mark, Source
from tests.power.crash import Fate
from tests.power.disk import Cut, Disk, FileSystemKind, Pair, fresh_disk
from tests.power.life import KIB, Life, Plan

CANNOT = 77
CUTS_OF_A_LIFE = 3
LIVES_OF_A_DISK = 2
SENT_BYTES_MAX = 32 << 20
"""By all clients in one life: all lives of a disk fit on it."""
INSTANTS_TRIED = 50
LOSSY = [fate for fate in Fate if fate is not Fate.ALL_KEPT]
_INSIDE = "MPSERVERD_TEST_POWER_INSIDE"
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    if os.environ.get(_INSIDE) != "1":
        return _enter_namespaces(arguments)
    _raise_loopback()
    directory = pathlib.Path(tempfile.mkdtemp(prefix="mpsd-power-", dir="/dev/shm"))
    try:
        boot = directory / "boot_id"
        _new_boot(boot)
        subprocess.run(["mount", "--bind", boot, _BOOT_ID], check=True)
        proof = Proof(FileSystemKind(options.kind), options.seed, directory, raw_only=options.raw)
        proof.run(options.cuts)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=[kind.value for kind in FileSystemKind], required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--cuts", type=int, default=20)
    parser.add_argument("--raw", action="store_true", help="clients without a protocol only")
    return parser


def _enter_namespaces(arguments: Sequence[str]) -> int:
    """Run this program as the first process of fresh namespaces; everything in them ends with it."""
    if os.geteuid() != 0:
        print("needs root: it mounts file systems", file=sys.stderr)
        return CANNOT
    missing = [
        program for program in ("unshare", "mkfs.ext4", "mkfs.xfs") if shutil.which(program, path=_path()) is None
    ]
    if missing or not os.path.exists("/dev/fuse") or not os.path.exists("/dev/loop-control"):
        print(f"not here: {', '.join(missing) or '/dev/fuse or /dev/loop-control'}", file=sys.stderr)
        return CANNOT
    inside = ["unshare", "--mount", "--propagation=private", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    probe = subprocess.run([*inside, "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        print(f"namespaces cannot be made here: {probe.stderr.strip()}", file=sys.stderr)
        return CANNOT
    environment = {**os.environ, _INSIDE: "1", "PATH": _path()}
    command = [*inside, sys.executable, __file__, *arguments]
    return os.execvpe(inside[0], command, environment)  # does not return: who kills this process kills all of it


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _raise_loopback() -> None:
    with socket.socket() as any_socket:
        request = struct.pack("16sH14x", b"lo", 0)
        (flags,) = struct.unpack_from("H", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request), 16)
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | _IFF_UP))


def _new_boot(boot: pathlib.Path) -> None:
    """The kernel of these namespaces tells this one from now on."""
    boot.write_text(f"{uuid.uuid4()}\n")


class Proof:
    """Everything that one seed does."""

    def __init__(self, kind: FileSystemKind, seed: int, directory: pathlib.Path, *, raw_only: bool):
        self._kind = kind
        self._seed = seed
        self._directory = directory
        self._raw_only = raw_only
        self._cuts_done = 0
        self._cuts_under_load = 0
        self._unsettled = 0
        self._acked = 0

    def _plan_anew(self) -> None:
        self._random = self._chooser("plan")
        self.plan = self._choose()
        self._sources = [
            Source(f"press-{number + 1}", size, self._seed * 100 + number)
            for number, size in enumerate(self.plan.packet_sizes)
        ]

    def _chooser(self, what: str) -> random.Random:
        """The same choices in every run, however many were made of something else before."""
        return random.Random(f"{self._kind.value} {self._seed} {what} {self._cuts_done}")

    def _choose(self) -> Plan:
        choose = self._random
        count = choose.choice((1, 3, 6, 9))
        raw = count if self._raw_only else choose.choice((0, 0, 1))
        sizes = [16 if number < raw else choose.choice((16, 16, 24, 32, 7, 1000)) for number in range(count)]
        segment_bytes = choose.choice((64, 64, 128, 1024)) * KIB
        return Plan(
            packet_sizes=sizes,
            raw=raw,
            segment_bytes=segment_bytes,
            commit_interval_s=choose.choice((0.01, 0.05, 0.1)),
            retained_bytes=choose.choice((0, 0, max(256 * KIB, 2 * segment_bytes))),
            kills=choose.randrange(3),
        )

    def run(self, cuts: int) -> None:
        began_s = time.monotonic()
        print(f"kind={self._kind.value} seed={self._seed}", flush=True)
        while self._cuts_done < cuts:
            self._plan_anew()
            print(self.plan, flush=True)
            self._use_up_a_disk(cuts)
        assert self._cuts_under_load, "no cut took anything while something was acknowledged: nothing is proven"
        print(
            f"{self._cuts_done} cuts, nothing lost, {self._cuts_under_load} of them took changes; together "
            f"{self._unsettled} unsynced, {self._acked} bytes acknowledged, {time.monotonic() - began_s:.1f} s",
            flush=True,
        )

    def _use_up_a_disk(self, cuts: int) -> None:
        life: Life | None = self._live(fresh_disk(self._kind, self._directory), [Mark()] * len(self._sources))
        for lives_left in reversed(range(LIVES_OF_A_DISK)):
            if life is None:
                return
            following = None
            first, last = self._cuts_done, min(cuts, self._cuts_done + CUTS_OF_A_LIFE)
            while self._cuts_done < last:
                goes_on = self._cuts_done == last - 1 and last < cuts and lives_left > 0
                following = self._cut(life, is_first=self._cuts_done == first, goes_on=goes_on)
            life.disk.close()
            life = following

    def _live(self, disk: Disk | Pair, marks: Sequence[Mark]) -> Life:
        """A life under load that ends with kill -9 of everything."""
        choose = self._random
        with Life(self.plan, disk, self._directory, self._sources, marks) as life:
            with self._explained(life):
                life.take_up_raw()
                life.go_on(random.Random(choose.random()), min(8 << 20, SENT_BYTES_MAX // len(marks)))
                life.run_until_under_load()
                for _ in range(self.plan.kills):
                    life.run_for(choose.uniform(0.2, 0.8))
                    life.promise_raw()
                    life.kill_a_child(choose)
                life.run_for(choose.uniform(0.4, 1.6))
            life.kill()
        return life

    def _cut(self, life: Life, *, is_first: bool, goes_on: bool) -> Life | None:
        """One cut and what follows. With ``goes_on`` that is a life under load, to be cut again."""
        choose = self._chooser("cut")
        fate = choose.choice(LOSSY if is_first else list(Fate))
        seed = choose.randrange(1 << 30)
        cut = self._instant(life, choose, under_load=is_first)
        marks = [client.at(cut.at_ns) for client in life.clients]
        acked = sum(mark.acked for mark in marks)
        began_s = time.monotonic()
        self._cuts_done += 1
        self._cuts_under_load += bool(fate in LOSSY and cut.unsettled and acked)
        self._unsettled += cut.unsettled
        self._acked += acked
        print(
            f"cut {self._cuts_done}: change {cut.position}, {cut.unsettled} unsynced, {fate.value}, "
            f"{acked} bytes acknowledged",
            end="",
            flush=True,
        )
        disk = life.disk.cut(cut.position, fate, seed)
        _new_boot(self._directory / "boot_id")
        if goes_on:
            following = self._live(disk, marks)
            print(", lived on", flush=True)
            return following
        with Life(self.plan, disk, self._directory, self._sources, marks) as after, self._explained(after):
            after.take_up_raw()
            after.go_on(None, choose.randrange(1, 200 * KIB))
            after.run_until(after.is_all_acknowledged, "everything to be acknowledged")
            for client in after.clients:
                client.hang_up()
            after.run_until(lambda: not any(client.is_connected for client in after.clients), "the server to close")
            after.ctl("ledger")
            after.ctl("verify")
            after.stop()
            compared, cut_bytes = after.compare(), after.compare_cut()
        after.disk.close()
        print(f", {cut_bytes} cut, {compared} bytes compared, {time.monotonic() - began_s:.2f} s", flush=True)
        return None

    def _instant(self, life: Life, choose: random.Random, *, under_load: bool) -> Cut:
        """Any; ``under_load``: one at which something was acknowledged in this life, and something was not synced."""
        for _ in range(INSTANTS_TRIED):
            cut = life.disk.instant(choose.randrange(1, life.disk.instants()))
            acked = sum(client.at(cut.at_ns).acked for client in life.clients)
            if not under_load or (cut.unsettled and acked > life.acked_at_start):
                break
        return cut

    @contextlib.contextmanager
    def _explained(self, life: Life) -> Iterator[None]:
        """A failure says what to type to see it again, and what the daemon said."""
        try:
            yield
        except BaseException:
            print(f"\nFAILED: --kind {self._kind.value} --seed {self._seed} at cut {self._cuts_done}; {self.plan}")
            print(life.log()[-8000:], flush=True)
            raise


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
