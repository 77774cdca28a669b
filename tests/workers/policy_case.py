"""Steps of attention under KV policies with random numbers, and what comes out of them by definition."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headwise.workers.cpu.attention import CpuAttention
from headwise.workers.kv import quantise
from headwise.workers.kv.cache import KVCache
from headwise.workers.kv.format import BITS, FLOAT_BYTES, kv_format
from headwise.workers.kv.policy import KvPolicy, Reach
from headwise.workers.model.attention import PART_KEYS, AttentionBatch
from tests.workers.attention_case import NAN

LAYERS = 2
"""The second has the reaches of the first in reversed order."""


@dataclass
class PolicyCase:
    """Rows whose whole context is in the cache, as far as the groups' reaches need it; NaN is everywhere else.

    reaches: of each KV head of layer 0.
    rows: (tokens of the step, tokens of context) of each row.
    shifted: whether tables begin as late as they may.
    """

    reaches: list[Reach]
    rows: list[tuple[int, int]]
    q_starts: tuple[int, ...]
    head_dim: int = 16
    block_size: int = 16
    kv_dtype: str = "float32"
    shifted: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.scale, heads = 1.3 * self.head_dim**-0.5, self.q_starts[-1]
        self.format = kv_format(self.kv_dtype, self.head_dim)
        groups: dict[Reach, int] = {}
        kind = tuple(groups.setdefault(reach, len(groups)) for reach in self.reaches)
        self.policy = KvPolicy(tuple(groups), (kind, kind[::-1]))
        contexts = [context for _, context in self.rows]
        shape = (2, len(self.reaches), self.head_dim)
        self.kv = [torch.randn((context, *shape), generator=generator) for context in contexts]
        # The first query is the one of the window, the second that of the sinks.
        self.q = [torch.randn((context, 2, heads, self.head_dim), generator=generator) for context in contexts]

    def steps(self) -> list[tuple[int, int]]:
        """Of each row, its first query and how many there are."""
        return [(context - queries, queries) for queries, context in self.rows]

    def backend(self, threads: int = 1) -> CpuAttention:
        """A backend whose cache holds nothing but NaN."""
        most = max(-(-context // self.block_size) for _, context in self.rows)
        sizes = (LAYERS, len(self.rows) * most + 1, len(self.reaches), self.block_size, self.head_dim)
        cache = KVCache(*sizes, torch.float32, "cpu", True, format=self.format, policy=self.policy)
        for part in (part for parts in cache.parts for part in parts):
            for x in (part.keys, part.values):
                x.fill_(255 if self.format.quantised else NAN)
        return CpuAttention(cache, self.q_starts, self.scale, threads)

    def batch(self, backend: CpuAttention, steps: list[tuple[int, int]] | None = None) -> AttentionBatch:
        """Writes keys and values that the queries of a step need, at random blocks, and makes the step."""
        steps = steps or self.steps()
        cache, most = backend.cache, max(-(-context // self.block_size) for _, context in self.rows)
        tables_BN = np.full((self.policy.num_groups * len(steps), most), -1, np.int32)
        shifts_B = np.zeros(len(tables_BN), np.int64)
        junk = len(self.rows) * most
        shuffled = np.random.default_rng(self.seed).permutation(junk).reshape(len(self.rows), most)
        for row, (first, count) in enumerate(steps):
            slots_GT = np.full((self.policy.num_groups, first + count), junk * self.block_size)
            for group, reach in enumerate(self.policy.reaches):
                table = group * len(steps) + row
                shifts_B[table] = self.shift(reach, first)
                slots_GT[group] = self.fill(tables_BN[table], shuffled[row], reach, first, slots_GT[group])
            k_TKD, v_TKD = self.kv[row][: first + count].unbind(1)
            for layer in range(LAYERS):
                cache.write(layer, k_TKD, v_TKD, torch.from_numpy(slots_GT.ravel()))
        starts = np.cumsum([0, *(count for _, count in steps)], dtype=np.int32)
        contexts = np.array([first + count for first, count in steps], np.int32)
        return AttentionBatch(starts, contexts, tables_BN, shifts_B if self.shifted else None)

    def shift(self, reach: Reach, first: int) -> int:
        sinks = -(-reach.sinks // self.block_size) * self.block_size
        least, unit = max(sinks, reach.sinks + 1), math.lcm(PART_KEYS, self.block_size)
        return max(0, (reach.first_key(first) - least) // unit * unit) if self.shifted else 0

    def fill(
        self, table_N: np.ndarray, blocks_N: np.ndarray, reach: Reach, first: int, slots_T: np.ndarray
    ) -> np.ndarray:
        """Gives a table the blocks that are needed from a query on; returns where tokens go."""
        positions_T = np.arange(len(slots_T))
        at_T = positions_T - self.shift(reach, first)
        apart = positions_T < -(-reach.sinks // self.block_size) * self.block_size
        at_T[apart] = positions_T[apart]
        needed = apart | (positions_T >= reach.first_key(first) // self.block_size * self.block_size)
        index_T = at_T // self.block_size
        table_N[index_T[needed]] = blocks_N[index_T[needed]]
        return np.where(needed, blocks_N[index_T] * self.block_size + at_T % self.block_size, slots_T)

    def run(self, backend: CpuAttention, layer: int = 0, steps: list[tuple[int, int]] | None = None) -> Tensor:
        steps = steps or self.steps()
        backend.begin(self.batch(backend, steps))
        q = torch.cat([q[first : first + count] for q, (first, count) in zip(self.q, steps, strict=True)])
        return backend.attend(layer, q[:, 0], q[:, 1])

    def kept(self, row: int) -> tuple[Tensor, Tensor]:
        """A row's keys and values as they come back from the cache, in float64."""
        halves = zip(self.kv[row].unbind(1), self.format, strict=True)
        k_CKD, v_CKD = (_kept(x_CKD, kind).double() for x_CKD, kind in halves)
        return k_CKD, v_CKD

    def expected(self, layer: int = 0) -> Tensor:
        """What comes out by definition, in float64."""
        outputs = []
        for row, (first, count) in enumerate(self.steps()):
            k_CKD, v_CKD = self.kept(row)
            q_T2HD = self.q[row][first:].double()
            heads = []
            for head, reach in enumerate(self.reaches[:: -1 if layer else 1]):
                heads_of = slice(self.q_starts[head], self.q_starts[head + 1])
                scores_2HTC = torch.einsum("tshd,cd->shtc", q_T2HD[:, :, heads_of], k_CKD[:, head]) * self.scale
                positions_T1, keys_C = torch.arange(first, first + count)[:, None], torch.arange(first + count)
                span = math.inf if reach.span is None else reach.span
                window = math.inf if reach.window is None else reach.window
                apart_TC = (positions_T1 >= span) & (keys_C < reach.sinks)
                near_TC = (positions_T1 < span) | (keys_C > positions_T1 - window)
                seen_TC = (keys_C <= positions_T1) & (apart_TC | near_TC)
                scores_HTC = torch.where(apart_TC, scores_2HTC[1], scores_2HTC[0])
                weights_HTC = scores_HTC.masked_fill(~seen_TC, -math.inf).softmax(-1)
                heads.append(torch.einsum("htc,cd->thd", weights_HTC, v_CKD[:, head]))
            outputs.append(torch.cat(heads, 1))
        return torch.cat(outputs)


def _kept(x: Tensor, kind: str) -> Tensor:
    if kind in BITS:
        return quantise.dequantise(quantise.quantise(x, kind))
    assert kind in FLOAT_BYTES
    return x.to(getattr(torch, kind))
