"""Steps of attention with random numbers, and what comes out of them by definition."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headwise.workers.backends import BACKENDS
from headwise.workers.cpu.attention import CpuAttention
from headwise.workers.kv.cache import KVCache
from headwise.workers.model.attention import AttentionBackend, AttentionBatch
from headwise.workers.reference.attention import ReferenceAttention

NAN = float("nan")


@dataclass
class Case:
    """A step over rows that have some context already: random numbers, blocks in shuffled order, NaN everywhere else.

    rows: (tokens of this step, tokens of context once they are written) of each row.
    """

    rows: list[tuple[int, int]]
    q_starts: tuple[int, ...]
    head_dim: int
    block_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.num_kv_heads, self.scale = len(self.q_starts) - 1, 1.3 * self.head_dim**-0.5
        self.kv = [self.random(context, 2, self.num_kv_heads, self.head_dim) for _, context in self.rows]
        self.q = [self.random(queries, self.q_starts[-1], self.head_dim) for queries, _ in self.rows]
        used = [-(-context // self.block_size) for _, context in self.rows]
        self.num_blocks = sum(used) + 2
        blocks = torch.split(torch.randperm(self.num_blocks, generator=self.generator).int(), [*used, 2])[:-1]
        self.tables_BN = torch.nn.utils.rnn.pad_sequence(list(blocks), batch_first=True)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def slots(self, row: int) -> Tensor:
        positions = torch.arange(self.rows[row][1])
        return self.tables_BN[row].long()[positions // self.block_size] * self.block_size + positions % self.block_size

    def batch(self) -> AttentionBatch:
        queries, contexts = zip(*self.rows, strict=True)
        starts = np.cumsum([0, *queries], dtype=np.int32)
        return AttentionBatch(starts, np.array(contexts, np.int32), self.tables_BN.numpy())

    def backend(
        self, name: str, threads: int = 1, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> AttentionBackend:
        """A backend whose cache holds the context from before this step in layer 1."""
        sizes = (2, self.num_blocks, self.num_kv_heads, self.block_size, self.head_dim)
        cache = KVCache(*sizes, dtype, device, bool(BACKENDS[name].attention.transposed_keys))
        cache.keys.fill_(NAN)
        cache.values.fill_(NAN)
        for row, (queries, context) in enumerate(self.rows):
            before = self.kv[row][: context - queries].to(device, dtype)
            cache.write(1, before[:, 0], before[:, 1], self.slots(row)[: context - queries].to(device))
        if name == "cpu":
            return CpuAttention(cache, self.q_starts, self.scale, threads)
        return ReferenceAttention(cache, self.q_starts, self.scale)

    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """The step's queries, keys and values as views of one tensor."""
        parts = [torch.cat([q, kv[-len(q) :].flatten(1, 2)], 1) for q, kv in zip(self.q, self.kv, strict=True)]
        heads = [self.q_starts[-1], self.num_kv_heads, self.num_kv_heads]
        q_THD, k_TKD, v_TKD = torch.split(torch.cat(parts), heads, dim=1)
        return q_THD, k_TKD, v_TKD

    def write(self, backend: AttentionBackend, layer: int, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Puts the step's keys and values into the cache."""
        slots = torch.cat([self.slots(row)[-queries:] for row, (queries, _) in enumerate(self.rows)])
        backend.cache.write(layer, k_TKD, v_TKD, slots.to(backend.cache.device))

    def run(self, backend: AttentionBackend, batch: AttentionBatch | None = None) -> Tensor:
        q_THD, k_TKD, v_TKD = (x.to(backend.cache.device, backend.cache.dtype) for x in self.qkv())
        self.write(backend, 1, k_TKD, v_TKD)
        backend.begin(batch or self.batch())
        return backend.attend(1, q_THD)

    def dense(self) -> Tensor:
        """What comes out by definition, in float64."""
        outputs = []
        for (queries, context), q_QHD, kv_C2KD in zip(self.rows, self.q, self.kv, strict=True):
            for i in range(queries):
                k_CKD, v_CKD = kv_C2KD[: context - queries + i + 1].double().unbind(1)
                heads = []
                for head, (first, last) in enumerate(zip(self.q_starts, self.q_starts[1:], strict=False)):
                    scores_HC = q_QHD[i, first:last].double() @ k_CKD[:, head].T * self.scale
                    heads.append(scores_HC.softmax(-1) @ v_CKD[:, head])
                outputs.append(torch.cat(heads))
        return torch.stack(outputs)


def assert_close(o_THD: Tensor, expected_THD: Tensor, tolerance: float = 1e-5) -> None:
    assert o_THD.shape == expected_THD.shape and o_THD.is_contiguous()
    torch.testing.assert_close(o_THD.double(), expected_THD, rtol=0, atol=tolerance)
