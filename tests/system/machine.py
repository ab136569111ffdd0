"""A Debian machine for one test module: real systemd in a container, thrown away afterwards.

Rules: the machine is a copy of a cached root, so its spool lies on a real file system; it has a network of its own with
nothing but loopback, so ports are free and nothing outside is reached (packages come from the cache of the root). What
a test learns it learns as an operator would: systemctl, journalctl, mpserverctl. Leaving the ``with`` block powers the
machine off and removes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

ROOT = pathlib.Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "system"
SLOWNESS = float(os.environ.get("MPSERVERD_TEST_SLOWNESS", "1"))
"""Every deadline is multiplied by this; raise it on a machine that is slow or loaded."""
DEADLINE_S = 30.0
POLL_S = 0.05
SUITE = "bookworm"
TOOLS = ("mmdebstrap", "systemd-nspawn", "nsenter", "dpkg-buildpackage", "lintian")
BASE_PACKAGES = ("systemd", "systemd-sysv", "dbus", "libpam-systemd", "procps", "apparmor")
LATER_PACKAGES = ("logrotate", "fish", "bash-completion", "openrc")
"""Not installed, but in the machine's package cache."""
ENVIRONMENT = ("env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8", "PAGER=cat")
_numbers = itertools.count(1)

Result = subprocess.CompletedProcess[str]


def why_not() -> str:
    """What keeps these tests from running here, "" when nothing does."""
    if os.environ.get("MPSERVERD_TEST_SYSTEM") != "1":
        return "boots real systemd and takes minutes; type: make test-system"
    if os.geteuid() != 0:
        return "needs root; type: sudo make test-system"
    missing = [tool for tool in TOOLS if shutil.which(tool, path=os.environ["PATH"] + ":/usr/sbin:/sbin") is None]
    return f"needs {', '.join(missing)}; type: sudo packaging/system_packages.sh" if missing else ""


