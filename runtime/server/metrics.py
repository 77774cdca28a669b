"""The metrics of a server, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from headwise.runtime.engine.request import Request
from headwise.runtime.server.replica_metrics import replica_metrics

SILENCE_S = 10.0
"""For a client of the metrics to say what it wants, and to take what it gets."""
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200, 2400, 3600)
"""Up to the default of --max-request-time."""


class Metrics:
    """The server's own counts, and the engine's counts as they are when Prometheus asks."""

    def __init__(self, engine_stats: Callable[[], dict[str, Any]]) -> None:
        """
        Args:
            engine_stats: returns ``AsyncModel.stats()``; may be called from any thread.
        """
        self.registry = CollectorRegistry()
        self.time_to_first_token = self._histogram("time_to_first_token_seconds", "From arrival to the first token.")
        self.inter_token = self._histogram("inter_token_latency_seconds", "Mean time between a request's tokens.")
        self.queue_time = self._histogram("queue_time_seconds", "From arrival to the first step.")
        self.duration = self._histogram("request_duration_seconds", "From arrival to the end.")
        self.requests = Counter(
            "headwise_requests_total", "Requests by the code they ended with.", ["code"], registry=self.registry
        )
        self.tokenizations = Counter(
            "headwise_tokenizations_total",
            "Calls to Tokenize, Detokenize and GetTokenizer by the code they ended with.",
            ["code"],
            registry=self.registry,
        )
        self.prompt_tokens = Counter("headwise_prompt_tokens_total", "Prompt tokens.", registry=self.registry)
        self.cached_tokens = Counter(
            "headwise_cached_prompt_tokens_total", "Prompt tokens found in the prefix cache.", registry=self.registry
        )
        self.registry.register(_EngineCollector(engine_stats))

    def observe(self, requests: Sequence[Request], duration_s: float) -> None:
        """Counts the samples of a request that has ended, by itself or because its client has left."""
        self.duration.observe(duration_s)
        first = requests[0].metrics
        if not first.first_scheduled:
            return
        self.prompt_tokens.inc(len(requests[0].prompt_token_ids))
        self.cached_tokens.inc(first.num_cached_tokens)
        for request in requests:
            metrics, tokens = request.metrics, len(request.generated)
            if metrics.first_scheduled:
                self.queue_time.observe(metrics.first_scheduled - metrics.arrival)
            if metrics.first_token:
                self.time_to_first_token.observe(metrics.time_to_first_token)
            if tokens > 1 and metrics.finished:
                self.inter_token.observe((metrics.finished - metrics.first_token) / (tokens - 1))

    def serve(self, host: str, port: int) -> tuple[int, Callable[[], None]]:
        """Serves the metrics on a thread of its own; returns the port, and a function that ends it."""
        server, thread = start_http_server(port, host, self.registry)
        # Each connection has a thread; without a limit, one that says nothing would keep it.
        handler: Any = server.RequestHandlerClass
        server.RequestHandlerClass = type("Handler", (handler,), {"timeout": SILENCE_S})

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join(5.0)

        return int(server.server_port), stop

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"headwise_{name}", text, buckets=_SECONDS, registry=self.registry)


class _EngineCollector(Collector):
    def __init__(self, engine_stats: Callable[[], dict[str, Any]]) -> None:
        self._engine_stats = engine_stats

    def collect(self) -> Iterable[Metric]:
        try:
            stats = self._engine_stats()
        except Exception:  # the engine is gone; what the server counted is still of use
            yield GaugeMetricFamily("headwise_engine_up", "Whether the engine runs.", 0)
            return
        cache = stats["prefix_cache"]
        yield GaugeMetricFamily("headwise_engine_up", "Whether the engine runs.", 1)
        yield GaugeMetricFamily("headwise_requests_running", "Requests that are computed.", stats["num_running"])
        yield GaugeMetricFamily("headwise_requests_waiting", "Requests that wait.", stats["num_waiting"])
        if stats["num_blocks"]:  # else the shards are dead, and others are started
            used = 1 - stats["num_free_blocks"] / stats["num_blocks"]
            yield GaugeMetricFamily("headwise_kv_usage_ratio", "Share of the KV blocks that requests hold.", used)
        blocks = GaugeMetricFamily("headwise_kv_blocks", "KV blocks by state.", labels=["state"])
        for state, count in cache["blocks"].items():
            blocks.add_metric([state], count)
        yield blocks
        for name, key, text in (
            ("headwise_steps", "num_steps", "Steps computed."),
            ("headwise_generated_tokens", "num_generated_tokens", "Tokens generated."),
            ("headwise_preemptions", "num_preemptions", "Requests that had to give up their blocks for a while."),
        ):
            yield CounterMetricFamily(name, text, stats[key])
        yield from _cache_metrics(cache)
        if "replicas" in stats:
            yield from replica_metrics(stats["replicas"], stats["routing"])
        yield from _recovery_metrics(stats["epoch"], stats["recoveries"])
        # A server with a prefill engine of its own has both sides.
        handoffs = [side.get("handoff") for side in (stats, stats.get("prefill", {}))]
        yield from _handoff_metrics({side["role"]: side for side in handoffs if side})


def _cache_metrics(cache: dict[str, Any]) -> Iterable[Metric]:
    tiers = {"device": cache} | {name: cache["tiers"][name] for name in ("host", "disk") if name in cache["tiers"]}
    for key in ("queried", "hit", "inserted"):
        tokens = CounterMetricFamily(f"headwise_prefix_cache_{key}_tokens", f"Tokens {key}, by tier.", labels=["tier"])
        for tier, counts in tiers.items():
            tokens.add_metric([tier], counts[f"{key}_tokens"])
        yield tokens
    evictions = CounterMetricFamily(
        "headwise_prefix_cache_evicted_blocks", "Blocks evicted, by tier and cause.", labels=["tier", "cause"]
    )
    for tier, counts in tiers.items():
        for cause, count in counts["evictions"].items():
            evictions.add_metric([tier, cause], count)
    yield evictions
    yield CounterMetricFamily(
        "headwise_prefix_cache_duplicate_blocks", "Blocks computed twice and kept once.", cache["duplicate_blocks"]
    )
    yield CounterMetricFamily(
        "headwise_prefix_cache_integrity_checks", "Checks of the books passed.", cache["integrity_checks"]
    )


def _recovery_metrics(epoch: int, recoveries: dict[str, Any]) -> Iterable[Metric]:
    yield GaugeMetricFamily("headwise_epoch", "Number of the shards' generation; a later one has a larger.", epoch)
    rebuilding = "Whether the shards are dead, and others are started."
    yield GaugeMetricFamily("headwise_rebuilding", rebuilding, int(recoveries["rebuilding"]))
    deaths = CounterMetricFamily(
        "headwise_shard_deaths", "Shard groups that died, by the rank that died first.", labels=["rank"]
    )
    for rank, count in recoveries.get("deaths_by_rank", {}).items():
        deaths.add_metric([rank], count)
    yield deaths
    yield CounterMetricFamily(
        "headwise_recoveries", "Shard groups that took the place of one that died.", recoveries.get("count", 0)
    )
    if (seconds := recoveries.get("last_seconds")) is not None:
        took = "From the last death until there were shards again."
        yield GaugeMetricFamily("headwise_last_recovery_seconds", took, seconds)
    spare = GaugeMetricFamily("headwise_warm_spare", "1 for the state of the spare shards.", labels=["state"])
    for state in ("none", "loading", "ready"):
        spare.add_metric([state], int(recoveries.get("spare", "none") == state))
    yield spare


_HANDOFF_COUNTERS = (
    ("bytes", "bytes", "Bytes of keys and values, received by decode and sent by prefill."),
    ("prompt_tokens", "tokens", "Prompt tokens that others computed for this server."),
    ("seconds", "seconds", "From the start of a handoff until its blocks could be read, of those that were committed."),
    ("pushes", "pushes", "Pushes of a chunk's blocks."),
    ("push_failures", "push_failures", "Pushes that did not arrive."),
    ("push_seconds", "push_seconds", "That pushes took."),
    ("hidden_push_seconds", "hidden_seconds", "Of the seconds of pushes, those while the same prompt was computed."),
)
_HANDOFF_GAUGES = (
    ("headwise_handoffs_in_flight", "in_flight", "Handoffs that are on their way."),
    ("headwise_handoff_reserved_blocks", "reserved_blocks", "KV blocks that handoffs fill."),
    ("headwise_handoff_oldest_seconds", "oldest_s", "Since the start of the oldest handoff that is on its way."),
)


def _handoff_metrics(sides: dict[str, dict[str, Any]]) -> Iterable[Metric]:
    """Of each side by its role; nothing where there are no handoffs."""
    if not sides:
        return
    outcomes = CounterMetricFamily(
        "headwise_handoffs", "Handoffs that are over, by outcome and cause.", labels=["role", "outcome", "cause"]
    )
    for role, counts in sides.items():
        for outcome in ("committed", "cancelled", "failed"):
            if outcome in counts:
                outcomes.add_metric([role, outcome, ""], counts[outcome])
        for cause, count in counts.get("causes", {}).items():
            outcomes.add_metric([role, "fallback", cause], count)
    yield outcomes
    for name, key, text in _HANDOFF_COUNTERS:
        yield from _by_role(CounterMetricFamily(f"headwise_handoff_{name}", text, labels=["role"]), key, sides)
    for name, key, text in _HANDOFF_GAUGES:
        yield from _by_role(GaugeMetricFamily(name, text, labels=["role"]), key, sides)
    peers = {name: peer for counts in sides.values() for name, peer in counts.get("peers", {}).items()}
    if peers:
        connected = GaugeMetricFamily(
            "headwise_handoff_peer_connected", "Whether a prefill engine is connected.", labels=["peer"]
        )
        for name, peer in peers.items():
            connected.add_metric([name], int(peer["connected"]))
        yield connected


def _by_role(
    family: CounterMetricFamily | GaugeMetricFamily, key: str, sides: dict[str, dict[str, Any]]
) -> Iterable[Metric]:
    """One metric of the sides that count it; none where neither does."""
    for role, counts in sides.items():
        if key in counts:
            family.add_metric([role], counts[key])
    if family.samples:
        yield family
