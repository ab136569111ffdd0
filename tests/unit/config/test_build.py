"""Settings from text, and every fault at once with its key, its value and what to do."""

from __future__ import annotations

import dataclasses

import pytest

from mpserverd.config.load import loads
from mpserverd.config.schema import Config, ListenerConfig, LogTarget, OnFull, Sync
from mpserverd.errors import ConfigError

LAYOUT = '[layout.a]\nsize = 16\nfields = { sequence = "<u8", time = "<i8" }\nsequence = "sequence"\ntime = "time"\n'


def faults(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        loads(text, overrides, name="FILE")
    return refused.value.faults


def only_fault(text: str, *overrides: str) -> str:
    (fault,) = faults(text, *overrides)
    return fault


def test_empty_file_gives_the_documented_defaults() -> None:
    config = loads("")
    assert config == Config()
    assert (config.server.workers, config.server.max_clients) == (4, 10)
    (listener,) = config.listeners
    assert (listener.host, listener.port, listener.packet_size) == ("0.0.0.0", 8888, 16)
    assert (listener.receive_buffer_bytes, listener.send_buffer_bytes) == (131_072, 131_072)
    assert listener.on_full is OnFull.DROP_OLDEST


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().server.workers = 3  # type: ignore[misc]


def test_every_fault_is_reported_at_once() -> None:
    found = faults('[server]\nworkers = 0\nbacklog = "x"\n[buffers]\nchunk_bytes = 5000\n[log]\ntarget = ["syslog"]\n')
    assert [fault.split(" = ")[0] for fault in found] == [
        "FILE: server.workers",
        "FILE: server.backlog",
        "FILE: buffers.chunk_bytes",
        "FILE: log.target",
    ]


def test_fault_says_file_key_value_problem_and_bound() -> None:
    assert only_fault("[server]\nworkers = 99") == "FILE: server.workers = 99: out of range; 1 to 64"


def test_unknown_key_names_the_nearest_one() -> None:
    assert only_fault("[server]\nwokers = 3") == 'FILE: server.wokers = 3: unknown key; did you mean "workers"?'


def test_unknown_key_far_from_all_names_all() -> None:
    assert "known are bytes, chunk_bytes" in only_fault("[buffers]\nzzz = 3")


def test_unknown_section_names_the_nearest_one() -> None:
    assert 'did you mean "listener"' in only_fault("[[listeners]]\nname = 'x'")


@pytest.mark.parametrize("section", ["sink", "monitor", "alert"])
def test_sections_that_would_do_nothing_are_refused(section: str) -> None:
    assert "unknown section" in only_fault(f"[{section}]\n")


def test_mps_waits_for_a_place_in_memory_by_default_and_may_leave_the_size_to_clients() -> None:
    (listener,) = loads('[[listener]]\nprotocol = "mps"\npacket_size = 0').listeners
    assert (listener.protocol, listener.on_full, listener.packet_size) == ("mps", "block", 0)


def test_mps_never_drops_what_it_has_promised_to_keep() -> None:
    fault = only_fault('[[listener]]\nprotocol = "mps"\non_full = "drop-oldest"')
    assert 'listener.0.on_full = "drop-oldest": mps promises to lose nothing; write "block", or use raw' in fault


def test_mps_stores_what_it_acknowledges() -> None:
    fault = only_fault('[[listener]]\nprotocol = "mps"\nstore = false')
    assert "listener.0.store = false: mps acknowledges what is stored; write true, or use raw" in fault


def test_raw_has_a_packet_size() -> None:
    assert "raw has no hello that says it" in only_fault("[[listener]]\npacket_size = 0")


def test_listener_with_single_brackets_says_what_to_write() -> None:
    assert "[[listener]] with two brackets" in only_fault('[listener]\nname = "x"')


def test_section_with_double_brackets_says_what_to_write() -> None:
    assert "[server] on a line of its own" in only_fault("[[server]]\nworkers = 3")


def test_empty_list_of_listeners_is_a_fault() -> None:
    assert "one [[listener]] at least" in only_fault("listener = []")


def test_settings_of_a_listener() -> None:
    config = loads(
        '[[listener]]\nname = "b"\naddress = "[::]:9"\npacket_size = 1500\nstore = false\non_full = "block"\n'
        'allow = ["10.0.0.0/8"]\ndeny = ["10.0.0.1"]\nidle_timeout_s = 5\nnodelay = false\n'
    )
    (listener,) = config.listeners
    assert (listener.host, listener.port, listener.packet_size, listener.store) == ("::", 9, 1500, False)
    assert listener.on_full is OnFull.BLOCK
    assert [str(network) for network in (*listener.allow, *listener.deny)] == ["10.0.0.0/8", "10.0.0.1/32"]
    assert listener.idle_timeout_s == 5.0
    assert listener.nodelay is False


def test_words_of_the_log_and_the_spool() -> None:
    config = loads('[log]\ntarget = ["file", "journal"]\n[spool]\nsync = "none"\nmax_bytes = "1 TiB"\n')
    assert config.log.target == (LogTarget.FILE, LogTarget.JOURNAL)
    assert config.spool.sync is Sync.NONE
    assert config.spool.max_bytes == 1 << 40


# Rules between keys


def test_layout_gives_the_listener_its_packet_size() -> None:
    config = loads(LAYOUT + '[[listener]]\nlayout = "a"\n')
    assert config.listeners[0].packet_size == 16
    assert list(config.layouts["a"].fields) == ["sequence", "time"]
    assert config.layouts["a"].sequence == "sequence"


def test_layout_without_checks_has_none() -> None:
    layout = loads('[layout.a]\nsize = 1\nfields = { a = "u1" }').layouts["a"]
    assert (layout.sequence, layout.time) == (None, None)


def test_packet_size_beside_a_layout_is_a_fault() -> None:
    assert "leave out packet_size or layout" in only_fault(LAYOUT + '[[listener]]\nlayout = "a"\npacket_size = 16\n')


def test_layout_that_does_not_exist_names_the_nearest() -> None:
    assert 'no such layout; did you mean "sample16"' in only_fault(
        '[layout.sample16]\nsize=1\nfields={x="u1"}\n[[listener]]\nlayout = "sample32"\n'
    )
    assert "write a [layout.b]" in only_fault('[[listener]]\nlayout = "b"\n')


def test_layout_with_faults_is_not_also_called_missing() -> None:
    assert "layout.a.size" in only_fault('[layout.a]\nsize = 0\nfields = { a = "u1" }\n[[listener]]\nlayout = "a"\n')


def test_layout_must_add_up() -> None:
    assert "its fields take 12 bytes; write 12" in only_fault(
        '[layout.a]\nsize = 16\nfields = { a = "<u8", b = "<u4" }'
    )


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('sequence = "c"', "no such field; the fields are a, b"),
        ('sequence = "b"', 'the field has type "<f8"; it must be a whole number'),
        ('time = "b"', 'the field has type "<f8"; it must be a whole number of 8 bytes'),
    ],
)
def test_checked_fields_exist_and_are_whole_numbers(line: str, problem: str) -> None:
    assert problem in only_fault(f'[layout.x]\nsize = 12\nfields = {{ a = "<u4", b = "<f8" }}\n{line}\n')


