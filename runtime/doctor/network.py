"""The network: ports that a server would listen on, and the interfaces by which ranks on several machines meet."""

from __future__ import annotations

from collections.abc import Mapping

from headwise.runtime.addresses import check_port
from headwise.runtime.doctor.finding import Finding, failed, passed, refused, warned
from headwise.workers.addresses import is_loopback, join
from headwise.workers.errors import InvalidValueError


def port(flag: str, host: str, number: int) -> Finding:
    """Whether a server can listen there."""
    try:
        check_port(flag, host, number)
    except InvalidValueError as error:
        return refused(flag, error, "choose another")
    return passed(flag, f"{join(host, number)} is free" if number else f"{host} is an address of this machine")


def node_addresses(addresses: list[str]) -> Finding:
    """Whether the ranks on several of Ray's nodes can reach each other by the addresses these have.

    Args:
        addresses: of the nodes.
    """
    name, hosts = "interface of Gloo", set(addresses)
    loopback = sorted(host for host in hosts if is_loopback(host))
    if loopback and len(hosts) > 1:
        said = f"a node is known by {loopback[0]}, where the other machines do not reach it"
        return failed(name, said, "start that node with ray start --node-ip-address=ADDRESS of the shared network")
    if len(hosts) == 1:
        return passed(name, "none is needed: ranks on one machine meet in its memory")
    return passed(name, f"ranks meet by the addresses of Ray's nodes: {', '.join(sorted(hosts))}")


def nccl_interface(value: str, interfaces: Mapping[str, bool]) -> Finding:
    """Whether ``NCCL_SOCKET_IFNAME`` leaves an interface.

    Args:
        value: of the variable: beginnings of names, whole names after "=", and after "^" those that are not to be used.
        interfaces: of this machine, by name: whether it is up.
    """
    name, names = "interface of NCCL", value.lstrip("^=").split(",")
    exact, excludes = "=" in value[:2], value.startswith("^")

    def chosen(interface: str) -> bool:
        return any(interface == one if exact else interface.startswith(one) for one in names if one) != excludes

    left = [one for one, up in interfaces.items() if up and chosen(one)]
    if left:
        return passed(name, f"NCCL_SOCKET_IFNAME={value} leaves {', '.join(left)}")
    there = ", ".join(one for one, up in interfaces.items() if up) or "none"
    said = f"NCCL_SOCKET_IFNAME={value} leaves no interface that is up; there are {there}"
    return failed(name, said, "unset it, or name one of these")


def gloo_variable(value: str) -> Finding:
    """``GLOO_SOCKET_IFNAME`` is set."""
    said = f"GLOO_SOCKET_IFNAME={value} changes nothing: Gloo uses the interface that leads to rank 0's node"
    fix = "unset it, and choose the network by ray start --node-ip-address"
    return warned("interface of Gloo, variable", said, fix)
