"""Whose an address is."""

from __future__ import annotations

import pytest

from headwise.runtime.addresses import network_of


@pytest.mark.parametrize(
    ("peer", "network"),
    [
        ("ipv4:192.0.2.1:5000", "192.0.2.1"),
        ("ipv6:[2001:db8:1:2:3:4:5:6]:5000", "2001:db8:1:2::/64"),
        ("ipv6:%5B2001:db8:1:2::9%5D:5001", "2001:db8:1:2::/64"),
        ("ipv6:%5Bfe80::1%25eth0%5D:5001", "fe80::/64"),
        ("ipv6:[::ffff:192.0.2.1]:5000", "192.0.2.1"),
        ("unix:/run/headwise.sock", "unix"),
        ("unix:", "unix"),
        ("", ""),
    ],
)
def test_the_addresses_of_one_party_count_as_one(peer: str, network: str) -> None:
    assert network_of(peer) == network