def test_layout_needs_size_and_fields() -> None:
    assert [fault.split(":")[1] for fault in faults("[layout.a]\n")] == [" layout.a.size", " layout.a.fields"]


def test_arena_must_hold_the_guaranteed_chunks() -> None:
    least = 2 * 65_536 * 1000 + 8 * 65_536 * 4
    fault = only_fault("[server]\nmax_clients = 1000")
    assert str(least) in fault
    assert "server.max_clients" in fault
    assert loads(f"[server]\nmax_clients = 1000\n[buffers]\nbytes = {least}").buffers.bytes == least
    assert faults(f"[server]\nmax_clients = 1000\n[buffers]\nbytes = {least - 1}")


def test_rule_is_silent_about_a_key_that_is_wrong_by_itself() -> None:
    assert only_fault('[server]\nmax_clients = 1000\n[buffers]\nbytes = "lots"').startswith("FILE: buffers.bytes")


def test_segment_is_a_multiple_of_the_chunk() -> None:
    assert "write 983040" in only_fault("[spool]\nsegment_bytes = 1000000")
    assert "write 1048576" in only_fault('[spool]\nsegment_bytes = 65536\n[buffers]\nchunk_bytes = "1 MiB"')


@pytest.mark.parametrize("key", ["max_bytes", "max_bytes_per_stream"])
def test_spool_limits_hold_at_least_one_segment(key: str) -> None:
    assert "less than one segment" in only_fault(f"[spool]\n{key} = 1000")
    assert loads(f"[spool]\n{key} = 0")


