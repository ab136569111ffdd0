"""Clients that misbehave cost themselves, never another client, and each fault has a counter."""

from __future__ import annotations

import os
import pathlib
import signal
import socket
import struct
import threading
import time

from tests.integration.driver import Daemon, connect
from tests.integration.oracle import sent_digests, stored_digests, stored_streams
from tests.integration.senders import payload

EXACT = {"listener": {"on_full": "block"}}


def reset(client: socket.socket) -> None:
    """Close with RST instead of FIN."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def is_refused(client: socket.socket) -> bool:
    """The daemon closed the connection without a word."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_client_that_vanishes_in_mid_packet_loses_only_the_half_packet(tmp_path: pathlib.Path) -> None:
    content = payload(1, 16 * 1000 + 9)
    with Daemon(tmp_path, EXACT) as daemon:
        with connect(daemon.port()) as client:
            client.sendall(content)
        daemon.wait_until_quiet()
        total = daemon.wait_for_total("durable_bytes", 16_000)
        assert total["truncated_bytes"] == 9
        assert stored_digests(daemon.spool) == sent_digests([content], 16)


def test_what_was_received_before_a_reset_is_stored(tmp_path: pathlib.Path) -> None:
    content = payload(2, 16 * 500 + 3)
    with Daemon(tmp_path, EXACT) as daemon:
        client = connect(daemon.port())
        client.sendall(content)
        daemon.wait_for_total("socket_bytes", len(content))
        reset(client)
        daemon.wait_until_quiet()
        assert daemon.wait_for_total("durable_bytes", 8_000)["truncated_bytes"] == 3
        assert daemon.counter("broken-reset") == 1
        assert stored_digests(daemon.spool) == sent_digests([content], 16)


def test_urgent_data_is_ordinary_data(tmp_path: pathlib.Path) -> None:
    parts = [payload(seed, 1601) for seed in range(4)]
    with Daemon(tmp_path, EXACT) as daemon:
        with connect(daemon.port()) as client:
            for part in parts:
                client.sendall(part)
                client.send(b"!", socket.MSG_OOB)
        content = b"".join(part + b"!" for part in parts)
        daemon.wait_until_quiet()
        daemon.wait_for_total("durable_bytes", len(content) - len(content) % 16)
        assert stored_digests(daemon.spool) == sent_digests([content], 16)


def test_connections_without_a_whole_packet_leave_no_stream(tmp_path: pathlib.Path) -> None:
    """Health checks and port scans."""
    with Daemon(tmp_path, EXACT) as daemon:
        port = daemon.port()
        for sent in (b"", b"x" * 15, b""):
            with connect(port) as client:
                client.sendall(sent)
        reset(connect(port))
        daemon.wait_until_served(4)
        assert daemon.wait_for_total("truncated_bytes", 15)["received_bytes"] == 0
        assert daemon.streams() == []
        assert not list((daemon.spool / "streams").iterdir())


def test_a_client_that_says_nothing_is_closed_after_the_handshake_timeout(tmp_path: pathlib.Path) -> None:
    with Daemon(tmp_path, {"listener": {"handshake_timeout_s": 0.5}}) as daemon:
        with connect(daemon.port()) as silent:
            assert is_refused(silent)
        daemon.wait_until_quiet()
        assert daemon.counter("silent") == 1
        assert daemon.streams() == []


def test_a_client_that_falls_silent_is_closed_after_the_idle_timeout(tmp_path: pathlib.Path) -> None:
    with Daemon(tmp_path, {"listener": {"idle_timeout_s": 0.5}}) as daemon:
        with connect(daemon.port()) as client:
            client.sendall(b"a" * 33)
            assert is_refused(client)
        daemon.wait_until_quiet()
        assert daemon.counter("idle") == 1
        total = daemon.wait_for_total("durable_bytes", 32)
        assert total["truncated_bytes"] == 1


