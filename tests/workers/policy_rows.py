"""Texts through one rank's model under a KV policy, step by step: blocks are handed out and taken back as the policy
says, and what is taken back is spoilt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from headwise.workers import collectives
from headwise.workers.backends import BACKENDS
from headwise.workers.collectives import Collectives
from headwise.workers.kv.cache import KVCache
from headwise.workers.kv.format import kv_format
from headwise.workers.kv.policy import KvPolicy, Reach, resolve_policy
from headwise.workers.model.attention import PART_KEYS, AttentionBatch
from headwise.workers.model.checkpoint import load_shard
from headwise.workers.model.model import StepInput
from headwise.workers.model.model_config import load_model_config
from headwise.workers.model.partition import partition_model

BLOCK_SIZE = 16
STEP = math.lcm(PART_KEYS, BLOCK_SIZE)
"""Shifts are multiples of it."""
RING = 144
"""Tokens that a row keeps; longer than any chunk of the tests."""


class _Row:
    """A text, and which blocks its tokens are in: for each group by block index of the text."""

    def __init__(self, tokens: Sequence[int], policy: KvPolicy) -> None:
        self.tokens, self.policy, self.done = tokens, policy, 0
        self.tables: list[dict[int, int]] = [{} for _ in policy.reaches]

    def shift(self, reach: Reach) -> int:
        """As far as the next query lets the window move."""
        sinks = max(reach.sinks + 1, -(-reach.sinks // BLOCK_SIZE) * BLOCK_SIZE)
        return max(0, (reach.first_key(self.done) - sinks) // STEP * STEP)


class Rank:
    """One rank's model and memory, and the rows that it computes."""

    def __init__(
        self,
        directory: Path,
        texts: Sequence[Sequence[int]],
        policy: str,
        kv_dtype: str = "float32",
        attention: str = "reference",
        peers: Collectives | None = None,
        max_model_len: int = 200,
    ) -> None:
        config, self._peers = load_model_config(directory), peers or collectives.Solo()
        part = partition_model(config, self._peers.world_size)[self._peers.rank]
        weights = load_shard(directory, config, part, torch.float32, torch.device("cpu"))
        backend = BACKENDS[attention]
        self._model = backend.model(config, part, weights, self._peers, max_model_len, 1)
        whole = resolve_policy(policy, config.num_layers, config.num_kv_heads)
        self._policy = whole.heads(part.heads.kv_start, part.heads.kv_stop)
        blocks = [
            2 + sum(reach.most_blocks(BLOCK_SIZE, len(text), RING) for text in texts) for reach in self._policy.reaches
        ]
        self.cache = KVCache(
            *(config.num_layers, blocks, part.heads.num_kv, BLOCK_SIZE, config.head_dim, torch.float32),
            transposed_keys=bool(backend.attention.transposed_keys),
            format=kv_format(kv_dtype, config.head_dim),
            policy=self._policy,
        )
        self._model.attach(self.cache)
        # No row ever has block 0: it stands where a table has none.
        self._free = [np.random.default_rng(count).permutation(np.arange(1, count)).tolist() for count in blocks]
        self._rows = [_Row(text, self._policy) for text in texts]
        self._tokens_RL = torch.zeros(len(texts), RING, dtype=torch.int64)
        for group, count in enumerate(blocks):
            self._spoil(group, range(count))

    def step(self, counts: Sequence[int]) -> list[Tensor]:
        """Computes so many tokens of each row, perhaps none; returns the logits of each row's tokens."""
        assert max(counts) <= RING
        rows = [(index, row, count) for index, (row, count) in enumerate(zip(self._rows, counts, strict=True)) if count]
        tables, shifts, slots = [], [], []
        for group, reach in enumerate(self._policy.reaches):
            for _, row, count in rows:
                shift, table = row.shift(reach), self._take_blocks(group, row, row.done + count)
                moved = {b if b * BLOCK_SIZE < reach.sinks else b - shift // BLOCK_SIZE: n for b, n in table.items()}
                text = range(row.done, row.done + count)
                slots += [table[t // BLOCK_SIZE] * BLOCK_SIZE + t % BLOCK_SIZE for t in text]
                shifts.append(shift)
                tables.append(moved)
        width = 1 + max(max(table) for table in tables)
        tables_BN = np.array([[table.get(block, 0) for block in range(width)] for table in tables], np.int32)
        positions_T = np.concatenate([np.arange(row.done, row.done + count) for _, row, count in rows])
        rows_T = np.repeat([index for index, _, _ in rows], [count for _, _, count in rows])
        for index, position in zip(rows_T.tolist(), positions_T.tolist(), strict=True):
            self._tokens_RL[index, position % RING] = self._rows[index].tokens[position]
        starts_B1 = np.cumsum([0, *(count for _, _, count in rows)])
        contexts_B = np.array([row.done + count for _, row, count in rows], np.int32)
        batch = AttentionBatch(starts_B1.astype(np.int32), contexts_B, tables_BN, np.array(shifts, np.int64))
        step = StepInput(
            tokens_RL=self._tokens_RL,
            rows_T=rows_T,
            positions_T=positions_T,
            slots_T=np.array(slots),
            logit_tokens_B=np.arange(len(rows_T)),
            attention=batch,
        )
        logits_TV = self._model.forward(step).clone()
        for _, row, count in rows:
            row.done += count
            self._give_back(row)
        found = dict(
            zip((index for index, _, _ in rows), torch.split(logits_TV, [c for c in counts if c]), strict=True)
        )
        return [found.get(index, logits_TV[:0]) for index in range(len(self._rows))]

    def run(self, steps: Sequence[Sequence[int]]) -> list[Tensor]:
        """:meth:`step` by step; the logits of each row's tokens."""
        return [torch.cat(parts) for parts in zip(*(self.step(counts) for counts in steps), strict=True)]

    def _take_blocks(self, group: int, row: _Row, length: int) -> dict[int, int]:
        table = row.tables[group]
        for block in range(row.done // BLOCK_SIZE, -(-length // BLOCK_SIZE)):
            if block not in table:
                table[block] = self._free[group].pop()
        return table

    def _give_back(self, row: _Row) -> None:
        for group, reach in enumerate(self._policy.reaches):
            first = reach.first_key(row.done) // BLOCK_SIZE
            left = [block for block in row.tables[group] if reach.sinks <= block * BLOCK_SIZE and block < first]
            freed = [row.tables[group].pop(block) for block in left]
            self._spoil(group, freed)
            self._free[group] += freed

    def _spoil(self, group: int, blocks: Sequence[int]) -> None:
        for part in (part for parts in self.cache.parts for part in parts if part.group == group):
            for x in (part.keys, part.values):
                x[list(blocks)] = 255 if self.cache.format.quantised else float("nan")


def logits_of_ranks(
    directory: Path,
    texts: Sequence[Sequence[int]],
    steps: Sequence[Sequence[int]],
    policy: str,
    kv_dtype: str = "float32",
    attention: str = "reference",
    tp: int = 1,
) -> list[Tensor]:
    """Of each text, computed by so many ranks whose models have a length of 200: [T, V]."""
    rendezvous = collectives.open_rendezvous("solo" if tp == 1 else "shared_memory", tp)

    def of_rank(rank: int) -> list[Tensor]:
        peers = collectives.connect(rendezvous, rank, tp, 60.0)
        try:
            return Rank(directory, texts, policy, kv_dtype, attention, peers).run(steps)
        finally:
            peers.close()

    with ThreadPoolExecutor(tp) as ranks:
        return [torch.cat(parts, dim=1) for parts in zip(*ranks.map(of_rank, range(tp)), strict=True)]