def test_listener_names_are_unique() -> None:
    fault = only_fault('[[listener]]\naddress = "127.0.0.1:1"\n[[listener]]\naddress = "127.0.0.1:2"\n')
    assert fault.startswith("FILE: listener.1.name")
    assert "listener.0 has this name too" in fault


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("127.0.0.1:80", "127.0.0.1:80"),
        ("0.0.0.0:80", "127.0.0.1:80"),
        ("[::1]:80", "[::]:80"),
    ],
)
def test_two_listeners_on_one_address_are_a_fault(first: str, second: str) -> None:
    text = f'[[listener]]\nname="a"\naddress="{first}"\n[[listener]]\nname="b"\naddress="{second}"\n'
    assert f"listener.0 already takes {first}" in only_fault(text)


@pytest.mark.parametrize(("first", "second"), [("127.0.0.1:80", "127.0.0.2:80"), ("127.0.0.1:0", "127.0.0.1:0")])
def test_listeners_that_do_not_meet_are_fine(first: str, second: str) -> None:
    text = f'[[listener]]\nname="a"\naddress="{first}"\n[[listener]]\nname="b"\naddress="{second}"\n'
    assert len(loads(text).listeners) == 2


def test_clients_have_ids_and_addresses_of_their_own() -> None:
    text = (
        '[[client]]\nid="a"\naddress="10.0.0.1"\n[[client]]\nid="a"\naddress="10.0.0.2"\n'
        '[[client]]\nid="b"\naddress="10.0.0.1/32"\n'
    )
    assert [fault.split(" = ")[0] for fault in faults(text)] == ["FILE: client.1.id", "FILE: client.2.address"]


@pytest.mark.parametrize("name", ["", "-a", ".a", "a b", "a/b", "ä", "a" * 65, "a\n"])
def test_client_ids_are_safe_in_paths_and_shells(name: str) -> None:
    assert faults('[[client]]\naddress = "10.0.0.1"\n', f"client.0.id={name}")


def test_client_needs_id_and_address() -> None:
    assert [fault.split(": ")[1] for fault in faults("[[client]]\n")] == ["client.0.id", "client.0.address"]


def test_values_never_break_the_line_of_their_fault() -> None:
    fault = only_fault('[server]\ncontrol_socket = "a\\nmpserverd: forged\\u001b[2J"')
    assert "\n" not in fault
    assert fault.isprintable()


def test_long_values_are_cut() -> None:
    assert len(only_fault(f'[server]\ncontrol_socket = "{"x" * 10_000}"')) < 300


def test_key_that_is_not_bare_is_quoted() -> None:
    assert only_fault('[server]\n"a.b\\n" = 1').startswith('FILE: server."a.b\\n" = 1')


def test_listener_objects_can_be_made_without_a_file() -> None:
    assert ListenerConfig(name="t", address="127.0.0.1:0").port == 0


# Every fault at once


