"""Do the limits add up?"""

from __future__ import annotations

import os
import pathlib

import pytest

from mpserverd.config.schema import BuffersConfig, Config, ServerConfig, SpoolConfig
from mpserverd.errors import StartError
from mpserverd.supervisor.resources import check_memory, check_spool, fit_clients

MIB = 1 << 20


def config(clients: int, buffers_bytes: int = 64 * MIB) -> Config:
    return Config(server=ServerConfig(max_clients=clients), buffers=BuffersConfig(bytes=buffers_bytes))


def test_clients_that_fit_are_left_alone() -> None:
    fit = fit_clients(config(100), 20_000)
    assert (fit.max_clients, fit.why) == (100, "")


def test_too_few_descriptors_lower_the_clients_and_say_both_numbers() -> None:
    fit = fit_clients(config(500), 2048)
    assert fit.max_clients == (2048 - 1024) // 3
    assert "2048" in fit.why
    assert "500" in fit.why


def test_two_chunks_a_client_are_needed() -> None:
    fit = fit_clients(config(500, 16 * MIB), 100_000)
    assert fit.max_clients == 128
    assert "buffers.bytes" in fit.why


def test_an_ordinary_limit_of_1024_descriptors_serves_the_default_clients() -> None:
    assert fit_clients(config(10), 1024).max_clients == 10


def test_not_even_one_client_is_an_error() -> None:
    with pytest.raises(StartError, match="single client"):
        fit_clients(config(10), 64)


def make_system(root: pathlib.Path, available_kib: int, limits: dict[str, tuple[str, str]]) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable: {available_kib} kB\n")
    (root / "proc/self/cgroup").write_text("0::/a/b\n")
    for group, (limit, used) in limits.items():
        path = root / "cgroup" / group
        path.mkdir(parents=True, exist_ok=True)
        (path / "memory.max").write_text(limit + "\n")
        (path / "memory.current").write_text(used + "\n")


def check(root: pathlib.Path) -> None:
    check_memory(config(10), proc=str(root / "proc"), cgroups=str(root / "cgroup"))


def test_an_arena_that_fits_is_fine(tmp_path: pathlib.Path) -> None:
    make_system(tmp_path, 1 << 20, {"a": ("max", "5"), "a/b": (str(1 << 30), "5")})
    check(tmp_path)


def test_memory_that_is_not_there_is_an_error_with_both_numbers(tmp_path: pathlib.Path) -> None:
    make_system(tmp_path, 1024, {})
    with pytest.raises(StartError, match=r"needs 67\d+ bytes, MemAvailable leaves 1048576"):
        check(tmp_path)


def test_the_limit_of_a_group_above_ours_counts(tmp_path: pathlib.Path) -> None:
    make_system(tmp_path, 1 << 20, {"a": (str(80 * MIB), str(40 * MIB)), "a/b": ("max", "5")})
    with pytest.raises(StartError, match=f"leaves {40 * MIB}"):
        check(tmp_path)


def test_a_system_that_hides_its_memory_stops_nobody(tmp_path: pathlib.Path) -> None:
    check(tmp_path)


def test_more_free_space_than_the_disk_is_large_is_an_error_with_both_numbers(tmp_path: pathlib.Path) -> None:
    """Also where the spool is yet to be made."""
    found = os.statvfs(tmp_path)
    size = found.f_blocks * found.f_frsize
    path = str(tmp_path / "not" / "there")
    check_spool(Config(spool=SpoolConfig(path=path, min_free_bytes=size)))
    with pytest.raises(StartError, match=f"min_free_bytes is {size + 1}, the file system of .* has {size} bytes"):
        check_spool(Config(spool=SpoolConfig(path=path, min_free_bytes=size + 1)))
