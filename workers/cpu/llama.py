"""One rank's part of a Llama model on CPU cores, float32."""

from __future__ import annotations

import time

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwise.workers import failpoints
from headwise.workers.collectives import Collectives
from headwise.workers.cpu import layers as kernels
from headwise.workers.cpu.attention import CpuAttention
from headwise.workers.cpu.linear import SCRATCH_BYTES, PackedLinear, aligned_zeros, padded
from headwise.workers.cpu.team import launching, team_bytes, usable_threads
from headwise.workers.errors import InvalidValueError
from headwise.workers.failpoints import Point
from headwise.workers.kv.cache import KVCache
from headwise.workers.model.checkpoint import LayerWeights, ShardWeights
from headwise.workers.model.model import RopeTable, StepInput
from headwise.workers.model.model_config import ModelConfig
from headwise.workers.model.partition import ShardPartition


class CpuLlama:
    """See :class:`~headwise.workers.model.model.Model`. A step is one compiled call on one rank; with more of them,
    one for each stretch between two all-reduces.

    Attributes:
        nbytes: memory of the weights, in bytes.
    """

    # From attach() on:
    _attention: CpuAttention
    _rope: RopeTable
    _activations: _Activations
    _buffers: kernels.Buffers

    def __init__(
        self,
        config: ModelConfig,
        partition: ShardPartition,
        weights: ShardWeights,
        collectives: Collectives,
        max_model_len: int,
        num_threads: int,
    ) -> None:
        self._config, self._partition, self._collectives = config, partition, collectives
        self._threads = usable_threads(num_threads)
        self._embed_VE = weights.embed_VE.contiguous()
        self._final_norm_E = _padded_row(weights.final_norm_E)
        self._lm_head = PackedLinear(weights.lm_head_VE)
        self._layers: list[_Layer] = []
        while weights.layers:  # a plain weight is let go as soon as its packed form stands
            self._layers.append(_Layer(weights.layers.pop(0)))
        self._max_model_len = max_model_len
        self.nbytes = self._embed_VE.nbytes + self._lm_head.nbytes + sum(layer.nbytes for layer in self._layers)
        self._shape = self._shape_of(config, partition)
        self._times = np.zeros(len(kernels.PARTS), np.int64)
        self._scratch = aligned_zeros(self._threads * SCRATCH_BYTES // 4)
        self._team = aligned_zeros(team_bytes(self._threads) // 4)
        self._table = np.zeros((len(self._layers), kernels.LAYER_WORDS), np.int64)
        self._forward_seconds = self._all_reduce_seconds = 0.0

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time by part since the start, see :data:`~headwise.workers.cpu.layers.PARTS`; ``launch`` is the rest."""
        compiled = {part: float(ns) / 1e9 for part, ns in zip(kernels.PARTS, self._times, strict=True)}
        launch = self._forward_seconds - self._all_reduce_seconds - sum(compiled.values())
        return compiled | {"all_reduce": self._all_reduce_seconds, "launch": launch}

    def attach(self, cache: KVCache) -> None:
        q_starts, scale = self._partition.heads.q_starts, self._config.head_dim**-0.5
        self._attention = CpuAttention(cache, q_starts, scale, self._threads)
        self._rope = RopeTable(self._config, self._max_model_len, cache.policy)
        sinks_L = [cache.policy.sinks_of_layer(layer) for layer in range(len(self._layers))]
        for words, layer, kv, sinks in zip(self._table, self._layers, self._attention.layers, sinks_L, strict=True):
            capped = -1 if sinks is None or sinks.span is None else sinks.span - 1
            words[:] = (*layer.addresses, *kv, capped)
        sinks_width = self._shape.heads * self._shape.head_dim if any(sinks_L) else 0
        self._shape = self._shape._replace(sinks_width=sinks_width)
        self._activations = _Activations(self._shape, 0, 0)
        self._buffers = self._addresses()

    def capture(self, bucket: int, tokens_RL: Tensor) -> None:
        """Does nothing: a CPU has no graphs."""

    def detach(self) -> None:
        if hasattr(self, "_attention"):
            del self._attention

    def forward(self, step: StepInput) -> Tensor:
        """See :class:`~headwise.workers.model.model.Model`.

        Raises:
            InvalidValueError: slots are not in the cache, or rows, context and blocks do not fit each other.
        """
        started = time.perf_counter()
        tokens, wanted = len(step.rows_T), len(step.logit_tokens_B)
        self._make_room(tokens, wanted)
        self._run_phases(self._begin(step), tokens)
        start, stop = self._partition.vocab
        self._forward_seconds += time.perf_counter() - started
        return self._activations.logits_BV[:wanted, : stop - start]

    def _make_room(self, tokens: int, wanted: int) -> None:
        had = self._activations
        if tokens > had.tokens or wanted > had.wanted:
            self._activations = _Activations(self._shape, max(tokens, had.tokens), max(wanted, had.wanted))
            self._buffers = self._addresses()

    def _begin(self, step: StepInput) -> kernels.Step:
        self._check_slots(step)
        self._attention.begin(step.attention)
        cos_TD, sin_TD = self._rope.rows(step.positions_T)
        arrays = (step.rows_T, step.positions_T, step.slots_T, step.logit_tokens_B, cos_TD.numpy(), sin_TD.numpy())
        return kernels.Step(step.tokens_RL.numpy(), *arrays)

    def _check_slots(self, step: StepInput) -> None:
        blocks_G, tokens = self._attention.groups.blocks_G, int(step.attention.query_starts_B1[-1])
        limits_G = blocks_G * self._attention.sizes.block_size
        fits = len(step.slots_T) == tokens * len(limits_G)
        for slots_T, limit in zip(step.slots_T.reshape(len(limits_G), -1) if fits else (), limits_G, strict=fits):
            fits = fits and (limit == 0 or 0 <= slots_T.min() <= slots_T.max() < limit)
        if not fits:
            wanted = f"must be {tokens} slots in [0, {limits_G - 1}] of each group"
            raise InvalidValueError("slots_T", step.slots_T.tolist(), wanted)

    def _run_phases(self, step: kernels.Step, tokens: int) -> None:
        run = kernels.run_phases_in_threads if self._threads > 1 else kernels.run_phases
        attention, phases = self._attention, 2 * len(self._layers) + 2
        ranks = self._collectives.world_size
        stretch = phases if ranks == 1 and not failpoints.ENABLED else 1
        for first in range(0, phases, stretch):
            if first > 0 and ranks > 1:
                started = time.perf_counter()
                self._collectives.all_reduce_(self._activations.delta_TE[:tokens])
                self._all_reduce_seconds += time.perf_counter() - started
            with launching(self._threads):
                run(first, first + stretch, self._shape, self._buffers, step, attention.work, attention.sizes)
            if failpoints.ENABLED and 0 < first < phases - 1:
                failpoints.hit(Point.STEP_ATTENTION if first % 2 else Point.STEP_MLP, self._collectives.rank)

    def _addresses(self) -> kernels.Buffers:
        return kernels.Buffers(
            layers=self._table.ctypes.data,
            embed=self._embed_VE.data_ptr(),
            final_norm=self._final_norm_E.ctypes.data,
            lm_head=self._lm_head.address,
            cos=self._rope.cos_LD.data_ptr(),
            sin=self._rope.sin_LD.data_ptr(),
            times=self._times.ctypes.data,
            **self._activations.addresses,
            scratch=self._scratch.ctypes.data,
            team=self._team.ctypes.data,
        )

    def _shape_of(self, config: ModelConfig, partition: ShardPartition) -> kernels.Shape:
        first = self._layers[0]
        return kernels.Shape(
            num_layers=len(self._layers),
            width=config.hidden_size,
            padded_width=padded(config.hidden_size),
            heads=partition.heads.num_q,
            kv_heads=partition.heads.num_kv,
            head_dim=config.head_dim,
            qkv_width=first.qkv.width,
            attn_width=first.o.depth,
            act_width=first.down.depth,
            logit_width=self._lm_head.width,
            sinks_width=0,
            vocab_start=partition.vocab[0],
            vocab_stop=partition.vocab[1],
            eps=np.float32(config.rms_norm_eps),
            threads=self._threads,
        )


class _Layer:
    def __init__(self, weights: LayerWeights) -> None:
        self._attn_norm_E, self._mlp_norm_E = _padded_row(weights.attn_norm_E), _padded_row(weights.mlp_norm_E)
        self.qkv = PackedLinear(weights.qkv_weight, weights.qkv_bias)
        self.o = PackedLinear(weights.o_weight, weights.o_bias)
        self.gate_up = PackedLinear(weights.gate_up_weight, weights.gate_up_bias, gated=True)
        self.down = PackedLinear(weights.down_weight, weights.down_bias)
        linears = (self.qkv, self.o, self.gate_up, self.down)
        self.nbytes = sum(linear.nbytes for linear in linears)
        norms = (self._attn_norm_E.ctypes.data, self._mlp_norm_E.ctypes.data)
        self.addresses = (*norms, *(linear.address for linear in linears))


class _Activations:
    """The rows that a step works in, kept from step to step; what lies beyond a row's width stays zero."""

    def __init__(self, shape: kernels.Shape, tokens: int, wanted: int) -> None:
        self.tokens, self.wanted = tokens, wanted
        widths = {
            "residual": shape.padded_width,
            "delta": shape.padded_width,
            "x": shape.padded_width,
            "qkv": shape.qkv_width,
            "q_sinks": shape.sinks_width,
            "attn": shape.attn_width,
            "act": shape.act_width,
        }
        rows = {name: aligned_zeros(tokens * width) for name, width in widths.items()}
        rows["logits"] = aligned_zeros(wanted * shape.logit_width)
        self._rows = rows
        self.addresses: dict[str, int] = {name: array.ctypes.data for name, array in rows.items()}
        self.delta_TE = torch.from_numpy(rows["delta"]).view(tokens, shape.padded_width)
        self.logits_BV = torch.from_numpy(rows["logits"]).view(wanted, shape.logit_width)


def _padded_row(row_E: Tensor) -> NDArray[np.float32]:
    into_E = aligned_zeros(padded(len(row_E)))
    into_E[: len(row_E)] = row_E.numpy()
    return into_E
