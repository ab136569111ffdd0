"""Packet sizes that stored bytes contradict, in spools that were written by hand."""

from __future__ import annotations

import struct

import pytest
from spool_writer import SAMPLE16, SpoolWriter, noise, samples

from mpserverd.ops import checks_packets
from mpserverd.ops.findings import Level
from tests.unit.ops.fake_machine import Machine, only


@pytest.fixture
def looking(machine: Machine, spool: SpoolWriter) -> Machine:
    machine.spool = spool.path
    machine.configure("")
    return machine


def wide_samples(count: int) -> bytes:
    """Packets of 32 bytes with the sequence first."""
    return b"".join(struct.pack("<QQQQ", n, 0, n * 977, 5) for n in range(count))


def test_packets_that_count_are_fine(looking: Machine, spool: SpoolWriter) -> None:
    spool.add("good", samples(500), layout=SAMPLE16)
    assert only(checks_packets.packet_size(looking.site)).level is Level.OK


def test_a_sequence_that_jumps_everywhere_is_a_fault_that_names_the_size_that_counts(
    looking: Machine, spool: SpoolWriter
) -> None:
    spool.add("bad", wide_samples(300), layout=SAMPLE16)
    found = only(checks_packets.packet_size(looking.site))
    assert found.level is Level.FAULT
    assert "with packets of 32 bytes it counts" in found.text
    assert "size = 32" in found.command


def test_a_sequence_that_never_counts_is_a_fault_without_a_size(looking: Machine, spool: SpoolWriter) -> None:
    spool.add("bad", noise(16 * 400), layout=SAMPLE16)
    found = only(checks_packets.packet_size(looking.site))
    assert found.level is Level.FAULT
    assert "another size or layout" in found.text


def test_some_lost_packets_are_no_wrong_size(looking: Machine, spool: SpoolWriter) -> None:
    content = b"".join(samples(10, first=first) for first in range(0, 2000, 20))
    spool.add("lossy", content, layout=SAMPLE16)
    assert only(checks_packets.packet_size(looking.site)).level is Level.OK


def add_ends(spool: SpoolWriter, lefts: list[int], packet_size: int = 32) -> None:
    for number, left in enumerate(lefts):
        stream = spool.add(f"s{number}", bytes(packet_size * 4), packet_size=packet_size)
        spool.set_row(stream, truncated=left)


def test_ends_that_leave_the_same_half_packet_hint_at_its_size(looking: Machine, spool: SpoolWriter) -> None:
    add_ends(spool, [16, 16, 0, 16, 0, 16, 0])
    found = only(checks_packets.packet_size(looking.site))
    assert found.level is Level.FAULT
    assert "4 of 7 connections ended within a packet of 32 bytes, 4 with 16 bytes over" in found.text
    assert "packet_size = 16" in found.command


def test_ends_that_are_nearly_all_torn_are_a_warning(looking: Machine, spool: SpoolWriter) -> None:
    add_ends(spool, [3, 17, 5, 31, 8, 0])
    assert only(checks_packets.packet_size(looking.site)).level is Level.WARNING


def test_few_torn_ends_are_fine(looking: Machine, spool: SpoolWriter) -> None:
    add_ends(spool, [16, 16, 16, 0, 0, 0])
    assert only(checks_packets.packet_size(looking.site)).level is Level.OK


def test_without_a_spool_there_is_nothing_to_judge_from(machine: Machine) -> None:
    assert only(checks_packets.packet_size(machine.site)).level is Level.NOTE