class Machine:
    """``debs`` are copied to /srv of the machine; ``depends`` are packages that can be installed there."""

    def __init__(self, debs: Sequence[pathlib.Path], depends: Sequence[str]) -> None:
        self.slowness = SLOWNESS
        self.name = f"mpsd-{os.getpid()}-{next(_numbers)}"
        self.root = CACHE / self.name
        self.log_path = CACHE / f"{self.name}.log"
        self._debs = debs
        self._depends = depends
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._leader = 0

    # -- life

    def __enter__(self) -> Self:
        base = base_root(self._depends)
        subprocess.run(["cp", "-a", "--one-file-system", "--reflink=auto", base, self.root], check=True)
        for deb in self._debs:
            shutil.copy(deb, self.root / "srv")
        try:
            self._boot()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end()

    def _boot(self) -> None:
        command = [
            "systemd-nspawn", "--quiet", f"--directory={self.root}", f"--machine={self.name}", "--boot",
            "--register=no", "--keep-unit", "--private-network", "--console=pipe",
        ]  # fmt: skip
        with self.log_path.open("wb") as log:
            self._nspawn = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.wait_for(self._find_leader, what="systemd of the machine")
        self.wait_for(lambda: self.run("test", "-S", "/run/dbus/system_bus_socket", check=False).returncode == 0)
        self.run("systemctl", "is-system-running", "--wait", check=False)

    def _find_leader(self) -> bool:
        assert self._nspawn is not None
        if self._nspawn.poll() is not None:
            raise AssertionError(
                f"systemd-nspawn boots no machine here:\n{self.log_path.read_text(errors='replace')[-2000:]}"
            )
        found = subprocess.run(
            ["pgrep", "-P", str(self._nspawn.pid), "-x", "systemd"], capture_output=True, text=True, check=False
        )
        self._leader = int(found.stdout or 0)
        return self._leader > 0

    def _end(self) -> None:
        if self._nspawn is not None and self._nspawn.poll() is None:
            if self._leader:
                self.run("systemctl", "poweroff", "--force", check=False)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._nspawn.wait(DEADLINE_S * SLOWNESS)
            if self._nspawn.poll() is None:
                self._nspawn.kill()
                self._nspawn.wait()
        remove_tree(self.root)
        self.log_path.unlink(missing_ok=True)

    # -- doing

    def run(
        self, *command: str, check: bool = True, user: str = "", stdin: str = "", deadline_s: float = 120
    ) -> Result:
        """Run a command on the machine, as root or as ``user`` with a fresh login's groups."""
        become = ["runuser", "-u", user, "--"] if user else []
        done = subprocess.run(
            ["nsenter", "-t", str(self._leader), "-a", "--", *ENVIRONMENT, *become, *command],
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=deadline_s * SLOWNESS,
            check=False,
        )
        if check and done.returncode != 0:
            raise AssertionError(
                f"{shlex.join(command)} exited {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
            )
        return done

    def popen(self, *command: str) -> subprocess.Popen[str]:
        """Start a command that goes on; its input and output are pipes."""
        return subprocess.Popen(
            ["nsenter", "-t", str(self._leader), "-a", "--", *ENVIRONMENT, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def popen_outside(self, *command: str) -> subprocess.Popen[str]:
        """Start a command of the host, which shares the machine's network and nothing else."""
        return subprocess.Popen(
            ["nsenter", "-t", str(self._leader), "-n", "--", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def sh(self, script: str, *, check: bool = True, user: str = "") -> Result:
        return self.run("sh", "-euc", script, check=check, user=user)

    def out(self, *command: str, user: str = "") -> str:
        return self.run(*command, user=user).stdout.strip()

    def python(self, script: str) -> str:
        """Debian's Python of the machine."""
        return self.run("python3", "-", stdin=script).stdout.strip()

    def apt(self, *arguments: str) -> Result:
        """apt-get, from the cache only: the machine has no network."""
        options = ["-y", "-o", "Dpkg::Use-Pty=0", "--no-install-recommends"]
        return self.run("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", *options, *arguments, deadline_s=300)

    def write(self, path: str, text: str) -> None:
        self.run("sh", "-euc", 'mkdir -p "$(dirname "$1")"; cat >"$1"', "-", path, stdin=text)

    # -- looking

    def exists(self, path: str) -> bool:
        return self.run("test", "-e", path, check=False).returncode == 0

    def show(self, unit: str, key: str) -> str:
        return self.out("systemctl", "show", unit, f"--property={key}", "--value")

    def main_pid(self) -> int:
        return int(self.show("mpserverd", "MainPID"))

    def ctl(self, *arguments: str, user: str = "") -> Any:
        """The JSON that mpserverctl prints."""
        return json.loads(self.out("mpserverctl", "--json", *arguments, user=user))

    def journal(self, *arguments: str) -> str:
        return self.run("journalctl", "--no-pager", "--sync", check=False).stdout + self.out(
            "journalctl", "--no-pager", "--quiet", *arguments
        )

    def entries(self, *arguments: str) -> list[dict[str, Any]]:
        """Lines of the journal with their fields."""
        return [json.loads(line) for line in self.journal("--output=json", *arguments).splitlines()]

    def wait_for(self, condition: Callable[[], bool], deadline_s: float = DEADLINE_S, what: str = "it") -> None:
        end_s = time.monotonic() + deadline_s * SLOWNESS
        while not condition():
            if time.monotonic() > end_s:
                raise AssertionError(f"waited {deadline_s:g} s for {what}")
            time.sleep(POLL_S)

    def wait_until_serving(self, not_pid: int = 0) -> int:
        """The main pid once the unit is active, and not with ``not_pid``."""

        def serves() -> bool:
            return self.main_pid() not in (0, not_pid) and self.show("mpserverd", "ActiveState") == "active"

        try:
            self.wait_for(serves, what="mpserverd to be active")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.journal('-u', 'mpserverd', '-n', '40')}") from None
        return self.main_pid()


def base_root(depends: Sequence[str]) -> pathlib.Path:
    """The cached root: systemd, and in its package cache what is to be installed later. Made at the first call."""
    wanted = repr((SUITE, BASE_PACKAGES, LATER_PACKAGES, sorted(depends)))
    root = CACHE / f"root-{hashlib.sha256(wanted.encode()).hexdigest()[:12]}"
    if root.exists():
        return root
    CACHE.mkdir(parents=True, exist_ok=True)
    for old in CACHE.glob("root-*"):
        remove_tree(old)
    fresh = CACHE / "root-being-made"
    later = shlex.join(["apt-get", "--yes", "--download-only", "install", *LATER_PACKAGES, *depends])
    subprocess.run(
        [
            # Its mounts end with its namespace: in the one outside a busy /sys stayed mounted in the root (seen).
            "unshare", "--mount", "--propagation", "private", "--",
            "mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(BASE_PACKAGES)}",
            '--aptopt=APT::Install-Recommends "false"', "--skip=cleanup/apt",
            f"--customize-hook=APT_CONFIG=$MMDEBSTRAP_APT_CONFIG {later}",
            SUITE, fresh,
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    fresh.rename(root)
    return root


def remove_tree(root: pathlib.Path) -> None:
    """Never across a mount, whatever somebody left mounted there."""
    subprocess.run(["rm", "-rf", "--one-file-system", root], check=True)
