"""``headwise serve``: a model served by gRPC, and by OpenAI's API."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from headwise.runtime.cli.options import (
    Address,
    AsJson,
    CacheQuota,
    CpusPerRank,
    Device,
    DiskKvLimit,
    DiskKvPath,
    Dtype,
    Executor,
    HostKvMemory,
    KvMemory,
    MaxModelLen,
    Model,
    PrefixCaching,
    Tp,
    engine_settings,
)


def serve(
    model: Model,
    tp: Tp = 1,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 50051,
    metrics_port: Annotated[int | None, typer.Option(min=0, max=65535, help="Serve Prometheus metrics there.")] = None,
    metrics_host: Annotated[str, typer.Option(help="The address for it.")] = "127.0.0.1",
    openai_port: Annotated[int | None, typer.Option(min=0, max=65535, help="Serve OpenAI's API there.")] = None,
    name: Annotated[str | None, typer.Option(help="The model's name for clients; default: --model.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="The server's certificate, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, PEM.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="Let in only clients that this certificate signed.")
    ] = None,
    token_file: Annotated[Path | None, typer.Option(help='Lines of "TENANT TOKEN \\[admin]".')] = None,
    insecure: Annotated[bool, typer.Option(help="Serve anybody who reaches a host that is not loopback.")] = False,
    max_queued_requests: Annotated[int, typer.Option(min=1, help="Requests that may wait.")] = 1024,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Requests that are computed at once.")] = 128,
    drain_timeout: Annotated[float, typer.Option(min=0, help="Seconds that requests get to end on SIGTERM.")] = 30.0,
    stall_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds a client may leave a stream unread.")] = 30.0,
    max_request_time: Annotated[
        float, typer.Option(min=0.1, help="Seconds a request may take, queued or not.")
    ] = 3600.0,
    step_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a step may take in good health.")] = 8.0,
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
    as_json: AsJson = False,
) -> None:
    """Serve a model by gRPC until SIGTERM: then finish what runs. Prints one line when it is ready."""
    from headwise.runtime.config import engine_config
    from headwise.runtime.server.serve import ServeOptions
    from headwise.runtime.server.serve import serve as run

    settings = engine_settings(tp, dtype, device, executor, max_model_len, kv_memory, cpus_per_rank, address)
    tiers = {
        "cache_quota": cache_quota,
        "host_kv_memory": host_kv_memory,
        "disk_kv_path": disk_kv_path,
        "disk_kv_limit": disk_kv_limit,
    }
    settings |= {key: value for key, value in tiers.items() if value is not None}
    config = engine_config(model=model, enable_prefix_caching=prefix_caching, max_num_seqs=max_num_seqs, **settings)
    options = ServeOptions(
        name=name or model,
        host=host,
        port=port,
        metrics_port=metrics_port,
        metrics_host=metrics_host,
        openai_port=openai_port,
        tls_cert=tls_cert,
        tls_key=tls_key,
        tls_client_ca=tls_client_ca,
        token_file=token_file,
        insecure=insecure,
        max_queued_requests=max_queued_requests,
        drain_timeout_s=drain_timeout,
        stall_timeout_s=stall_timeout,
        max_request_s=max_request_time,
        step_timeout_s=step_timeout,
        as_json=as_json,
    )
    sys.exit(run(config, options))
