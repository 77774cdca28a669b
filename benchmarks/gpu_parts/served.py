"""A rank that serves the model with random weights, and an engine's share of it: plans, two of them in flight."""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import torch

from gpu_parts.device import Device
from gpu_parts.sizes import BLOCK_SIZE, Sizes
from gpu_parts.weights import random_weights
from headwise.workers.backends import find_backend
from headwise.workers.collectives import Solo
from headwise.workers.cuda import gpu
from headwise.workers.cuda.buckets import bucket_of
from headwise.workers.cuda.kv_copy import BlockMover
from headwise.workers.kv.cache import KVCache
from headwise.workers.kv.policy import DENSE
from headwise.workers.model.partition import partition_model
from headwise.workers.plan import RowAdmit, RowSampling, StepOutput, StepPlan, TokenLogprobs
from headwise.workers.runner import Launched, Runner
from headwise.workers.sampling.sampler import Sampler

DEPTH = 2
"""Steps in flight, as an engine's pipeline_depth."""
ROOM = 128
"""Tokens that a row may grow by."""
_LOGPROBS = 20
_KV_SHARE = 0.85
"""Of the memory that the weights leave; the rest is for what a step computes, for graphs, and for others."""


class Steps(NamedTuple):
    """What decode steps took, in seconds a step.

    Attributes:
        wall: from the end of one step to the end of the next.
        device: of the device.
        launch: of the host, to launch it.
        context_tokens: tokens of context that a step read, all rows together.
    """

    wall: float
    device: float
    launch: float
    context_tokens: int


@dataclass
class _Row:
    """Attributes:
    length: of its context, in the next step.
    """

    length: int
    blocks: list[int]


