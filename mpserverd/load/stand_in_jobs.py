"""Answers ``systemctl list-jobs`` for the one unit that a stand-in plays: a script of that name, first in its PATH.

A job is what systemd works on: ``start`` until READY=1, ``stop`` or ``restart`` from the moment when it is asked for.
"""

from __future__ import annotations

import os
import pathlib
import shlex
import shutil


class Jobs:
    """``directory`` is made, and removed by ``close``."""

    def __init__(self, directory: pathlib.Path, unit: str) -> None:
        self._directory, self._unit = directory, unit
        self._list = directory / "jobs"
        self.kind = ""
        directory.mkdir()
        self.show("")
        script = directory / "systemctl"
        script.write_text(f'#!/bin/sh\n[ "$1" = list-jobs ] && exec cat {shlex.quote(str(self._list))}\n')
        script.chmod(0o755)

    def path(self, others: str) -> str:
        """PATH for the service."""
        return f"{self._directory}{os.pathsep}{others}" if others else str(self._directory)

    def show(self, kind: str) -> None:
        """``kind`` is the only job now, "" for none."""
        self.kind = kind
        fresh = self._list.with_suffix(".new")
        fresh.write_text(f"1 {self._unit} {kind} running\n" if kind else "")
        fresh.replace(self._list)

    def close(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)