def test_a_client_that_we_do_not_read_is_not_idle(tmp_path: pathlib.Path) -> None:
    """The memory is full because the disk stands still, for longer than the idle timeout: nobody is closed for it."""
    content = payload(5, 24_000_000)
    settings = {
        "listener": {"idle_timeout_s": 0.5, "on_full": "block"},
        "server": {"workers": 1},
        "buffers": {"bytes": "8 MiB"},
    }
    with Daemon(tmp_path, settings) as daemon:
        with connect(daemon.port()) as client:
            client.sendall(content[:1_000_000])
            daemon.wait_for_total("durable_bytes", 1_000_000)
            storer = daemon.kill("storer", signal.SIGSTOP)
            try:
                sender = threading.Thread(target=client.sendall, args=(content[1_000_000:],))
                sender.start()
                daemon.wait_for(lambda: daemon.clients()[0]["blocked"], what="the client to be blocked")
                blocked_s = time.monotonic()
                daemon.wait_for(lambda: time.monotonic() - blocked_s > 2.5, what="five idle timeouts")
            finally:
                os.kill(storer, signal.SIGCONT)
            sender.join()
        daemon.wait_for_total("durable_bytes", len(content))
        assert daemon.counter("idle") == 0
        assert stored_digests(daemon.spool) == sent_digests([content], 16)


def test_a_paused_client_is_not_idle(tmp_path: pathlib.Path) -> None:
    with Daemon(tmp_path, {"listener": {"idle_timeout_s": 0.5}}) as daemon:
        with connect(daemon.port()) as client:
            client.sendall(b"a" * 160)
            daemon.wait_for_total("received_bytes", 160)
            daemon.ctl("pause", "all")
            paused_s = time.monotonic()
            daemon.wait_for(lambda: time.monotonic() - paused_s > 2.5, what="five idle timeouts")
            client.sendall(b"b" * 160)
            daemon.ctl("resume", "all")
            daemon.wait_for_total("received_bytes", 320)
        assert daemon.counter("idle") == 0


def test_stalls_and_bursts_change_nothing(tmp_path: pathlib.Path) -> None:
    """Half a packet, a wait until the daemon has it, a burst, and so on."""
    content = payload(3, 600_000)
    cuts = [5, 6, 80_000, 80_001, 300_007, 300_015, 600_000]
    with Daemon(tmp_path, EXACT) as daemon:
        with connect(daemon.port()) as client:
            sent = 0
            for cut in cuts:
                client.sendall(content[sent:cut])
                sent = cut
                daemon.wait_for_total("socket_bytes", sent)
        daemon.wait_until_quiet()
        daemon.wait_for_total("durable_bytes", len(content))
        assert stored_digests(daemon.spool) == sent_digests([content], 16)


def test_clients_over_the_limit_are_refused_and_the_others_go_on(tmp_path: pathlib.Path) -> None:
    contents = [payload(seed, 64_000) for seed in range(3)]
    with Daemon(tmp_path, EXACT | {"server": {"max_clients": 3}}) as daemon:
        port = daemon.port()
        inside = [connect(port) for _ in contents]
        daemon.wait_until_connected(3)
        for _ in range(20):
            with connect(port) as outside:
                assert is_refused(outside)
        for client, content in zip(inside, contents, strict=True):
            client.sendall(content)
            client.close()
        daemon.wait_until_quiet()
        daemon.wait_for_total("durable_bytes", 3 * 64_000)
        assert daemon.counter("refused-max-clients") == 20
        assert 1 <= len(daemon.log_lines("max-clients")) <= 3, "one line, not one a refusal"
        assert stored_digests(daemon.spool) == sent_digests(contents, 16)
        with connect(port) as again:
            again.sendall(b"b" * 16)
        daemon.wait_for_total("durable_bytes", 3 * 64_000 + 16)


def test_limits_of_a_listener_and_of_an_address_are_counted_apart(tmp_path: pathlib.Path) -> None:
    limits = {"max_connections": 3, "max_connections_per_address": 2}
    with Daemon(tmp_path, {"listener": limits}) as daemon:
        port = daemon.port()
        with connect(port), connect(port), connect(port) as third_of_one:
            assert is_refused(third_of_one)
            assert daemon.counter("refused-address-limit") == 1
            with connect(port, source="127.0.0.2"), connect(port, source="127.0.0.3") as fourth_of_all:
                assert is_refused(fourth_of_all)
                assert daemon.counter("refused-listener-limit") == 1


def test_only_addresses_on_the_allow_list_come_in(tmp_path: pathlib.Path) -> None:
    lists = {"allow": ["127.0.0.0/29"], "deny": ["127.0.0.3"]}
    with Daemon(tmp_path, {"listener": lists}) as daemon:
        port = daemon.port()
        for source, welcome in (("127.0.0.1", True), ("127.0.0.3", False), ("127.0.0.9", False)):
            with connect(port, source=source) as client:
                if welcome:
                    client.sendall(b"c" * 16)
                    daemon.wait_for_total("durable_bytes", 16)
                else:
                    assert is_refused(client)
        assert daemon.counter("refused-denied") == 2


