"""Ray: whether this process may join a cluster, and what its nodes say of themselves."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.runtime.doctor.finding import Finding, Level, failed, passed, warned
from headwise.runtime.doctor.machine import clock_skew, open_files
from headwise.runtime.sizes import size_text

if TYPE_CHECKING:
    from headwise.cluster.ray_nodes import NodeFacts

_MAKE_TOKEN = "ray get-auth-token --generate makes a token"
_CHECK_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""What Ray's head answers to whoever it lets in."""
LEAST_SHARED_MEMORY = 64 << 20
"""What ranks of a node may take, and what Docker gives a container that asks for none."""


def without_ray(tp: int) -> Finding:
    """Of ``--executor local``."""
    if tp > 1:
        return failed("Ray", f"--executor local has one rank, and not --tp {tp}", "--executor ray, or --tp 1")
    return passed("Ray", "none is needed: --executor local")


def ray_auth(environment: Mapping[str, str], home: Path, joins: bool) -> Finding:
    """Whether Ray lets in only who has its token, and this process has one. Says nothing of the token itself.

    Args:
        environment: of this process.
        home: the folder where Ray keeps a token of its own.
        joins: a cluster at an address, with which Ray uses a token only if it is told to; else it starts its own.
    """
    name, mode = "Ray auth", environment.get("RAY_AUTH_MODE", "").lower()
    if mode not in ("", "token", "disabled"):
        return failed(name, f"RAY_AUTH_MODE={mode} is no mode of Ray's", "set it to token, or to disabled")
    if mode == "disabled":
        said = "RAY_AUTH_MODE=disabled: who reaches the cluster's ports runs programs on it"
        return warned(name, said, f"RAY_AUTH_MODE=token on every node and here; {_MAKE_TOKEN}")
    where, problem = _token(environment, home)
    if problem:
        fix = f"write the cluster's token there, or give it in RAY_AUTH_TOKEN alone; {_MAKE_TOKEN}"
        return failed(name, problem, fix)
    if joins:
        return _joining(name, mode, where)
    if where is None and not os.access(home, os.W_OK):
        said = f"{home} has no Ray token, and cannot be written to for one"
        return failed(name, said, "give RAY_AUTH_TOKEN_PATH, or a HOME of this user's own")
    return _kept(name, where) if where is not None else passed(name, f"Ray makes a token in {home}/.ray when it starts")


def _joining(name: str, mode: str, where: str | Path | None) -> Finding:
    put = "put the cluster's token (ray get-auth-token on its head) into ~/.ray/auth_token or RAY_AUTH_TOKEN"
    if mode == "token":
        said = "RAY_AUTH_MODE=token, and there is no token"
        return failed(name, said, put) if where is None else _kept(name, where)
    there = f"the token of {where} is not used" if where is not None else "there is no token"
    said = f"RAY_AUTH_MODE is not set, so {there}; a cluster that asks for one does not let this process in"
    return warned(name, said, "RAY_AUTH_MODE=token" if where is not None else f"RAY_AUTH_MODE=token, and {put}")


def _token(environment: Mapping[str, str], home: Path) -> tuple[str | Path | None, str]:
    """Where Ray finds a token, in the order in which it looks; and what is wrong with the file."""
    if environment.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN", ""
    named, own = environment.get("RAY_AUTH_TOKEN_PATH"), home / ".ray" / "auth_token"
    if not named and not own.is_file():
        return None, ""
    path, said = (Path(named), f"RAY_AUTH_TOKEN_PATH={named}") if named else (own, str(own))
    try:
        held = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        return None, f"{said} cannot be read ({type(error).__name__})"
    return (path, "") if held else (None, f"{said} is empty")


def _kept(name: str, where: str | Path) -> Finding:
    # Ray itself makes the file readable by all; a home that others may not enter keeps them from it.
    if isinstance(where, Path) and where.stat().st_mode & 0o044 and _others_enter(where.parent):
        said = f"other users may read the token in {where}, and run programs on the cluster with it"
        return warned(name, said, f"chmod 600 {where}")
    return passed(name, f"the token of {where}")


def _others_enter(folder: Path) -> bool:
    return all(one.stat().st_mode & 0o011 for one in (folder, *folder.resolve().parents))


