"""The metrics of a deployment's replicas and of what routes requests to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

from prometheus_client.core import GaugeMetricFamily, Metric

from headwise.runtime.deployment.control import ReplicaStatus, State

_ROUTER = (
    ("blocks", "Blocks of the prefix cache that the router knows."),
    ("held", "The same, counted once for each replica that holds them."),
    ("stale", "Replicas whose blocks the router does not know just now."),
    ("requests", "Requests that were routed and have not ended."),
    ("queued_tokens", "Prompt tokens that wait at replicas, as far as the router knows."),
)


def replica_metrics(replicas: Sequence[ReplicaStatus], routing: Mapping[str, int]) -> Iterable[Metric]:
    """
    Args:
        replicas: their status.
        routing: ``Router.stats``.
    """
    states = GaugeMetricFamily("headwise_replicas", "Replicas by state.", labels=["state"])
    for state in get_args(State):
        states.add_metric([state], sum(replica["state"] == state for replica in replicas))
    yield states
    running = GaugeMetricFamily("headwise_replica_requests_running", "Requests that are computed.", labels=["replica"])
    waiting = GaugeMetricFamily("headwise_replica_requests_waiting", "Requests that wait there.", labels=["replica"])
    used = GaugeMetricFamily(
        "headwise_replica_kv_usage_ratio", "Share of the KV blocks that requests hold.", labels=["replica"]
    )
    for replica in replicas:
        if replica["state"] == "ended":
            continue
        running.add_metric([replica["name"]], replica["running"])
        waiting.add_metric([replica["name"]], replica["waiting"])
        if replica["kv_blocks"]:
            used.add_metric([replica["name"]], 1 - replica["kv_free_blocks"] / replica["kv_blocks"])
    yield from (running, waiting, used)
    for key, text in _ROUTER:
        yield GaugeMetricFamily(f"headwise_router_{key}", text, routing[key])
