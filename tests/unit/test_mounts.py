"""What tests mount goes with their session, and what an earlier one left mounted does not disturb the next."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.mounts import mounted, unmount

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEADLINE_S = 20.0

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root"),
]


def session(script: str, temporary: pathlib.Path) -> subprocess.CompletedProcess[str]:
    """A process that has loaded conftest.py, as every session of pytest does."""
    return subprocess.run(
        [sys.executable, "-c", f"import os, pathlib, shutil, subprocess, tests.conftest\n{script}"],
        cwd=ROOT,
        env={**os.environ, "PYTEST_DEBUG_TEMPROOT": str(temporary)},
        capture_output=True,
        text=True,
        check=False,
    )


def is_mounted(path: pathlib.Path) -> bool:
    return f" {path} " in pathlib.Path("/proc/self/mounts").read_text()


def mount(*arguments: str) -> None:
    answer = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if answer.returncode:
        pytest.skip(f"mount {' '.join(arguments)}: {answer.stderr.strip()}")


def test_a_directory_in_which_an_earlier_session_left_something_mounted_can_be_removed(tmp_path: pathlib.Path) -> None:
    older = tmp_path / "pytest-of-root" / "pytest-1"
    (older / "disk").mkdir(parents=True)
    mount("-t", "tmpfs", "mpserverd-test", str(older / "disk"))
    try:
        done = session(f"shutil.rmtree({str(older)!r})", tmp_path)
        assert done.returncode == 0, done.stderr
        assert not older.exists()
    finally:
        subprocess.run(["umount", "--lazy", older / "disk"], capture_output=True, check=False)


def test_a_session_that_is_killed_leaves_no_mount_and_no_loop_device(tmp_path: pathlib.Path) -> None:
    image, disk = tmp_path / "image", tmp_path / "disk"
    disk.mkdir()
    with image.open("wb") as file:
        file.truncate(8 << 20)
    if subprocess.run(["mkfs.ext4", "-q", image], capture_output=True, check=False).returncode:
        pytest.skip("mkfs.ext4 does not work here")
    mount("-o", "loop", str(image), str(disk))
    subprocess.run(["umount", "--lazy", disk], check=True)
    try:
        done = session(
            f"subprocess.run(['mount', '-o', 'loop', {str(image)!r}, {str(disk)!r}], check=True)\n"
            f"assert os.path.ismount({str(disk)!r})\nos.kill(os.getpid(), 9)",
            tmp_path,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not is_mounted(disk)
        deadline = time.monotonic() + DEADLINE_S
        while subprocess.run(["losetup", "-j", image], capture_output=True, text=True, check=True).stdout:
            assert time.monotonic() < deadline, "the loop device stayed"
            time.sleep(0.01)
    finally:
        subprocess.run(["umount", "--lazy", disk], capture_output=True, check=False)


def test_a_mount_is_gone_after_its_test(tmp_path: pathlib.Path) -> None:
    with mounted(tmp_path / "disk", "-t", "tmpfs", "mpserverd-test") as disk:
        assert os.path.ismount(disk)
    assert not os.path.ismount(disk)


def test_a_mount_that_is_busy_for_a_moment_is_waited_for(tmp_path: pathlib.Path) -> None:
    with mounted(tmp_path / "disk", "-t", "tmpfs", "mpserverd-test") as disk:
        file = (disk / "file").open("wb")
        later = threading.Timer(0.2, file.close)
        later.start()
    assert file.closed
    assert not os.path.ismount(disk)
    later.join()


def test_a_mount_that_stays_busy_fails_the_test_and_is_gone_all_the_same(tmp_path: pathlib.Path) -> None:
    with mounted(tmp_path / "disk", "-t", "tmpfs", "mpserverd-test") as disk, (disk / "file").open("wb"):
        with pytest.raises(AssertionError, match="target is busy"):
            unmount(disk, patience_s=0.1)
        assert not os.path.ismount(disk)
