"""Who may connect, and which entry names an address."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpserverd.net.allowlist import AddressFilter, AddressTable, plain_address


def permits(address: str, allow: list[str], deny: list[str]) -> bool:
    return AddressFilter(allow, deny).permits(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["192.0.2.1", "::1", "::ffff:192.0.2.1", "2001:db8::1"])
def test_empty_lists_admit_everyone(address: str) -> None:
    assert permits(address, [], [])


def test_allow_list_admits_its_networks_only() -> None:
    assert permits("10.1.2.3", ["10.0.0.0/8", "fd00::/8"], [])
    assert permits("fd12::1", ["10.0.0.0/8", "fd00::/8"], [])
    assert not permits("11.0.0.1", ["10.0.0.0/8", "fd00::/8"], [])
    assert not permits("2001:db8::1", ["10.0.0.0/8", "fd00::/8"], [])


def test_deny_wins_also_over_a_longer_prefix() -> None:
    assert not permits("10.1.2.3", ["10.1.2.3"], ["10.0.0.0/8"])
    assert not permits("10.1.2.3", ["10.0.0.0/8"], ["10.1.2.3"])
    assert permits("10.1.2.4", ["10.0.0.0/8"], ["10.1.2.3"])


def test_deny_without_allow_admits_the_rest() -> None:
    assert not permits("10.0.0.1", [], ["10.0.0.0/8"])
    assert permits("11.0.0.1", [], ["10.0.0.0/8"])


def test_v4_mapped_peer_is_the_ipv4_address_that_it_is() -> None:
    assert permits("::ffff:10.0.0.1", ["10.0.0.0/8"], [])
    assert not permits("::ffff:10.0.0.1", [], ["10.0.0.0/8"])
    assert not permits("::ffff:10.0.0.1", ["::/0"], [])


def test_v4_mapped_network_holds_ipv4_peers() -> None:
    assert permits("10.0.0.1", ["::ffff:10.0.0.0/104"], [])
    assert permits("10.0.0.1", ["::ffff:0:0/96"], [])
    assert not permits("11.0.0.1", ["::ffff:10.0.0.0/104"], [])


def test_whole_families_can_be_named() -> None:
    assert permits("192.0.2.1", ["0.0.0.0/0"], [])
    assert not permits("2001:db8::1", ["0.0.0.0/0"], [])
    assert permits("2001:db8::1", ["::/0"], [])


def test_scope_of_a_link_local_peer_does_not_matter() -> None:
    assert permits("fe80::1%eth0", ["fe80::/10"], [])
    assert plain_address(ipaddress.ip_address("fe80::1%eth0")) == ipaddress.ip_address("fe80::1")


def test_text_that_is_no_network_is_refused() -> None:
    with pytest.raises(ValueError, match="does not appear"):
        AddressFilter(["example.org"])


def test_longest_prefix_names_the_client() -> None:
    table = AddressTable([("10.0.0.0/8", "all"), ("10.1.0.0/16", "hall"), ("10.1.2.3", "press")])
    found = [table.find(ipaddress.ip_address(text)) for text in ("10.1.2.3", "10.1.9.9", "10.9.9.9", "11.0.0.1")]
    assert found == ["press", "hall", "all", None]


networks = st.one_of(
    st.tuples(st.integers(0, (1 << 32) - 1), st.integers(0, 32)).map(
        lambda pair: ipaddress.IPv4Network((pair[0] >> (32 - pair[1]) << (32 - pair[1]), pair[1]))
    ),
    st.tuples(st.integers(0, (1 << 128) - 1), st.integers(0, 95)).map(
        lambda pair: ipaddress.IPv6Network((pair[0] >> (128 - pair[1]) << (128 - pair[1]), pair[1]))
    ),
)
addresses = st.one_of(
    st.integers(0, (1 << 32) - 1).map(ipaddress.IPv4Address),
    st.integers(1 << 64, (1 << 128) - 1).map(ipaddress.IPv6Address),
)


@given(st.lists(networks, max_size=8), st.lists(networks, max_size=8), addresses)
def test_compiled_lists_agree_with_trying_each_network(
    allow: list[ipaddress.IPv4Network | ipaddress.IPv6Network],
    deny: list[ipaddress.IPv4Network | ipaddress.IPv6Network],
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    plain = not any(address in network for network in deny) and (
        not allow or any(address in network for network in allow)
    )
    assert AddressFilter(allow, deny).permits(address) == plain


@given(st.lists(networks, min_size=1, max_size=8), st.data())
def test_first_and_last_address_of_a_network_are_in_it(
    allow: list[ipaddress.IPv4Network | ipaddress.IPv6Network], data: st.DataObject
) -> None:
    network = data.draw(st.sampled_from(allow))
    for address in (network[0], network[-1]):
        # ::ffff:a.b.c.d ends some IPv6 networks, and is judged as the IPv4 address that it stands for
        assert getattr(address, "ipv4_mapped", None) or AddressFilter(allow).permits(address)
