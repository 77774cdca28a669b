"""``headwise serve``: a model served by gRPC, and by OpenAI's API."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from headwise.runtime.cli.handoff import (
    Decode,
    HandoffCa,
    HandoffHost,
    HandoffLease,
    HandoffMinTokens,
    HandoffSharedMemory,
    HandoffTokenFile,
    OnHandoffFailure,
    Prefill,
    Role,
    handoff_fields,
    pools,
    refuse_idle_flags,
)
from headwise.runtime.cli.options import (
    Address,
    AsJson,
    Attention,
    CacheQuota,
    CpusPerRank,
    Device,
    DiskKvLimit,
    DiskKvPath,
    Dtype,
    Executor,
    HostKvMemory,
    KvDtype,
    KvMemory,
    KvPolicy,
    MaxModelLen,
    MaxNumBatchedTokens,
    Model,
    OnShardDeath,
    PrefixCaching,
    StreamingHeads,
    Tp,
    WarmSpare,
    engine_settings,
    option,
)
from headwise.runtime.cli.replicas import MaxReplicas, MinReplicas, Replicas

MetricsPort = Annotated[
    int | None, option("port", "Serve Prometheus metrics there; 0: any free one; default: none.", min=0, max=65535)
]
OpenaiPort = Annotated[
    int | None, option("port", "Serve OpenAI's API there; 0: any free one; default: none.", min=0, max=65535)
]


def serve(
    ctx: typer.Context,
    model: Model,
    tp: Tp = 1,
    replicas: Replicas = None,
    min_replicas: MinReplicas = None,
    max_replicas: MaxReplicas = None,
    host: Annotated[str, option("address", "The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, option("port", "The port for gRPC; 0: any free one.", min=0, max=65535)] = 50051,
    metrics_port: MetricsPort = None,
    metrics_host: Annotated[str, option("address", "The address to serve metrics on.")] = "127.0.0.1",
    openai_port: OpenaiPort = None,
    name: Annotated[str | None, option("name", "The model's name for clients; default: the end of --model.")] = None,
    tls_cert: Annotated[Path | None, option("file", "Encrypt with TLS: the server's certificate (PEM).")] = None,
    tls_key: Annotated[Path | None, option("file", "The key of that certificate (PEM).")] = None,
    tls_client_ca: Annotated[
        Path | None, option("file", "Let in only clients with a certificate that this one (PEM) signed.")
    ] = None,
    admin: Annotated[
        list[str] | None,
        option("name", "The name in an admin's certificate, for --tls-client-ca; may be given several times."),
    ] = None,
    peer: Annotated[
        list[str] | None,
        option("name", "The name in a peer's certificate, an engine that has KV computed here; several times."),
    ] = None,
    token_file: Annotated[
        Path | None,
        option("file", 'Let in only clients with a token of this file; its lines: "TENANT TOKEN [admin|peer]".'),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure", help="Serve a --host that is not loopback without TLS, or without telling clients apart."
        ),
    ] = False,
    max_queued_requests: Annotated[int, option("n", "Most requests that may wait; more are refused.", min=1)] = 1024,
    max_num_seqs: Annotated[int, option("n", "Most requests that are computed at the same time.", min=1)] = 128,
    drain_timeout: Annotated[
        float, option("seconds", "On SIGTERM, time for the requests that run to end.", min=0)
    ] = 30.0,
    stall_timeout: Annotated[float, option("seconds", "Time that a client may leave a stream unread.", min=0.1)] = 30.0,
    max_request_time: Annotated[
        float, option("seconds", "Time that a request may take, its waiting included.", min=0.1)
    ] = 3600.0,
    otlp_endpoint: Annotated[
        str | None,
        option(
            "url",
            "Send a trace of each request there, by OTLP over gRPC: http://127.0.0.1:4317; default: none.",
            envvar=["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"],
        ),
    ] = None,
    step_timeout: Annotated[
        float | None,
        option(
            "seconds",
            "Time of a step after which its shards count as dead; default: 4 times the slowest recent step, at least "
            "8.",
            min=0.1,
        ),
    ] = None,
    on_shard_death: OnShardDeath = "recover",
    warm_spare: WarmSpare = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    executor: Executor = "ray",
    max_model_len: MaxModelLen = None,
    kv_memory: KvMemory = None,
    prefix_caching: PrefixCaching = True,
    cache_quota: CacheQuota = None,
    host_kv_memory: HostKvMemory = None,
    disk_kv_path: DiskKvPath = None,
    disk_kv_limit: DiskKvLimit = None,
    cpus_per_rank: CpusPerRank = None,
    address: Address = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    attention: Attention = None,
    kv_policy: KvPolicy = "dense",
    kv_dtype: KvDtype = None,
    streaming_heads: StreamingHeads = None,
    role: Role = None,
    prefill: Prefill = None,
    decode: Decode = None,
    handoff_min_tokens: HandoffMinTokens = None,
    on_handoff_failure: OnHandoffFailure = "recompute",
    handoff_lease: HandoffLease = None,
    handoff_host: HandoffHost = "127.0.0.1",
    handoff_ca: HandoffCa = None,
    handoff_token_file: HandoffTokenFile = None,
    handoff_shared_memory: HandoffSharedMemory = True,
    as_json: AsJson = False,
) -> None:
    """Serve a model by gRPC, and by OpenAI's API.

    Prints one line on stdout when it is ready. On SIGTERM or Ctrl-C it takes no more requests, finishes those that run
    and ends.
    """
    from headwise.runtime.config import engine_config
    from headwise.runtime.deployment.options import replica_options
    from headwise.runtime.server.options import ServeOptions
    from headwise.runtime.server.serve import serve as run
    from headwise.runtime.server.tracing import traces_are_off

    refuse_idle_flags(ctx, role, prefill)
    settings = engine_settings(
        *(tp, dtype, device, executor, max_model_len, kv_memory, cpus_per_rank, address),
        max_num_batched_tokens=max_num_batched_tokens,
        attention=attention,
        kv_policy=kv_policy,
        kv_dtype=kv_dtype,
        streaming_heads=streaming_heads,
    )
    tiers = {
        "cache_quota": cache_quota,
        "host_kv_memory": host_kv_memory,
        "disk_kv_path": disk_kv_path,
        "disk_kv_limit": disk_kv_limit,
    }
    settings |= {key: value for key, value in tiers.items() if value is not None}
    handoff = {
        "min_tokens": handoff_min_tokens,
        "on_failure": on_handoff_failure,
        "lease_s": handoff_lease,
        "host": handoff_host,
        "shared_memory": handoff_shared_memory,
        **{
            name: None if path is None else str(path)
            for name, path in (("ca", handoff_ca), ("tls_cert", tls_cert), ("tls_key", tls_key))
        },
    }
    settings |= {"enable_prefix_caching": prefix_caching, "max_num_seqs": max_num_seqs}
    settings |= {"step_timeout": step_timeout, "on_shard_death": on_shard_death, "warm_spare": warm_spare}
    settings |= handoff_fields(role, prefill, decode, handoff, handoff_token_file)
    config = engine_config(model=model, **settings)
    options = ServeOptions(
        name=name or Path(model).resolve().name,
        host=host,
        port=port,
        metrics_port=metrics_port,
        metrics_host=metrics_host,
        openai_port=openai_port,
        tls_cert=tls_cert,
        tls_key=tls_key,
        tls_client_ca=tls_client_ca,
        admins=tuple(admin or ()),
        peers=tuple(peer or ()),
        token_file=token_file,
        insecure=insecure,
        max_queued_requests=max_queued_requests,
        drain_timeout_s=drain_timeout,
        stall_timeout_s=stall_timeout,
        max_request_s=max_request_time,
        replicas=replica_options(replicas, min_replicas, max_replicas, drain_timeout, *(pools(prefill, decode) or ())),
        otlp_endpoint=None if traces_are_off(os.environ) else otlp_endpoint,
        as_json=as_json,
    )
    sys.exit(run(config, options))