def test_a_v4_address_counts_as_itself_on_a_v6_listener(tmp_path: pathlib.Path) -> None:
    listener = {"address": "[::]:0", "allow": ["127.0.0.1", "::1"]}
    with Daemon(tmp_path, {"listener": listener}) as daemon:
        port = daemon.port()
        with connect(port) as mapped, socket.create_connection(("::1", port), timeout=20) as native:
            mapped.sendall(b"d" * 16)
            native.sendall(b"e" * 16)
            daemon.wait_for_total("durable_bytes", 32)
            peers = sorted(client["peer"] for client in daemon.clients())
            assert [peer.rpartition(":")[0].strip("[]") for peer in peers] == ["127.0.0.1", "::1"]
        with connect(port, source="127.0.0.2") as stranger:
            assert is_refused(stranger)


def test_a_named_client_keeps_one_stream_over_many_connections(tmp_path: pathlib.Path) -> None:
    """Each connection goes on where the one before ended, in the middle of a 4 KiB block too."""
    contents = [payload(seed, 16 * size) for seed, size in enumerate((1, 255, 256, 257, 4096, 3))]
    client_table = {"client": [{"id": "press-7", "address": "127.0.0.1"}]}
    with Daemon(tmp_path, EXACT | client_table) as daemon:
        for number, content in enumerate(contents, 1):
            with connect(daemon.port()) as client:
                client.sendall(content)
            daemon.wait_until_served(number)
        daemon.wait_for_total("durable_bytes", sum(map(len, contents)))
        (stream,) = stored_streams(daemon.spool)
        assert stream.name == "press-7"
        assert stream.content == b"".join(contents)


def test_a_second_connection_of_a_named_client_disturbs_neither(tmp_path: pathlib.Path) -> None:
    first, second = payload(1, 16_000), payload(2, 32_000)
    client_table = {"client": [{"id": "press-7", "address": "127.0.0.1"}]}
    with Daemon(tmp_path, EXACT | client_table) as daemon:
        with connect(daemon.port()) as one:
            one.sendall(first)
            daemon.wait_for_total("durable_bytes", 16_000)
            with connect(daemon.port()) as two:
                two.sendall(second)
        daemon.wait_until_quiet()
        daemon.wait_for_total("durable_bytes", 48_000)
        contents = [stream.content for stream in stored_streams(daemon.spool)]
        assert first + second in contents or sorted(contents) == sorted([first, second])


def test_a_kicked_client_is_closed_and_its_packets_are_kept(tmp_path: pathlib.Path) -> None:
    content = payload(4, 16 * 1000 + 5)
    with Daemon(tmp_path, EXACT) as daemon:
        with connect(daemon.port()) as client:
            client.sendall(content)
            daemon.wait_for_total("socket_bytes", len(content))
            (entry,) = daemon.clients()
            daemon.ctl("kick", entry["stream"])
            assert is_refused(client)
        daemon.wait_until_quiet()
        daemon.wait_for_total("durable_bytes", 16_000)
        assert stored_digests(daemon.spool) == sent_digests([content], 16)


def test_a_paused_client_waits_and_loses_nothing(tmp_path: pathlib.Path) -> None:
    """With its socket buffers small, the rest waits at the sender."""
    content = payload(6, 1_600_000)
    listener = {"on_full": "block", "receive_buffer_bytes": 16_384}
    with Daemon(tmp_path, {"listener": listener}) as daemon:
        with connect(daemon.port()) as client:
            client.sendall(content[:16_000])
            daemon.wait_for_total("received_bytes", 16_000)
            (entry,) = daemon.clients()
            daemon.ctl("pause", entry["stream"])
            client.settimeout(0.5)
            sent = 16_000
            while sent < len(content):
                try:
                    sent += client.send(content[sent:])
                except TimeoutError:
                    break
            assert daemon.account("received_bytes") <= 16_000 + 65_536
            daemon.ctl("resume", entry["stream"])
            client.settimeout(20)
            client.sendall(content[sent:])
        daemon.wait_until_quiet()
        daemon.wait_for_total("durable_bytes", len(content))
        assert stored_digests(daemon.spool) == sent_digests([content], 16)