class Served:
    """One rank, its memory, and the rows that it computes. Every row is greedy.

    Attributes:
        weights: of the model, on the device.
        cache: full of random keys and values, so that a row may have a context that was never computed.
    """

    def __init__(self, device: Device, sizes: Sizes) -> None:
        """Raises:
        HeadwiseError: no backend "cuda" for these sizes.
        torch.OutOfMemoryError: the weights do not fit.
        """
        self.device, self.sizes, self.config = device, sizes, sizes.model
        dtype: torch.dtype = getattr(torch, sizes.dtype)
        self.backend = find_backend("cuda", device.at, dtype, BLOCK_SIZE, self.config.head_dim)
        self.weights = random_weights(self.config, dtype, device.at)
        (partition,) = partition_model(self.config, 1)
        self.q_starts = partition.heads.q_starts
        contexts = (*sizes.decodes, *sizes.attentions, *((1, tokens) for tokens, _ in sizes.prefills))
        self.max_len = max(context for _, context in contexts) + ROOM
        model = self.backend.model(self.config, partition, self.weights, Solo(), self.max_len, 1)
        self.cache = self._make_cache([_blocks(*both) for both in contexts], dtype)
        model.attach(self.cache)
        self._free = torch.randperm(self.cache.num_blocks, generator=torch.Generator().manual_seed(0)).tolist()
        max_rows = max(rows for rows, _ in sizes.decodes)
        self._runner = Runner(
            model,
            Sampler(self.config.vocab_size, max_rows, device.at),
            Solo(),
            vocab_sizes=[self.config.vocab_size],
            block_size=BLOCK_SIZE,
            max_num_seqs=max_rows,
            max_model_len=self.max_len,
            max_num_batched_tokens=self.max_len,
            device=device.at,
            num_threads=1,
            reaches=(DENSE,),
        )
        if (ours := gpu.of(device.at)) is not None:
            self.cache.mover = BlockMover(self.cache, ours, lambda: self._runner.collected)
        self._next_step = 0
        self._rows: dict[int, _Row] = {}
        self._new_rows: list[RowAdmit] = []
        self._captured: set[int] = set()

    def fits(self, rows: int, context: int) -> bool:
        """Whether the cache has blocks for so many rows."""
        return _blocks(rows, context) <= self.cache.num_blocks

    def decode(self, rows: int, context: int) -> Steps:
        """Steady decode steps of rows with about so many tokens of context."""
        self._begin_rows(rows, context)
        try:
            return self._time_decodes(self.sizes.steps)
        finally:
            self._end_rows()

    def waits_of_a_decode(self, rows: int, context: int) -> tuple[int | None, int | None]:
        """How often the host waits for the device in launching a steady decode step, and in finishing it."""
        self._begin_rows(rows, context)
        try:
            launched = [self._launch(self._decode_plan()) for _ in range(DEPTH)]
            in_finish = self.device.count_waits(lambda: self._runner.finish(launched.pop(0)))
            plan = self._decode_plan()
            in_launch = self.device.count_waits(lambda: launched.append(self._launch(plan)))
            for step in launched:
                self._runner.finish(step)
            return in_launch, in_finish
        finally:
            self._end_rows()

    def prefill(self, tokens: int, chunk: int) -> float:
        """Seconds from the launch of a prompt's first step until its first token is there."""
        prompt, chunks = self.tokens(tokens), [min(chunk, tokens - start) for start in range(0, tokens, chunk)]
        in_flight = deque[Launched]()
        try:
            started = time.perf_counter()
            for count in chunks:
                admits = [] if self._rows else [self._admit(0, prompt, 0, RowSampling())]
                in_flight.append(self._launch(StepPlan(self._next_step, admits=admits, computes=[(0, count)])))
                if len(in_flight) == DEPTH:
                    _check(self._runner.finish(in_flight.popleft()))
            while in_flight:
                _check(self._runner.finish(in_flight.popleft()))
            return time.perf_counter() - started
        finally:
            self._end_rows()

    def logprobs(self, prompt: list[int]) -> TokenLogprobs:
        """The most likely tokens after a prompt."""
        sampling = RowSampling(num_logprobs=_LOGPROBS)
        admits = [self._admit(0, prompt, 0, sampling)]
        try:
            plan = StepPlan(self._next_step, admits=admits, computes=[(0, len(prompt))])
            output = self._runner.finish(self._launch(plan))
            _check(output)
            return output.logprobs[0]
        finally:
            self._end_rows()

    def tokens(self, count: int) -> list[int]:
        """Random ones."""
        generator = torch.Generator().manual_seed(count)
        drawn: list[int] = torch.randint(self.config.vocab_size, (count,), generator=generator).tolist()
        return drawn

    def bytes_of_a_decode(self, rows: int, context_tokens: int) -> int:
        """The least that a decode step reads: the weights (of the embedding a token a row), and the context, once."""
        weights, embed_VE = self.weights, self.weights.embed_VE
        read = weights.lm_head_VE.nbytes + sum(layer.nbytes for layer in weights.layers)
        return read + rows * embed_VE[0].nbytes + self.bytes_of_context(context_tokens)

    def bytes_of_context(self, tokens: int) -> int:
        """Of their keys and values, all layers together."""
        return tokens * self.cache.nbytes // (self.cache.num_blocks * BLOCK_SIZE)

    def flop_of_a_prefill(self, tokens: int) -> int:
        """Of the matrix products, and of attention to the keys that a query may see."""
        config, weights = self.config, self.weights
        matrices = (w for x in weights.layers for w in (x.qkv_weight, x.o_weight, x.gate_up_weight, x.down_weight))
        products = 2 * tokens * sum(w.numel() for w in matrices) + 2 * weights.lm_head_VE.numel()
        seen = tokens * (tokens + 1) // 2
        return products + 4 * seen * config.num_heads * config.head_dim * config.num_layers

    def _time_decodes(self, steps: int) -> Steps:
        """A quarter of the steps again come before those that count."""
        runner, device, warm = self._runner, self.device, -(-steps // 4)
        in_flight, marks, host_s, ends, lengths = deque[Launched](), [], [], [], []
        for _ in range(warm + steps):
            plan = self._decode_plan()
            lengths.append(sum(row.length for row in self._rows.values()) - len(self._rows))
            first, started = device.mark(), time.perf_counter()
            in_flight.append(self._launch(plan))
            host_s.append(time.perf_counter() - started)
            marks.append((first, device.mark()))
            if len(in_flight) == DEPTH:
                _check(runner.finish(in_flight.popleft()))
                ends.append(time.perf_counter())
        while in_flight:
            _check(runner.finish(in_flight.popleft()))
        # The last steps end without one behind them, so they do not count.
        wall_s = (ends[-1] - ends[warm - 1]) / (len(ends) - warm)
        device_s = statistics.mean(device.between(*both) for both in marks[warm:])
        return Steps(wall_s, device_s, statistics.median(host_s[warm:]), round(statistics.mean(lengths[warm:])))

    def _decode_plan(self) -> StepPlan:
        """The next step of all rows, which knows what an engine would: blocks for those that are full."""
        bucket = bucket_of(len(self._rows))
        plan = StepPlan(self._next_step, computes=[(row, 1) for row in self._rows], bucket=bucket)
        if self._new_rows:
            plan.admits, self._new_rows = self._new_rows, []
        if bucket not in self._captured:
            plan.capture = bucket
            self._captured.add(bucket)
        for number, row in self._rows.items():
            if row.length > len(row.blocks) * BLOCK_SIZE:
                row.blocks.append(self._free.pop())
                plan.appends.append((number, row.blocks[-1]))
            row.length += 1
        return plan

    def _begin_rows(self, rows: int, context: int) -> None:
        """Their contexts are a little longer one by one, so that not all need a block in the same step."""
        for row in range(rows):
            length = context + row % BLOCK_SIZE
            self._new_rows.append(self._admit(row, self.tokens(length), length - 1, RowSampling()))

    def _admit(self, row: int, tokens: list[int], num_computed: int, sampling: RowSampling) -> RowAdmit:
        blocks = [self._free.pop() for _ in range(-(-len(tokens) // BLOCK_SIZE))]
        self._rows[row] = _Row(len(tokens), blocks)
        return RowAdmit(row, tokens, len(tokens), num_computed, list(blocks), sampling)

    def _end_rows(self) -> None:
        dropped = StepPlan(self._next_step, drops=list(self._rows.keys() - {admit.row for admit in self._new_rows}))
        self._runner.finish(self._launch(dropped))
        self._free += [block for row in self._rows.values() for block in row.blocks]
        self._rows, self._new_rows = {}, []

    def _launch(self, plan: StepPlan) -> Launched:
        launched = self._runner.launch(plan)
        self._next_step += 1
        return launched

    def _make_cache(self, wanted: list[int], dtype: torch.dtype) -> KVCache:
        """With blocks for the largest of what is wanted that there is memory for."""
        shape = (self.config.num_kv_heads, BLOCK_SIZE, self.config.head_dim, dtype)
        free = self.device.free_bytes() * _KV_SHARE
        block = KVCache(self.config.num_layers, 1, *shape, "meta").nbytes
        fitting = [blocks for blocks in wanted if blocks * block <= free]
        cache = KVCache(self.config.num_layers, max(fitting, default=1), *shape, self.device.at)
        for layer in range(self.config.num_layers):
            cache.keys[layer].normal_()
            cache.values[layer].normal_()
        return cache


def _blocks(rows: int, context: int) -> int:
    """Of so many rows that grow by ROOM."""
    return rows * -(-(context + ROOM) // BLOCK_SIZE)


def _check(output: StepOutput) -> None:
    if output.failed:
        raise RuntimeError(f"step {output.step} failed for {len(output.failed)} rows: {output.failed[0]}")
