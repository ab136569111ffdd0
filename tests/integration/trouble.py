"""Processes that crash at their start, hang in the kernel or die in accept: trouble.c, preloaded into a daemon."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess

from tests.integration.senders import needs

SOURCE = pathlib.Path(__file__).with_suffix(".c")
HANG = signal.SIGRTMIN + 5


class Trouble:
    """``prefix`` goes before the daemon's command line, or ``environ`` into its environment.

    The disk that ``hang`` writes to is ``directory / "disk"``.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        needs("gcc", "env")
        self.directory, self.disk = directory, directory / "disk"
        library = directory / "trouble.so"
        command = ["gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", str(library), str(SOURCE)]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        assert answer.returncode == 0, answer.stderr
        self.environ = {"LD_PRELOAD": str(library), "TROUBLE_DIR": str(directory)}
        self.prefix = ["env", *(f"{name}={value}" for name, value in self.environ.items())]

    def crash(self, name: str) -> None:
        """From now on every child of that name dies while it starts."""
        (self.directory / f"crash-{name}").touch()

    def heal(self, name: str) -> None:
        (self.directory / f"crash-{name}").unlink()

    def die_accepting(self) -> None:
        """The supervisor is killed when it has accepted the next connection, and before it knows of it."""
        (self.directory / "die-accepting").touch()

    @staticmethod
    def hang(pid: int) -> None:
        """It writes to the disk now; when that is frozen, it sleeps where no signal reaches it."""
        os.kill(pid, HANG)
