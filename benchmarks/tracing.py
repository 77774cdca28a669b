"""What traces cost: two servers of one model, one of them with traces, are asked the same in turns.

    python benchmarks/tracing.py --model smollm2 [--batch 32] [--tokens 64] [--pairs 5] [--json]

The collector is in this process. Besides the throughput it reads the processor time of each server, which says more
where other programs run. With --traces-only it asks no server, and reads the processor time of traces alone: made,
and encoded as they are sent.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

import grpc
import psutil
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from headwise.runtime.bench.workload import greedy, prompts
from headwise.runtime.client import AsyncClient
from headwise.runtime.engine.request import Request
from headwise.runtime.models import resolve
from headwise.runtime.output import RequestMetrics
from headwise.runtime.sampling_params import SamplingParams
from headwise.runtime.server.otlp import Tracing
from headwise.runtime.server.tracing import Ended
from headwise.workers.model.model_config import load_model_config
from headwise.workers.plan import RowSampling

PROMPT_TOKENS = 42
TRACES = 1000
"""Whose spans the queue has room for."""
SENT_S = 5.5
"""After which every span was sent: the exporter sends every 5 s."""


class Server(NamedTuple):
    address: str
    process: psutil.Process


class Reading(NamedTuple):
    """Generated tokens a second, and processor time of the server for each request."""

    tok_s: float
    cpu_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--traces-only", action="store_true", help="without servers")
    parser.add_argument("--batch", type=int, default=32, help="requests at once")
    parser.add_argument("--tokens", type=int, default=64, help="that each generates")
    parser.add_argument("--pairs", type=int, default=5, help="readings of each server, in turns")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    args = parser.parse_args()
    if args.traces_only:
        readings_us = [round(1e6 * trace_s(), 1) for _ in range(args.pairs)]
        print(json.dumps({"benchmark": "traces", "trace_us": median(readings_us), "readings": readings_us}))
        return
    if args.model is None:
        parser.error("--model is missing")
    path = resolve(args.model)
    rows = prompts(args.batch, PROMPT_TOKENS, load_model_config(path).vocab_size)
    with (
        collecting() as collector,
        serving(str(path)) as plain,
        serving(str(path), "--otlp-endpoint", collector.url) as traced,
    ):
        readings: dict[str, list[Reading]] = {"without": [], "with": []}
        servers = {"without": plain, "with": traced}
        for pair in range(-1, args.pairs):
            for name in sorted(servers, reverse=pair % 2 == 0):
                reading = asyncio.run(read(servers[name], rows, args.tokens))
                if pair >= 0:  # else it warms up
                    readings[name].append(reading)
    ratios = [a.tok_s / b.tok_s for a, b in zip(readings["with"], readings["without"], strict=True)]
    added = median(one.cpu_s for one in readings["with"]) - median(one.cpu_s for one in readings["without"])
    found = {
        **{f"tok_s_{name}": round(median(one.tok_s for one in each), 1) for name, each in readings.items()},
        "throughput_ratio": round(median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        **{f"cpu_ms_{name}": round(1e3 * median(one.cpu_s for one in each), 3) for name, each in readings.items()},
        "added_cpu_share": round(added / median(one.cpu_s for one in readings["without"]), 4),
        "spans": collector.num_spans,
    }
    if args.json:
        print(json.dumps({"benchmark": "tracing", **vars(args), **found}))
        return
    for name, value in found.items():
        print(f"{name:<20} {value}")


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Counts the spans that come to ``url``."""

    def __init__(self) -> None:
        self.url, self.num_spans = "", 0

    def Export(self, request: Any, context: object) -> trace_service_pb2.ExportTraceServiceResponse:
        self.num_spans += sum(len(scope.spans) for one in request.resource_spans for scope in one.scope_spans)
        return trace_service_pb2.ExportTraceServiceResponse()


class Encoder(SpanExporter):
    """Encodes spans as the exporter does that sends them."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        encode_spans(spans).SerializeToString()
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        pass


def trace_s() -> float:
    """Processor time of a trace, on all threads: of a request that was computed like most."""
    tracing, now = Tracing("http://127.0.0.1:4317", "model", Encoder()), time.monotonic()
    request = Request("a", [1] * PROMPT_TOKENS, SamplingParams(), RowSampling(), 64, generated=[1] * 64)
    request.metrics = RequestMetrics(now, now + 0.1, now + 0.2, now + 0.3)
    ended = Ended("Generate", "a", "", now, grpc.StatusCode.OK, [request], {})
    started = time.process_time()
    for _ in range(TRACES):
        tracing.record(ended)
    tracing.close()
    return (time.process_time() - started) / TRACES


@contextmanager
def collecting() -> Iterator[Collector]:
    collector, server = Collector(), grpc.server(futures.ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.url = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield collector
    server.stop(0).wait()


@contextmanager
def serving(model: str, *flags: str) -> Iterator[Server]:
    command = [sys.executable, "-P", "-m", "headwise.runtime.cli", "serve", "--model", model, "--port", "0", "--json"]
    command += ["--executor", "local", "--max-model-len", "512", "--kv-memory", "256MiB", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        yield Server(json.loads(process.stdout.readline())["address"], psutil.Process(process.pid))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


async def read(server: Server, rows: list[list[int]], tokens: int) -> Reading:
    async with AsyncClient(server.address) as client:
        before, started = server.process.cpu_times(), time.perf_counter()
        await asyncio.gather(*(client.generate(row, greedy(tokens)) for row in rows))
        seconds = time.perf_counter() - started
        await asyncio.sleep(SENT_S)
    after = server.process.cpu_times()
    spent = after.user + after.system - before.user - before.system
    return Reading(len(rows) * tokens / seconds, spent / len(rows))


if __name__ == "__main__":
    main()
