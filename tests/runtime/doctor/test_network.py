"""Ports that are taken, and interfaces that are not there."""

from __future__ import annotations

import socket

import pytest

from headwise.runtime.doctor.finding import Level
from headwise.runtime.doctor.network import gloo_variable, nccl_interface, node_addresses, port

INTERFACES = {"lo": True, "eth0": True, "eth1": False, "docker0": True}


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number = listener.getsockname()[1]
        found = port("--openai-port", "127.0.0.1", number)
    assert found.name == "--openai-port" and found.level is Level.FAIL
    assert f"127.0.0.1:{number}" in found.said and "Address already in use" in found.said
    assert found.fix == "choose another, or 0 for a free one"
    assert port("--openai-port", "127.0.0.1", number).level is Level.PASS


def test_any_free_port_and_a_host_that_is_not_here() -> None:
    assert port("--port", "127.0.0.1", 0).level is Level.PASS
    assert port("--port", "192.0.2.1", 0).level is Level.FAIL


def test_nodes_that_others_reach() -> None:
    assert node_addresses(["127.0.0.1", "127.0.0.1"]).level is Level.PASS
    assert node_addresses(["10.0.0.1", "10.0.0.2"]).level is Level.PASS
    found = node_addresses(["10.0.0.1", "127.0.0.1"])
    assert found.level is Level.FAIL and "--node-ip-address" in found.fix


@pytest.mark.parametrize(
    ("value", "left"),
    [("eth", "eth0"), ("=eth0", "eth0"), ("^docker,lo", "eth0"), ("^=docker0", "lo, eth0"), ("ib,eth", "eth0")],
)
def test_interfaces_that_nccl_may_use(value: str, left: str) -> None:
    found = nccl_interface(value, INTERFACES)
    assert found.level is Level.PASS and found.said.endswith(f"leaves {left}")


@pytest.mark.parametrize("value", ["ib0", "eth1", "=eth", "^lo,eth,docker"])
def test_an_interface_that_is_not_up(value: str) -> None:
    found = nccl_interface(value, INTERFACES)
    assert found.level is Level.FAIL and "lo, eth0, docker0" in found.said and "unset it" in found.fix


def test_a_variable_that_changes_nothing() -> None:
    assert gloo_variable("eth0").level is Level.WARN
