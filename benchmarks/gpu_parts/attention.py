"""Attention alone: decode steps over the layers' own keys and values, so that no layer finds another's in a cache."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from gpu_parts.cases import Case, each
from gpu_parts.device import GB
from gpu_parts.served import Served
from gpu_parts.sizes import BLOCK_SIZE
from headwise.workers.model.attention import AttentionBatch


def measure(served: Served, ceilings: dict[str, float]) -> Iterator[Case]:
    """GB/s of keys and values read, all layers, launched as one graph."""

    def attend(rows: int, context: int) -> Case:
        if not served.fits(rows, context):
            return {"left_out": "no memory for so many keys and values"}
        seconds = _seconds(served, rows, context)
        rate = served.bytes_of_context(rows * context) / seconds / GB
        return {
            "us_a_layer": seconds / served.config.num_layers * 1e6,
            "gb_per_s": rate,
            "of_copy": rate / ceilings["copy_gb_per_s"],
        }

    return each(({"rows": case[0], "context": case[1]}, partial(attend, *case)) for case in served.sizes.attentions)


def _seconds(served: Served, rows: int, context: int) -> float:
    cache, config, device = served.cache, served.config, served.device
    attention = served.backend.attention(cache, served.q_starts, config.head_dim**-0.5)
    blocks = -(-context // BLOCK_SIZE)
    tables_BN = np.random.default_rng(0).permutation(cache.num_blocks)[: rows * blocks].reshape(rows, blocks)
    lengths_B = np.full(rows, context, np.int32)
    attention.begin(AttentionBatch(np.arange(rows + 1, dtype=np.int32), lengths_B, tables_BN.astype(np.int32)))
    q_THD = torch.empty(rows, config.num_heads, config.head_dim, dtype=cache.dtype, device=device.at).normal_()

    def all_layers() -> None:
        for layer in range(config.num_layers):
            attention.attend(layer, q_THD)

    return device.seconds_of(device.captured(all_layers), 2 * served.sizes.repeats)
