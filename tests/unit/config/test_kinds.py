"""Each kind of value takes what its bound says, and refuses the rest with a text that says what to write."""

from __future__ import annotations

import ipaddress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpserverd.config import kinds
from mpserverd.config.kinds import WrongValueError
from mpserverd.config.words import LogTarget, OnFull

SIZE = kinds.Size(4096, 1 << 30, zero="off", multiple_of=4096)


def refusal(kind: Any, value: object) -> str:
    with pytest.raises(WrongValueError) as refused:
        kind.parse(value)
    return str(refused.value)


@pytest.mark.parametrize("value", [1, 64, 0])
def test_integer_takes_its_bounds_and_its_zero(value: int) -> None:
    assert kinds.Integer(1, 64, zero="off").parse(value) == value


@pytest.mark.parametrize("value", [True, 1.0, "1", None, [1]])
def test_integer_takes_nothing_that_only_looks_like_one(value: object) -> None:
    assert "not a whole number; 1 to 64" in refusal(kinds.Integer(1, 64), value)


@pytest.mark.parametrize("value", [0, 65, -1, 1 << 80])
def test_integer_out_of_range_names_the_range(value: int) -> None:
    assert refusal(kinds.Integer(1, 64), value) == "out of range; 1 to 64"


@pytest.mark.parametrize(
    ("text", "size_bytes"), [("4 KiB", 4096), ("4KiB", 4096), ("64 MiB", 64 << 20), ("8192 B", 8192)]
)
def test_size_may_be_text_with_a_unit(text: str, size_bytes: int) -> None:
    assert SIZE.parse(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["4 kb", "4096", "-4 KiB", "4.5 KiB", "", "KiB", "\u0661 KiB", "99999999999999999999999 TiB"]
)
def test_size_refuses_text_that_is_no_size(text: str) -> None:
    assert "not a size" in refusal(SIZE, text)


def test_size_that_is_no_multiple_names_the_nearest_that_is() -> None:
    assert refusal(SIZE, 10_000) == "not a multiple of 4096; write 8192"


@given(st.integers(0, 1 << 62))
def test_size_text_reads_back_as_the_same_size(size_bytes: int) -> None:
    text = kinds.size_text(size_bytes)
    assert kinds.Size(0, 1 << 62).parse(int(text) if text.isdigit() else text) == size_bytes


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), True, "1"])
def test_number_is_finite(value: object) -> None:
    assert "not a number" in refusal(kinds.Number(0.1, 10), value)


def test_number_gives_a_float_for_a_whole_number() -> None:
    assert isinstance(kinds.Number(0.1, 10).parse(3), float)


def test_choice_gives_the_word_and_lists_the_words_it_knows() -> None:
    assert kinds.Choice(OnFull).parse("block") is OnFull.BLOCK
    assert refusal(kinds.Choice(OnFull), "drop") == 'unknown word; write "block" or "drop-oldest"'
    assert "unknown word" in refusal(kinds.Choice(OnFull), ["block"])


@pytest.mark.parametrize("value", ["0.0.0.0:8888", "[::]:8888", "127.0.0.1:0", "[2001:db8::1]:65535"])
def test_endpoint_takes_addresses_with_ports(value: str) -> None:
    assert kinds.Endpoint().parse(value) == value


def test_endpoint_is_written_in_one_way() -> None:
    assert kinds.Endpoint().parse("[2001:DB8:0::1]:80") == "[2001:db8::1]:80"


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("0.0.0.0", "no port"),
        ("0.0.0.0:", "no port"),
        ("0.0.0.0:65536", "no port"),
        ("0.0.0.0:-1", "no port"),
        ("localhost:8888", "no IP address"),
        (":8888", "no IP address"),
        ("1.2.3:8888", "no IP address"),
        ("::1:8888", "brackets"),
        ("[127.0.0.1]:8888", "brackets"),
        (8888, "not a text"),
    ],
)
def test_endpoint_says_what_is_wrong(value: object, problem: str) -> None:
    assert problem in refusal(kinds.Endpoint(), value)


def test_one_address_is_a_network_of_one() -> None:
    assert kinds.AddressOrNetwork().parse("192.0.2.7") == ipaddress.ip_network("192.0.2.7/32")


def test_network_with_bits_below_its_prefix_names_the_right_one() -> None:
    assert '"10.0.0.0/8"' in refusal(kinds.AddressOrNetwork(), "10.1.2.3/8")


def test_v4_mapped_network_becomes_ipv4() -> None:
    assert kinds.AddressOrNetwork().parse("::ffff:10.0.0.0/104") == ipaddress.ip_network("10.0.0.0/8")
    assert kinds.AddressOrNetwork().parse("::/0") == ipaddress.ip_network("::/0")


@pytest.mark.parametrize("value", ["10.0.0.0/33", "host", "", 10, None])
def test_what_is_no_network_is_refused(value: object) -> None:
    assert refusal(kinds.AddressOrNetwork(), value)


def test_list_names_the_entry_that_is_wrong() -> None:
    kind = kinds.ListOf(kinds.Integer(0, 9), 3, empty="any")
    assert kind.parse([]) == ()
    assert kind.parse([3, 1]) == (3, 1)
    assert refusal(kind, [1, 10]).startswith("entry 1 (10): out of range")
    assert "at most 3" in refusal(kind, [1, 2, 3, 4])
    assert refusal(kind, [1, 1]) == "entry 1 (1): the same as entry 0; write it once"
    assert "not a list" in refusal(kind, 1)


def test_list_that_must_not_be_empty_says_so() -> None:
    assert "empty" in refusal(kinds.ListOf(kinds.Choice(LogTarget), 3), [])


@pytest.mark.parametrize("value", ["relative", "./x", "", "/a\0b", 3])
def test_path_begins_with_a_slash(value: object) -> None:
    assert "path that begins with /" in refusal(kinds.AbsolutePath(), value)


def test_path_for_a_socket_fits_its_address() -> None:
    assert kinds.AbsolutePath(107).parse("/" + "a" * 106)
    assert "at most 107" in refusal(kinds.AbsolutePath(107), "/" + "a" * 107)


@pytest.mark.parametrize("code", ["<u8", ">i4", "<f8", "u1", "|i1", "|b1", "b1", "S8", "V3", "<f2"])
def test_type_codes_have_the_sizes_that_numpy_gives_them(code: str) -> None:
    assert kinds.type_code_bytes(code) == np.dtype(code).itemsize


@pytest.mark.parametrize(
    "code", ["u8", "<u3", "<f1", "O", "<U4", "u", "<u08", "b4", "<M8[s]", "", "<u8 ", "S0", "<u8\n"]
)
def test_type_codes_that_packets_may_not_use_are_refused(code: str) -> None:
    with pytest.raises(WrongValueError):
        kinds.type_code_bytes(code)


def test_fields_keep_their_order() -> None:
    fields = kinds.Fields().parse({"z": "<u8", "a": "u1"})
    assert list(fields) == ["z", "a"]


@pytest.mark.parametrize("value", [{}, [], "a", {"a b": "u1"}, {"a": 1}, {"a": "u9"}, {"": "u1"}, {"a" * 65: "u1"}])
def test_fields_that_are_none_are_refused(value: object) -> None:
    assert refusal(kinds.Fields(), value)
