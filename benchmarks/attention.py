"""Paged attention on this CPU against its limits: memory bandwidth for decode, torch's own kernel for prefill.

    python benchmarks/attention.py [--threads N] [--query-heads 9] [--kv-heads 3] [--head-dim 64] [--layers 30]
        [--kv-dtype float32,int8]

Decode reads every key and value once, so it is compared with a copy by as many threads of as many bytes (a copy also
writes them: its traffic is twice that). Prefill is compared with scaled_dot_product_attention on contiguous tensors.
Of several dtypes of keys and values, decode is measured for all in turn. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headwise.workers.cpu.attention import CpuAttention
from headwise.workers.kv.cache import KVCache
from headwise.workers.kv.format import kv_format
from headwise.workers.model.attention import AttentionBatch

BLOCK_SIZE = 16
DECODES = ((1, 1024), (1, 4096), (8, 256), (32, 256), (32, 1024))
PREFILLS = ((64, 1024), (512, 512), (512, 2048), (1024, 1024))

Result = dict[str, int | float | str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--query-heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--kv-dtype", type=lambda names: names.split(","), default=["float32"], metavar="NAMES")
    parser.add_argument("--cases", default="", help="only those whose name holds this")
    args = parser.parse_args()
    if args.query_heads % args.kv_heads:
        parser.error(f"--query-heads {args.query_heads} is no multiple of --kv-heads {args.kv_heads}")
    torch.set_num_threads(args.threads)
    results: list[Result] = []
    for batch, context in DECODES:
        if args.cases in (case := f"decode {batch} x {context}"):
            results += measure_decode(args, case, batch, context)
    for queries, context in PREFILLS:
        if args.cases in (case := f"prefill {queries} at {context}"):
            results += [measure_prefill(args, case, kv_dtype, queries, context) for kv_dtype in args.kv_dtype]
    print(json.dumps({"benchmark": "attention", **vars(args), "torch": torch.__version__, "results": results}))


def measure_decode(args: argparse.Namespace, case: str, batch: int, context: int) -> list[Result]:
    """One token for each row, all layers, for each dtype: milliseconds, and GB/s of keys and values read."""
    q_THD = random_queries(args, batch)
    tokens = batch * context * args.kv_heads * args.layers
    reads = [
        tokens // BLOCK_SIZE * kv_format(name, args.head_dim).block_bytes(BLOCK_SIZE, args.head_dim)
        for name in args.kv_dtype
    ]
    source = torch.ones(reads[0] // 4)
    target = torch.zeros_like(source)

    def decode(attention: CpuAttention) -> None:
        for layer in range(args.layers):
            attention.attend(layer, q_THD)

    attentions = [prepare(args, name, [(1, context)] * batch, args.layers) for name in args.kv_dtype]
    copy_seconds, *measured = alternate(
        args.repeats, lambda: target.copy_(source), *(partial(decode, attention) for attention in attentions)
    )
    copied = 2 * reads[0] / copy_seconds
    results: list[Result] = []
    for name, read, seconds in zip(args.kv_dtype, reads, measured, strict=True):
        result: Result = {
            "case": case,
            "kv_dtype": name,
            "ms": round(seconds * 1e3, 3),
            "gb_per_s": round(read / seconds / 1e9, 2),
            "copy_traffic_gb_per_s": round(copied / 1e9, 2),
            "of_copy_traffic": round(read / seconds / copied, 3),
        }
        say(result, f"{result['gb_per_s']:>6} GB/s, {result['of_copy_traffic']:.0%} of a copy's")
        results.append(result)
    return results


def measure_prefill(args: argparse.Namespace, case: str, kv_dtype: str, queries: int, context: int) -> Result:
    """One chunk of one row, one layer: milliseconds, and GFLOP/s that the causal mask leaves."""
    attention = prepare(args, kv_dtype, [(queries, context)], 1)
    q_THD = random_queries(args, queries)
    q_1HTD = q_THD.transpose(0, 1)[None].contiguous()
    k_1KCD, v_1KCD = torch.randn(2, 1, args.kv_heads, context, args.head_dim)
    mask_TC = None if queries == context else torch.ones(queries, context).tril(context - queries).bool()

    def prefill() -> None:
        attention.attend(0, q_THD)

    def torch_prefill() -> None:
        scaled_dot_product_attention(
            q_1HTD, k_1KCD, v_1KCD, attn_mask=mask_TC, is_causal=mask_TC is None, enable_gqa=True
        )

    seconds, torch_seconds = alternate(args.repeats, prefill, torch_prefill)
    visible = queries * context - queries * (queries - 1) // 2
    result: Result = {
        "case": case,
        "kv_dtype": kv_dtype,
        "ms": round(seconds * 1e3, 3),
        "gflop_per_s": round(4 * visible * args.query_heads * args.head_dim / seconds / 1e9, 1),
        "torch_ms": round(torch_seconds * 1e3, 3),
        "times_torch": round(torch_seconds / seconds, 2),
    }
    say(result, f"{result['gflop_per_s']:>6} GFLOP/s, {result['times_torch']} x torch")
    return result


def prepare(args: argparse.Namespace, kv_dtype: str, rows: list[tuple[int, int]], num_layers: int) -> CpuAttention:
    """Attention over a full cache whose blocks lie in random order, at a step of (queries, context) rows."""
    queries, contexts = zip(*rows, strict=True)
    blocks = [-(-context // BLOCK_SIZE) for context in contexts]
    sizes = (num_layers, sum(blocks), args.kv_heads, BLOCK_SIZE, args.head_dim)
    cache = KVCache(*sizes, torch.float32, "cpu", True, format=kv_format(kv_dtype, args.head_dim))
    k_TKD, v_TKD = torch.randn(2, sum(blocks) * BLOCK_SIZE, args.kv_heads, args.head_dim)
    cache.write(0, k_TKD, v_TKD, torch.arange(len(k_TKD)))
    for x in (cache.keys, cache.values):
        x[1:] = x[:1]
    tables_BN, order = np.zeros((len(rows), max(blocks)), np.int32), np.random.default_rng(0).permutation(sum(blocks))
    for table_N, stop, count in zip(tables_BN, np.cumsum(blocks), blocks, strict=True):
        table_N[:count] = order[stop - count : stop]
    q_starts = tuple(range(0, args.query_heads + 1, args.query_heads // args.kv_heads))
    attention = CpuAttention(cache, q_starts, args.head_dim**-0.5, args.threads)
    starts_B1 = np.cumsum([0, *queries], dtype=np.int32)
    attention.begin(AttentionBatch(starts_B1, np.array(contexts, np.int32), tables_BN))
    return attention


def random_queries(args: argparse.Namespace, num_tokens: int) -> Tensor:
    """Queries as a view of one tensor with room for keys and values, as the model's projection leaves them."""
    heads = args.query_heads + 2 * args.kv_heads
    return torch.randn(num_tokens, heads, args.head_dim)[:, : args.query_heads]


def alternate(repeats: int, *functions: Callable[[], object]) -> list[float]:
    """The median seconds of each function, called in turn so that a busy machine slows all of them."""
    seconds: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, measured in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            function()
            if repeat:
                measured.append(time.perf_counter() - start)
    return [statistics.median(measured) for measured in seconds]


def say(result: Result, rate: str) -> None:
    print(f"{result['case']:<20} {result['kv_dtype']:<9} {result['ms']:>9} ms  {rate}", file=sys.stderr)


if __name__ == "__main__":
    main()
