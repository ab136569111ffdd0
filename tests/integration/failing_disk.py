"""A disk that fails on command under a real daemon: rules for failing_disk.c, which is preloaded into it.

What is not refused goes to the real file system, so ext4 with O_DIRECT is tested as it is.
"""

from __future__ import annotations

import enum
import mmap
import os
import pathlib
import struct
import subprocess
from typing import Self

from tests.integration.senders import needs

SOURCE = pathlib.Path(__file__).with_name("failing_disk.c")
RULES_MAX = 16
_RULE_BYTES = 256
_NUMBERS = struct.Struct("<5i")
_PATH_BYTES_MAX = _RULE_BYTES - _NUMBERS.size - 1
ALWAYS = -1


class Call(enum.IntFlag):
    """System calls by what they do; the values stand in failing_disk.c too."""

    WRITE = 1
    SYNC = 2
    SYNCFS = 4
    ALLOCATE = 8
    OPEN = 16
    """For writing, or to make a file."""
    RENAME = 32
    UNLINK = 64
    MKDIR = 128
    CUT = 256
    READ = 512
    SHORT = 1024
    """Writes half of what it should, and says so."""


CHANGES = Call.WRITE | Call.ALLOCATE | Call.OPEN | Call.RENAME | Call.UNLINK | Call.MKDIR | Call.CUT
"""What a file system that was mounted read-only refuses."""


class FailingDisk:
    """``prefix`` goes before the daemon's command line. Rules hold for every process of the daemon, at once."""

    def __init__(self, directory: pathlib.Path) -> None:
        needs("gcc")
        library, self._control = directory / "failing_disk.so", directory / "failing_disk.rules"
        command = ["gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"]
        answer = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
        assert answer.returncode == 0, answer.stderr
        self._control.write_bytes(bytes(RULES_MAX * _RULE_BYTES))
        descriptor = os.open(self._control, os.O_RDWR | os.O_CLOEXEC)
        self._rules = mmap.mmap(descriptor, RULES_MAX * _RULE_BYTES)
        os.close(descriptor)
        self._count = 0
        self.prefix = ["env", f"LD_PRELOAD={library}", f"FAILING_DISK={self._control}"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._rules.close()

    def fail(self, calls: Call, path: str, error: int, *, after: int = 0, times: int = ALWAYS) -> int:
        """From now on ``calls`` on paths that contain ``path`` fail; returns the rule's number."""
        number, self._count = self._count, self._count + 1
        assert number < RULES_MAX and len(os.fsencode(path)) <= _PATH_BYTES_MAX
        at = number * _RULE_BYTES
        self._rules[at + _NUMBERS.size : at + _RULE_BYTES] = os.fsencode(path).ljust(_PATH_BYTES_MAX + 1, b"\0")
        self._rules[at + 4 : at + _NUMBERS.size] = struct.pack("<4i", error, after, times, 0)
        self._rules[at : at + 4] = struct.pack("<i", calls)  # last: from here on it holds
        return number

    def refused(self, number: int) -> int:
        """So many calls a rule has refused."""
        return int(_NUMBERS.unpack_from(self._rules, number * _RULE_BYTES)[4])

    def heal(self) -> None:
        """Everything works again."""
        for number in range(self._count):
            self._rules[number * _RULE_BYTES : number * _RULE_BYTES + 4] = bytes(4)
        self._count = 0
