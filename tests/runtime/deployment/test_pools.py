"""Prefill replicas compute the prompts of decode replicas, come and go while these run, and no request is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from headwise.runtime.config import EngineConfig, handoff_config
from headwise.runtime.deployment.messages import Output, Peers, Report, RequestDelta
from headwise.runtime.deployment.prefill_door import on_node, reachable
from headwise.runtime.handoff.links import NamedPeer
from headwise.runtime.output import FinishReason
from headwise.runtime.sides import pool_configs
from headwise.runtime.tls import channel_credentials
from headwise.v1.kv_transfer_pb2 import QueryRequest
from headwise.v1.kv_transfer_pb2_grpc import KvHandoffServiceStub
from headwise.workers.plan import RowSampling
from tests.conftest import own_addresses
from tests.local_replicas import LocalReplica, LocalReplicas
from tests.replica_talk import Talk

NAMESPACE = b"n" * 32
TOKEN = "the-token-of-this-deployment"
TLS = {"ca": "-ca.pem", "tls_cert": ".pem", "tls_key": ".key"}
SAMPLING = RowSampling(temperature=0.8, seed=3)


def prompt(number: int) -> list[int]:
    return [3 + (7 * number + index * index) % 200 for index in range(100)]


class Pools:
    """A decode replica, which hands over every prompt, and prefill replicas beside it."""

    def __init__(self, settings: dict[str, Any], **tls: str) -> None:
        self._settings = settings | {"kv_memory": "4MiB"}
        self.replicas = LocalReplicas()
        self.prefill: dict[str, LocalReplica] = {}
        decode = self.start("decode", {"role": "decode", "min_tokens": 0, **tls})
        self.talk: Talk[LocalReplica] = Talk(decode)

    def start(self, name: str, handoff: dict[str, Any] | None) -> LocalReplica:
        return self.replicas.start(name, self._settings | {"handoff": handoff}, lambda name, cause: None)

    def use(self, *names: str) -> None:
        """These prefill replicas, started if they are new; returns once decode is connected to them and no others."""
        for name in names:
            if name not in self.prefill:
                self.prefill[name] = self.start(name, {"role": "prefill"})
        self.talk.say(Peers(tuple((name, self.prefill[name].about["handoff_address"]) for name in names)))
        self.stats(lambda stats: {n: p["connected"] for n, p in stats["peers"].items()} == dict.fromkeys(names, True))

    def stats(self, holds: Any = lambda stats: True) -> dict[str, Any]:
        def fits(report: Report) -> bool:
            return report.stats is not None and holds(report.stats["handoff"])

        report = self.talk.report(fits)
        assert report.stats is not None
        return dict(report.stats["handoff"])

    def computed_by(self, number: int) -> str | None:
        """Which replica computed the prompt of a new request."""
        first = self.talk.deltas(self.talk.add(prompt(number), 4, SAMPLING, namespace=NAMESPACE))[0].first
        assert first is not None and first.num_handoff_tokens == (96 if first.prefilled_by else 0)
        return first.prefilled_by


@pytest.fixture
def pools(replica_settings: dict[str, Any]) -> Iterator[Pools]:
    made = Pools(replica_settings)
    yield made
    made.replicas.close()


def test_prompts_are_computed_by_who_serves_now(pools: Pools) -> None:
    assert pools.computed_by(0) is None
    pools.use("replica-1")
    assert pools.computed_by(1) == "replica-1"
    pools.use("replica-1", "replica-2")
    assert {pools.computed_by(number) for number in range(2, 6)} <= {"replica-1", "replica-2"}
    pools.use("replica-2")
    assert {pools.computed_by(number) for number in range(12, 16)} == {"replica-2"}
    pools.use()
    assert pools.computed_by(16) is None


def test_tokens_are_those_of_one_engine_when_a_prefill_replica_dies(pools: Pools) -> None:
    alone: Talk[LocalReplica] = Talk(pools.start("alone", None))
    right = [alone.tokens(alone.add(prompt(number), 24, SAMPLING)) for number in range(12)]
    pools.use("replica-1", "replica-2")
    talk = pools.talk
    numbers = [talk.add(prompt(number), 24, SAMPLING, namespace=NAMESPACE) for number in range(12)]
    found: dict[int, list[RequestDelta]] = {number: [] for number in numbers}
    victim = pools.prefill["replica-1"]

    def look(message: object) -> bool | None:
        for delta in message.deltas if isinstance(message, Output) else []:
            found[delta.number].append(delta)
        return True if all(deltas and deltas[-1].finish_reason for deltas in found.values()) else None

    talk.wait_for(lambda message: True if look(message) or any(found.values()) else None)
    victim.die()
    if not all(deltas and deltas[-1].finish_reason for deltas in found.values()):
        talk.wait_for(look)
    assert [[t for delta in found[number] for t in delta.token_ids] for number in numbers] == right
    assert all(found[number][-1].finish_reason is FinishReason.LENGTH for number in numbers)
    assert pools.stats()["committed"] > 0
    pools.use("replica-2", "replica-3")
    assert {pools.computed_by(number) for number in range(12, 16)} <= {"replica-2", "replica-3"}
    pools.use("replica-3")
    assert pools.computed_by(16) == "replica-3"


def test_shards_that_are_started_again_meet_who_serves_now(pools: Pools) -> None:
    pools.use("replica-1")
    pools.use("replica-2")
    before = pools.talk.replica.host._started.engine.generation
    assert before.group._mailbox is not None  # type: ignore[attr-defined]
    before.group._mailbox.declare_dead(0, "gone")  # type: ignore[attr-defined]
    pools.talk.report(lambda report: report.epoch != before.epoch and not report.rebuilding)
    pools.stats(lambda stats: {name: one["connected"] for name, one in stats["peers"].items()} == {"replica-2": True})
    assert pools.computed_by(5) == "replica-2"


def test_a_replica_that_does_all_itself_passes_peers_over(pools: Pools, caplog: pytest.LogCaptureFixture) -> None:
    talk: Talk[LocalReplica] = Talk(pools.start("alone", None))
    talk.say(Peers((("replica-1", "127.0.0.1:1"),)))
    assert len(talk.tokens(talk.add(prompt(0), 4))) == 4
    assert "peers=['replica-1']: an engine has its prompts computed by others with the role decode" in caplog.text


def test_decode_on_another_host_comes_in_by_tls_with_a_certificate(
    replica_settings: dict[str, Any], certificates: Path
) -> None:
    """As much of it as one host can show: the socket is passed over."""
    if not (own := own_addresses()):
        pytest.skip("this host has no address by which others reach it")
    tls = {key: str(certificates / f"good{end}") for key, end in TLS.items()}
    tls["token"] = TOKEN
    pools = Pools(replica_settings | {"node_address": own[0]}, **tls)
    try:
        prefill = pools.start("replica-1", {"role": "prefill", **tls})
        remote = prefill.about["handoff_address"].partition(",")[0]
        assert remote.startswith(f"{own[0]}:")
        pools.talk.say(Peers((("replica-1", remote),)))
        pools.stats(lambda stats: stats["peers"].get("replica-1", {}).get("connected"))
        assert pools.computed_by(1) == "replica-1"
        assert _greets(remote, certificates, "good") is grpc.StatusCode.OK
        for name in ("other", None):
            assert _greets(remote, certificates, name) is grpc.StatusCode.UNAVAILABLE
        for token in (TOKEN[1:], "", None):  # such as a client's that the same authority knows
            assert _greets(remote, certificates, "good", token) is grpc.StatusCode.UNAUTHENTICATED
    finally:
        pools.replicas.close()


def _greets(address: str, certificates: Path, name: str | None, token: str | None = TOKEN) -> grpc.StatusCode:
    """How a client with a certificate of an authority, or none, is received."""
    files = [certificates / f"{name}.pem", certificates / f"{name}.key"] if name is not None else [None, None]
    metadata = [("authorization", f"Bearer {token}")] if token is not None else None
    with grpc.secure_channel(address, channel_credentials(certificates / "good-ca.pem", *files)) as channel:
        try:
            KvHandoffServiceStub(channel).Query(QueryRequest(), timeout=5.0, metadata=metadata)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def test_both_sides_of_a_deployment_have_a_token_of_its_own() -> None:
    config = EngineConfig(model="smollm2", prefill={}, handoff=handoff_config(role="decode"))
    sides = [pool_configs(config), pool_configs(config)]
    tokens = [{side.handoff.token for side in pair if side.handoff is not None} for pair in sides]
    assert [len(one) for one in tokens] == [1, 1] and tokens[0] != tokens[1] and None not in tokens[0]


def test_a_decode_replica_with_certificates_takes_blocks_at_its_hosts_address() -> None:
    plain = handoff_config(role="decode")
    assert on_node(plain, "192.0.2.1") == plain
    secured = handoff_config(role="decode", ca="ca", tls_cert="cert", tls_key="key")
    assert on_node(secured, None) == on_node(secured, "127.0.0.1") == plain
    assert on_node(secured, "192.0.2.1").host == "192.0.2.1"
    named = secured.model_copy(update={"host": "192.0.2.7"})
    assert on_node(named, "192.0.2.1") == named


def test_the_way_to_a_prefill_replica_is_the_socket_where_it_is_there(tmp_path: Any) -> None:
    here = tmp_path / "handoff"
    here.touch()
    assert reachable([("a", f"unix:{here}"), ("b", f"192.0.2.1:5,unix:{here}")]) == (
        [NamedPeer("a", f"unix:{here}"), NamedPeer("b", f"unix:{here}")],
        [],
    )
    ways = [("a", "unix:/nowhere/a"), ("b", "192.0.2.1:5,unix:/nowhere/b"), ("c", "192.0.2.1:6")]
    assert reachable(ways) == (
        [NamedPeer("b", "192.0.2.1:5"), NamedPeer("c", "192.0.2.1:6")],
        ["a"],
    )
