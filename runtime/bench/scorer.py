"""The logits of every token of a text, under any KV policy and in any form of keys and values.

An engine gives tokens, and log-probabilities of a few. Whoever compares policies needs all logits, so here a rank of
the model is driven as a shard drives it, with the same rows, block tables, cache and kernels, but without sampling.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from headwise.workers.backends import Backend, find_backend
from headwise.workers.collectives import Solo
from headwise.workers.kv.cache import KVCache
from headwise.workers.kv.format import KvFormat, kv_format
from headwise.workers.kv.policy import KvPolicy, Reach, resolve_policy
from headwise.workers.kv.sizes import block_bytes
from headwise.workers.machine import usable_cores
from headwise.workers.model.checkpoint import load_shard
from headwise.workers.model.model import Model
from headwise.workers.model.model_config import ModelConfig, load_model_config
from headwise.workers.model.partition import partition_model
from headwise.workers.plan import RowAdmit, RowSampling, StepPlan
from headwise.workers.rows import Rows

CHUNK_TOKENS = 256
"""Most tokens of a step."""

BLOCK_SIZE = 16
_ROW = np.zeros(1, np.int64)


class ScoredModel:
    """A whole model in this process, in float32. Several :class:`Scorer` take turns with it.

    Attributes:
        config: of the model.
    """

    def __init__(
        self, path: Path, device: str = "cpu", attention: str | None = None, threads: int | None = None
    ) -> None:
        """
        Args:
            path: a directory in Hugging Face form.
            attention: as of :class:`~headwise.workers.spec.ShardSpec`.
            threads: to compute with; None: as many as there are cores.

        Raises:
            CheckpointError, InvalidValueError, UnsupportedModelError: as of :class:`~headwise.runtime.llm.LLM`.
        """
        self.config = load_model_config(path)
        self.device = torch.device(device)
        self._path, self._attention, self._threads = path, attention, threads or usable_cores()
        self._models: dict[Backend, Model] = {}
        self._turn: tuple[Model, KVCache] | None = None

    def backend(self, format: KvFormat, policy: KvPolicy) -> Backend:
        """What computes with such a cache.

        Raises:
            InvalidValueError: the attention that was asked for does not.
        """
        return find_backend(
            self._attention, self.device, torch.float32, BLOCK_SIZE, self.config.head_dim, format, policy
        )

    def attached(self, backend: Backend, cache: KVCache) -> Model:
        """The model, whose next steps write to and read this cache."""
        if backend not in self._models:
            self._models[backend] = self._load(backend)
        model = self._models[backend]
        if self._turn != (model, cache):
            if self._turn is not None:
                self._turn[0].detach()
            if self.device.type == "cpu":
                torch.set_num_threads(self._threads if backend.torch_computes else 1)
            model.attach(cache)
            self._turn = (model, cache)
        return model

    def _load(self, backend: Backend) -> Model:
        [part] = partition_model(self.config, 1)
        weights = load_shard(self._path, self.config, part, torch.float32, self.device)
        return backend.model(self.config, part, weights, Solo(), self.config.max_position_embeddings, self._threads)


class Scorer:
    """One row of a model under one policy. Blocks are reused as soon as no token to come attends to what they hold.

    Attributes:
        policy, format: of its keys and values.
        bytes_per_token: what each token takes that is kept, in all layers.
        step_seconds: what the last step took.
    """

    def __init__(self, model: ScoredModel, policy: str, kv_dtype: str, most_tokens: int) -> None:
        """
        Args:
            policy: see :mod:`~headwise.workers.kv.policy`.
            kv_dtype: of KV_DTYPES.
            most_tokens: of a text.

        Raises:
            InvalidValueError: the policy or dtype does not go with the model; or no backend serves them.
        """
        config = model.config
        self._model, self.format = model, kv_format(kv_dtype, config.head_dim)
        self.policy = policy_of(policy, config)
        self._backend = model.backend(self.format, self.policy)
        reaches = self.policy.reaches
        self._groups = [_Blocks(reach, most_tokens) for reach in reaches]
        self._block_bytes = block_bytes(self.policy, self.format, BLOCK_SIZE, config.head_dim)
        self.bytes_per_token = sum(self._block_bytes) // BLOCK_SIZE
        self._cache = KVCache(
            config.num_layers,
            [group.num_blocks for group in self._groups],
            config.num_kv_heads,
            BLOCK_SIZE,
            config.head_dim,
            torch.float32,
            model.device,
            transposed_keys=bool(self._backend.attention.transposed_keys),
            format=self.format,
            policy=self.policy,
        )
        self._rows = Rows(BLOCK_SIZE, 1, most_tokens, model.device, reaches, CHUNK_TOKENS)
        self._length = self._computed = 0
        self.step_seconds = 0.0

    @property
    def num_computed(self) -> int:
        """How many tokens of the text have their keys and values, or had them."""
        return self._computed

    @property
    def kv_bytes(self) -> int:
        """Of the blocks that the row has."""
        counts = [len(group.held) for group in self._groups]
        return sum(count * size for count, size in zip(counts, self._block_bytes, strict=True))

    def start(self, token_ids: Sequence[int]) -> None:
        """Takes a text, of which nothing is computed, in place of the one before."""
        for group in self._groups:
            group.release_all()
        others: tuple[list[int], ...] = tuple([] for _ in self._groups[1:])
        admit = RowAdmit(0, list(token_ids), len(token_ids), 0, [], RowSampling(), others)
        self._rows.apply(StepPlan(0, drops=[0], admits=[admit]))
        self._length, self._computed = len(token_ids), 0

    @torch.inference_mode()
    def advance(self, count: int, last_only: bool = False) -> Tensor:
        """Computes so many tokens of the text.

        Args:
            count: at least 1, at most CHUNK_TOKENS and what is left of the text.
            last_only: the others' logits are not wanted.

        Returns:
            [count, V] float32, or [1, V]: what the model expects after each token. Good until the next step of any
            scorer of the model.
        """
        self._append_blocks(self._computed + count)
        model = self._model.attached(self._backend, self._cache)
        started = time.perf_counter()
        step = self._rows.build(_ROW, np.array([count]), 0)
        step.logit_tokens_B = np.arange(count - 1 if last_only else 0, count)
        logits_TV = model.forward(step)
        if logits_TV.device.type == "cuda":
            torch.cuda.synchronize()
        self.step_seconds = time.perf_counter() - started
        self._computed += count
        for group in self._groups:
            group.release(self._computed)
        return logits_TV

    def append(self, token: int) -> None:
        """Adds a token to the text."""
        self._rows.store(_ROW, torch.tensor([token], device=self._model.device))
        self._length += 1

    def _append_blocks(self, stop: int) -> None:
        plan = StepPlan(0)
        for number, group in enumerate(self._groups):
            for block in group.extend(stop):
                if number:
                    plan.group_appends.append((number, 0, block))
                else:
                    plan.appends.append((0, block))
        self._rows.apply(plan)


def policy_of(text: str, config: ModelConfig) -> KvPolicy:
    """
    Raises:
        InvalidValueError: it is no policy of such a model.
    """
    return resolve_policy(text, config.num_layers, config.num_kv_heads, config.sliding_windows)


class _Blocks:
    """The blocks of one group: those that the row has, and those that are free.

    Attributes:
        held: by the block's place in the text.
    """

    def __init__(self, reach: Reach, most_tokens: int) -> None:
        self.num_blocks = reach.most_blocks(BLOCK_SIZE, most_tokens, CHUNK_TOKENS)
        self.held: dict[int, int] = {}
        self._reach, self._free, self._next = reach, list(range(self.num_blocks)), 0

    def extend(self, num_tokens: int) -> list[int]:
        """The blocks that the row gets, so that it has those of its first so many tokens."""
        added = []
        while self._next * BLOCK_SIZE < num_tokens:
            self.held[self._next] = block = self._free.pop()
            added.append(block)
            self._next += 1
        return added

    def release(self, num_computed: int) -> None:
        """Frees the blocks that no token attends to once so many are computed."""
        first = self._reach.first_key(num_computed) // BLOCK_SIZE
        sinks = -(-self._reach.sinks // BLOCK_SIZE)
        for place in [place for place in self.held if sinks <= place < first]:
            self._free.append(self.held.pop(place))

    def release_all(self) -> None:
        self._free += self.held.values()
        self.held, self._next = {}, 0
