"""Ports, TCP and cards, each broken once."""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path

import pytest

from mpserverd.ops import checks_network, procfs
from mpserverd.ops.findings import Level
from tests.unit.arena.live_tables import Tables
from tests.unit.ops.fake_machine import NETSTAT, SNMP, Machine, levels, only

PROC = Path("/proc")
LISTENER = "[[listener]]\naddress = '{}'\n"


def test_a_socket_that_listens_is_found_with_who_holds_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = next(one for one in procfs.listening(PROC) if one.port == port)
        assert str(found.address) == "127.0.0.1"
        assert os.getpid() in [holder.pid for holder in procfs.holders(PROC, found.inode)]
    assert not [one for one in procfs.listening(PROC) if one.port == port]


@pytest.mark.skipif(not os.path.exists("/proc/net/if_inet6"), reason="no IPv6 here")
def test_a_socket_that_listens_on_ipv6_is_found() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        found = next(one for one in procfs.listening(PROC) if one.port == server.getsockname()[1])
        assert found.address == ipaddress.ip_address("::1")


def test_a_port_that_is_taken_is_a_fault_and_names_the_process(machine: Machine) -> None:
    machine.site.proc = PROC
    with socket.create_server(("127.0.0.1", 0)) as server:
        machine.configure(LISTENER.format(f"0.0.0.0:{server.getsockname()[1]}"))
        found = only(checks_network.ports(machine.site))
    assert found.level is Level.FAULT
    assert f"(pid {os.getpid()})" in found.text
    assert only(checks_network.ports(machine.site)).level is Level.OK


def test_an_address_of_another_machine_is_a_fault(machine: Machine) -> None:
    machine.configure(LISTENER.format("192.0.2.77:8888"))
    found = only(checks_network.ports(machine.site))
    assert found.level is Level.FAULT
    assert "no address of this machine" in found.text


def test_a_low_port_without_root_is_a_warning(machine: Machine) -> None:
    machine.configure(LISTENER.format("127.0.0.1:80"))
    machine.site.unit = {"User": "nobody"}
    assert Level.WARNING in levels(checks_network.ports(machine.site))


def test_a_listener_that_the_daemon_lost_is_a_fault(machine: Machine, tables: Tables) -> None:
    machine.site.live = tables.live()
    assert only(checks_network.ports(machine.site)).level is Level.FAULT


def test_a_queue_of_connections_that_nobody_accepts_is_a_warning(machine: Machine, tables: Tables) -> None:
    machine.site.live = tables.live()
    row = "   0: 0100007F:22B8 00000000:0000 0A 00000000:{:08X} 00:00000000 00000000  0  0 4242 1\n"
    machine.write("proc/net/tcp", "  sl\n" + row.format(0))
    assert only(checks_network.ports(machine.site)).level is Level.OK
    machine.write("proc/net/tcp", "  sl\n" + row.format(900))
    found = only(checks_network.ports(machine.site))
    assert found.level is Level.WARNING
    assert "900 connections wait, 1024 may" in found.text


# -- tcp


def test_a_calm_network_is_fine(machine: Machine) -> None:
    assert only(checks_network.tcp_losses(machine.site)).level is Level.OK


def test_many_segments_sent_again_since_boot_are_a_warning(machine: Machine) -> None:
    machine.write("proc/net/snmp", SNMP.format(10_000, 10_000, 500))
    found = only(checks_network.tcp_losses(machine.site))
    assert found.level is Level.WARNING
    assert "500 of 10,000 segments (5.0 %) were sent again since boot" in found.text


def test_segments_sent_again_just_now_are_a_warning(machine: Machine) -> None:
    machine.write("proc/net/snmp", SNMP.format(1, 10_000_000, 1))
    machine.site.sleep = lambda _: machine.write("proc/net/snmp", SNMP.format(1, 10_002_000, 101)) and None
    found = only(checks_network.tcp_losses(machine.site))
    assert "100 of 2,000 segments (5.0 %) were sent again in the last 1 s" in found.text


def test_drops_of_the_past_are_a_note_and_drops_of_now_a_warning(machine: Machine) -> None:
    machine.write("proc/net/netstat", NETSTAT.format(7, 0))
    found = list(checks_network.tcp_losses(machine.site))
    assert found[0].level is Level.NOTE
    machine.site.sleep = lambda _: machine.write("proc/net/netstat", NETSTAT.format(9, 3)) and None
    texts = [finding.text for finding in checks_network.tcp_losses(machine.site) if finding.level is Level.WARNING]
    assert len(texts) == 2
    assert "2 packets dropped because a receive queue was full in the last 1 s, 9 since boot" in texts[0]


def test_hidden_counters_are_said(machine: Machine) -> None:
    machine.write("proc/net/snmp", "")
    assert only(checks_network.tcp_losses(machine.site)).level is Level.NOTE


def test_counters_of_this_machine_are_read() -> None:
    assert procfs.counters(PROC / "net/snmp")["Tcp"]["OutSegs"] > 0
    assert "ListenOverflows" in procfs.counters(PROC / "net/netstat")["TcpExt"]


# -- cards


def test_a_card_without_losses_is_fine(machine: Machine) -> None:
    assert only(checks_network.cards(machine.site)).level is Level.OK


def test_a_few_drops_of_a_card_are_a_note_and_many_a_warning(machine: Machine) -> None:
    machine.card("eth0", rx_dropped=3)
    assert only(checks_network.cards(machine.site)).level is Level.NOTE
    machine.card("eth0", rx_dropped=3_000)
    found = only(checks_network.cards(machine.site))
    assert found.level is Level.WARNING
    assert "rx_dropped is 3,000, rx_packets is 1,000,000" in found.text
    assert "ethtool" in found.command


def test_loopback_is_no_card(machine: Machine) -> None:
    machine.card("lo", rx_packets=1, rx_dropped=1)
    assert only(checks_network.cards(machine.site)).level is Level.OK
