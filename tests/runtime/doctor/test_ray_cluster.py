"""Ray's tokens, and what is wrong with nodes."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from headwise.cluster.ray_nodes import NodeFacts
from headwise.runtime.doctor import ray_cluster
from headwise.runtime.doctor.finding import Level
from headwise.runtime.doctor.ray_cluster import cpus, nodes, ray_auth, refused, unreachable, without_ray

HERE = {"headwise": "0.1.0", "torch": "2.13.0"}
GOOD = {"versions": HERE, "shared_memory_bytes": 1 << 30, "open_files": 65536}
SECRET = "a-token-that-nobody-may-see"


def node(**facts: Any) -> NodeFacts:
    return NodeFacts("10.0.0.2", 4.0, 1.0, **{**GOOD, **facts})


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A home with a token in it."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(SECRET)
    (tmp_path / ".ray" / "auth_token").chmod(0o600)
    return tmp_path


def test_a_token_that_is_used(kept: Path) -> None:
    for environment in ({}, {"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_TOKEN": SECRET}):
        assert ray_auth(environment, kept, joins=False).level is Level.PASS
    assert ray_auth({"RAY_AUTH_MODE": "token"}, kept, joins=True).level is Level.PASS


def test_a_ray_of_its_own_makes_a_token(tmp_path: Path) -> None:
    assert ray_auth({}, tmp_path, joins=False).level is Level.PASS
    assert ray_auth({}, tmp_path / "none", joins=False).level is Level.FAIL


def test_a_token_that_is_missing(tmp_path: Path) -> None:
    found = ray_auth({"RAY_AUTH_MODE": "token"}, tmp_path, joins=True)
    assert found.level is Level.FAIL and "there is no token" in found.said and "RAY_AUTH_TOKEN" in found.fix


def test_a_token_that_ray_does_not_look_for(kept: Path, tmp_path: Path) -> None:
    found = ray_auth({}, kept, joins=True)
    assert found.level is Level.WARN and "is not used" in found.said and found.fix == "RAY_AUTH_MODE=token"


@pytest.mark.parametrize("text", [None, "  \n"])
def test_a_file_that_holds_none(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "token"
    if text is not None:
        path.write_text(text)
    found = ray_auth({"RAY_AUTH_TOKEN_PATH": str(path)}, tmp_path, joins=False)
    assert found.level is Level.FAIL and str(path) in found.said and found.fix


@pytest.mark.parametrize("held", [b"", b"\xff\xfe\x00"])
def test_a_token_of_ray_itself_that_cannot_be_used(kept: Path, held: bytes) -> None:
    path = kept / ".ray" / "auth_token"
    path.write_bytes(held)
    found = ray_auth({"RAY_AUTH_MODE": "token"}, kept, joins=True)
    assert found.level is Level.FAIL and str(path) in found.said
    assert refused("127.0.0.1:1", {"RAY_AUTH_MODE": "token"}, kept, 1.0) is None


def test_without_authentication(kept: Path) -> None:
    assert ray_auth({"RAY_AUTH_MODE": "disabled"}, kept, joins=True).level is Level.WARN
    assert ray_auth({"RAY_AUTH_MODE": "none"}, kept, joins=True).level is Level.FAIL


def test_a_token_that_others_may_read(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = kept / ".ray" / "auth_token"
    path.chmod(0o644)
    monkeypatch.setattr(ray_cluster, "_others_enter", lambda folder: True)
    found = ray_auth({}, kept, joins=False)
    assert found.level is Level.WARN and found.fix == f"chmod 600 {path}"
    monkeypatch.setattr(ray_cluster, "_others_enter", lambda folder: False)
    assert ray_auth({}, kept, joins=False).level is Level.PASS


def test_the_token_itself_is_never_said(kept: Path) -> None:
    for environment in ({}, {"RAY_AUTH_TOKEN": SECRET}, {"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_MODE": "disabled"}):
        for joins in (False, True):
            assert SECRET not in str(ray_auth(environment, kept, joins))


def test_an_address_where_nothing_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        assert unreachable(address) is None
    for one in (address, f"ray://{address}", "127.0.0.1:99999", "nowhere.invalid:6379"):
        found = unreachable(one)
        assert found is not None and found.level is Level.FAIL and one in found.said and "ray start" in found.fix
    assert unreachable("auto") is None


class Head(grpc.GenericRpcHandler):
    """Of a cluster that lets in who has its token, or everybody."""

    def __init__(self, token: str) -> None:
        self.token = token

    def service(self, details: Any) -> Any:
        if details.method != "/ray.rpc.NodeInfoGcsService/CheckAlive":
            return None
        sent = dict(details.invocation_metadata).get("authorization")
        lets_in = not self.token or sent == f"Bearer {self.token}"

        def answer(message: bytes, context: grpc.ServicerContext) -> bytes:
            return b"" if lets_in else context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")

        return grpc.unary_unary_rpc_method_handler(answer)


@pytest.fixture
def head() -> Iterator[Callable[[str], str]]:
    """Starts one with a token, or "" for none; gives its address."""
    servers = []

    def start(token: str) -> str:
        servers.append(grpc.server(ThreadPoolExecutor(1), handlers=[Head(token)]))
        port = servers[-1].add_insecure_port("127.0.0.1:0")
        servers[-1].start()
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        assert server.stop(0).wait(10.0)


def test_a_cluster_that_lets_this_process_in(head: Callable[[str], str], kept: Path) -> None:
    for environment in ({"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": SECRET}):
        assert refused(head(SECRET), environment, kept) is None
    assert refused(head(""), {}, kept) is None


def test_a_cluster_that_does_not(head: Callable[[str], str], kept: Path) -> None:
    address = head("another-token")
    found = refused(address, {"RAY_AUTH_MODE": "token"}, kept)
    assert found is not None and found.level is Level.FAIL and SECRET not in str(found)
    assert f"refuses the token of {kept / '.ray' / 'auth_token'}" in found.said
    found = refused(address, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": SECRET}, kept)
    assert found is not None and "refuses the token of RAY_AUTH_TOKEN" in found.said and SECRET not in str(found)
    for environment in ({}, {"RAY_AUTH_TOKEN": SECRET}):  # which Ray does not use without the mode
        found = refused(address, environment, kept)
        assert found is not None and "gets none" in found.said and found.fix.startswith("RAY_AUTH_MODE=token")


def test_what_is_no_head_is_left_to_ray(kept: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        silent = f"127.0.0.1:{listener.getsockname()[1]}"
        assert refused(silent, {}, kept, timeout_s=0.2) is None
    for address in ("auto", f"ray://{silent}", silent):
        assert refused(address, {}, kept, timeout_s=0.2) is None


def test_a_cluster_without_cpus() -> None:
    none = NodeFacts("10.0.0.1", 0.0, 0.0, **GOOD)
    [found] = cpus([none, NodeFacts("10.0.0.3", 4.0, 0.0, problem="silent")])
    assert found.level is Level.FAIL and "none gives out a CPU" in found.said and "--num-cpus" in found.fix
    assert cpus([none, node()]) == [] and cpus([]) == []


def test_a_good_node() -> None:
    [found] = nodes([node()], HERE)
    assert found.level is Level.PASS and found.said == "4 CPUs and 1 GPUs"


@pytest.mark.parametrize(
    ("facts", "name", "level", "said", "fix"),
    [
        ({"problem": "No module named 'headwise'"}, "Ray node", Level.FAIL, "No module", "install this Headwise"),
        ({"versions": {"torch": "2.13.0"}}, "versions", Level.FAIL, "headwise missing (here 0.1.0)", "one image"),
        ({"versions": HERE | {"torch": "2.12"}}, "versions", Level.WARN, "torch 2.12 (here 2.13.0)", "one image"),
        ({"shared_memory_bytes": 1 << 20}, "Ray node", Level.FAIL, "1 MiB of shared memory", "--shm-size"),
        ({"open_files": 512}, "open files", Level.FAIL, "may have 512", "ulimit -n"),
        ({"clock_ahead_s": -90.0}, "clock", Level.FAIL, "90.0 s behind", "chrony"),
    ],
)
def test_what_is_wrong_with_a_node(facts: dict[str, Any], name: str, level: Level, said: str, fix: str) -> None:
    first = nodes([node(**facts)], HERE)[0]
    assert first.level is level and first.name.startswith(name) and "10.0.0.2" in first.name
    assert said in first.said and fix in first.fix


def test_no_limit_of_open_files() -> None:
    assert [found.level for found in nodes([node(open_files=-1)], HERE)] == [Level.PASS]


def test_without_ray_there_is_one_rank() -> None:
    assert without_ray(1).level is Level.PASS
    found = without_ray(2)
    assert found.level is Level.FAIL and "--tp 2" in found.said and "--executor ray" in found.fix