def unreachable(address: str, timeout_s: float = 5.0) -> Finding | None:
    """The failure of a cluster at whose ``host:port`` nothing listens: Ray itself would try for minutes. None if
    something does, or the address is of another form."""
    host, _, number = address.rpartition("://")[2].rpartition(":")
    if not host or not number.isdigit():
        return None
    try:
        socket.create_connection((host.strip("[]"), int(number)), timeout_s).close()
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        fix = "start it there (ray start --head), let the firewall pass, or give the address that ray status says"
        return failed("Ray", f"nothing answers at {address}: {why}", fix)
    return None


def refused(address: str, environment: Mapping[str, str], home: Path, timeout_s: float = 5.0) -> Finding | None:
    """The failure of a cluster that does not let this process in, of which Ray itself would only say, after many
    seconds, that it cannot connect. None if it does, or the address is of another form.

    Args:
        environment, home: as of :func:`ray_auth`.
    """
    import grpc

    target = address.rpartition("://")[2]
    if not target.rpartition(":")[0] or address.startswith("ray://"):  # Ray Client, which speaks otherwise
        return None
    used = _token(environment, home) if environment.get("RAY_AUTH_MODE", "").lower() == "token" else (None, "")
    token = _read(used[0], environment)
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    with grpc.insecure_channel(target, [("grpc.enable_http_proxy", 0)]) as channel:
        ask: Any = channel.unary_unary(_CHECK_ALIVE)
        try:
            ask(b"", metadata=metadata, timeout=timeout_s)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAUTHENTICATED:  # Ray is left to say what is wrong
                return None
        else:
            return None
    said = f"{address} refuses the token of {used[0]}" if token else f"{address} asks for a token, and gets none"
    fix = "what ray get-auth-token says on its head goes into ~/.ray/auth_token or RAY_AUTH_TOKEN here"
    return failed("Ray", said, f"RAY_AUTH_MODE=token, and {fix}")


def _read(where: str | Path | None, environment: Mapping[str, str]) -> str:
    if isinstance(where, Path):
        return where.read_text().strip()
    return environment[where].strip() if where is not None else ""


def cpus(found: Sequence[NodeFacts]) -> list[Finding]:
    """A failure where no node that answers has a CPU for a rank."""
    answering = [node for node in found if not node.problem]
    if not answering or any(node.cpus > 0 for node in answering):
        return []
    said = f"of {len(answering)} nodes none gives out a CPU, and each rank takes some"
    return [failed("Ray CPUs", said, "start a node without --num-cpus=0: ray start --address=HEAD:6379")]


def nodes(found: Sequence[NodeFacts], here: Mapping[str, str]) -> list[Finding]:
    """What is so on each node of a cluster.

    Args:
        here: versions of packages on this machine, which the nodes have to have, too.
    """
    findings = []
    for node in found:
        name = f"Ray node {node.address}"
        if node.problem:
            fix = "install this Headwise there, in the Python that Ray runs with; else look at the node's logs"
            findings.append(failed(name, f"does not answer: {node.problem}", fix))
            continue
        findings += _versions(name, node.versions or {}, here)
        if node.shared_memory_bytes < LEAST_SHARED_MEMORY:
            said = f"{size_text(node.shared_memory_bytes)} of shared memory are free"
            fix = "make its /dev/shm larger: docker run --shm-size=2g, or an emptyDir with medium: Memory"
            findings.append(failed(name, said, fix))
        limit = resource.RLIM_INFINITY if node.open_files < 0 else node.open_files
        skew = clock_skew(name, node.clock_ahead_s, node.clock_sure_to_s)
        for one in (replace(open_files(limit, limit), name=f"open files of {name}"), skew):
            if one.level is not Level.PASS:
                findings.append(one)
        findings.append(passed(name, f"{node.cpus:g} CPUs and {node.gpus:g} GPUs"))
    return findings


def _versions(name: str, there: Mapping[str, str], here: Mapping[str, str]) -> list[Finding]:
    differ = [package for package, version in here.items() if there.get(package) != version]
    if not differ:
        return []
    said = ", ".join(f"{package} {there.get(package, 'missing')} (here {here[package]})" for package in differ)
    fix = "install the same on every node: one image, or pip install -c constraints.txt"
    # Steps go from one to the other in messages of Headwise's own version.
    make = failed if "headwise" in differ else warned
    return [make(f"versions of {name}", said, fix)]