def test_every_wrong_entry_of_a_list_is_named() -> None:
    found = faults('[server]\ncpu_affinity = [0, "x", 99999, 0]\n')
    assert [fault.split(": ")[2] for fault in found] == ['entry 1 ("x")', "entry 2 (99999)", "entry 3 (0)"]
    found = faults('[[listener]]\nallow = ["10.0.0.1/8", "::1%lo", "fe80::1/200", "::1"]\n')
    assert [fault.split(": ")[2] for fault in found] == [
        'entry 0 ("10.0.0.1/8")',
        'entry 1 ("::1%lo")',
        'entry 2 ("fe80::1/200")',
    ]


def test_wrong_type_hides_nothing_else_of_its_layout() -> None:
    found = faults(
        '[layout.x]\nsize = 8\nfields = { a = "<f4", b = "u8", c = "q", d = 3, "e f" = "<u4" }\n'
        'sequence = "gone"\ntime = "a"\n[[listener]]\nlayout = "x"\n'
    )
    assert [fault.partition("layout.x.")[2].split(" ")[0] for fault in found] == ["fields"] * 4 + [
        "size",
        "sequence",
        "time",
    ]
    assert "the type of b" in found[0] and "the type of d" in found[2] and 'field name "e f"' in found[3]
    assert "its fields take at least 18 bytes" in found[4]
    assert "it must be a whole number of 8 bytes" in found[6]


def test_size_is_judged_by_a_type_that_lacks_only_its_byte_order() -> None:
    found = faults('[layout.x]\nsize = 16\nfields = { a = "u4", b = "<u8" }\ntime = "a"\n')
    assert [fault.partition("layout.x.")[2].split(" ")[0] for fault in found] == ["fields", "size", "time"]
    assert "its fields take 12 bytes; write 12" in found[1]


def test_size_that_may_fit_is_no_fault_while_a_type_is_wrong() -> None:
    assert "layout.x.fields" in only_fault('[layout.x]\nsize = 16\nfields = { a = "q", b = "<u8" }\n')


def test_layout_without_a_size_is_still_judged() -> None:
    found = faults('[layout.x]\nfields = { a = "<u4" }\nsequence = "b"\n')
    assert [fault.partition("layout.x.")[2][:8] for fault in found] == ["size: mi", "sequence"]


def test_equal_clients_are_found_whatever_else_is_wrong_with_them() -> None:
    text = (
        '[[client]]\nid="a"\naddress="nowhere"\n[[client]]\nid="a"\naddress="10.0.0.2"\nmax_spool_bytes=-1\n'
        '[[client]]\naddress="10.0.0.2"\n[[client]]\nid="b"\naddress="10.0.0.3"\nmax_spool_bytes=5\n'
    )
    assert [fault.split(": ")[1].split(" = ")[0] for fault in faults(text)] == [
        "client.0.address",
        "client.1.max_spool_bytes",
        "client.2.id",
        "client.3.max_spool_bytes",
        "client.1.id",
        "client.2.address",
    ]


def test_equal_listeners_are_found_behind_one_that_is_wrong() -> None:
    text = '[[listener]]\nname="a b"\naddress="x"\n' + 2 * '[[listener]]\naddress="127.0.0.1:9"\n'
    assert [fault.split(": ")[1].split(" = ")[0] for fault in faults(text)] == [
        "listener.0.name",
        "listener.0.address",
        "listener.2.name",
        "listener.2.address",
    ]


def test_entry_that_is_no_table_is_named_and_the_others_are_judged() -> None:
    found = faults('listener = [3, {name = "a", address = "127.0.0.1:1"}, {name = "a", address = "127.0.0.1:2"}]\n')
    assert [fault.split(": ")[1] for fault in found] == ["listener.0 = 3", 'listener.2.name = "a"']


def test_unknown_section_is_shown_with_its_value() -> None:
    assert only_fault("[sink]\nname = 3\n").startswith("FILE: sink = {name = 3}: unknown section; ")
    assert only_fault("x = 3\n").startswith("FILE: x = 3: unknown section; ")
