"""The forward pass of one shard of a Llama model in plain torch, on any device and in any dtype."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from headwise.workers.collectives import Collectives, Solo
from headwise.workers.kv.cache import KVCache
from headwise.workers.model.attention import AttentionBackend
from headwise.workers.model.checkpoint import LayerWeights, ShardWeights
from headwise.workers.model.model import RopeTable, StepInput
from headwise.workers.model.model_config import ModelConfig
from headwise.workers.model.ops import Ops
from headwise.workers.model.partition import ShardPartition
from headwise.workers.reference.ops import rotate_
from headwise.workers.upload import upload


class Inputs(NamedTuple):
    """A step's tokens on the device.

    Attributes:
        token_ids_T, positions_T, slots_T: integers.
        logit_tokens_B: the tokens whose logits are wanted; None: all.
        rotation: cos_TD and sin_TD of the positions; None: all are in the table.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    logit_tokens_B: Tensor | None
    rotation: tuple[Tensor, Tensor] | None = None


class Llama:
    """See :class:`~headwise.workers.model.model.Model`.

    Args:
        ops: what computes between the matrix products.
        attention: what :meth:`attach` makes the attention of.

    Attributes:
        attention: of this model's cache.
    """

    attention: AttentionBackend  # from attach() on

    def __init__(
        self,
        config: ModelConfig,
        partition: ShardPartition,
        weights: ShardWeights,
        collectives: Collectives,
        max_model_len: int,
        ops: Ops,
        attention: type[AttentionBackend],
    ) -> None:
        self._config, self._partition, self._collectives, self._weights = config, partition, collectives, weights
        self._ops, self._attention_class = ops, attention
        self._seconds = 0.0
        self._max_model_len, self._sinks_spans = max_model_len, [0] * config.num_layers
        self._turn_by(RopeTable(config, max_model_len))
        self._num_heads = partition.heads.num_q
        tied = weights.lm_head_VE.data_ptr() == weights.embed_VE.data_ptr()
        self.nbytes = weights.embed_VE.nbytes + (0 if tied else weights.lm_head_VE.nbytes)
        self.nbytes += sum(layer.nbytes for layer in weights.layers)

    @property
    def seconds(self) -> dict[str, float]:
        return {"forward": self._seconds}

    def attach(self, cache: KVCache) -> None:
        if not cache.policy.plain:
            self._turn_by(RopeTable(self._config, self._max_model_len, cache.policy))
        reaches = [cache.policy.sinks_of_layer(layer) for layer in range(cache.num_layers)]
        self._sinks_spans = [(reach.span or 0) if reach is not None else 0 for reach in reaches]
        self.attention = self._attention_class(cache, self._partition.heads.q_starts, self._config.head_dim**-0.5)

    def detach(self) -> None:
        if hasattr(self, "attention"):
            del self.attention

    @torch.inference_mode()
    def forward(self, step: StepInput) -> Tensor:
        started = time.perf_counter()
        logits_BV = self.compute(self._upload(step))
        self._seconds += time.perf_counter() - started
        return logits_BV

    def capture(self, bucket: int, tokens_RL: Tensor) -> None:
        """Does nothing: every step is computed anew."""

    def _upload(self, step: StepInput) -> Inputs:
        self.attention.begin(step.attention)
        columns_T = step.positions_T % step.tokens_RL.shape[1]
        arrays = (step.rows_T, columns_T, step.positions_T, step.slots_T, step.logit_tokens_B)
        rows_T, columns, positions_T, slots_T, logit_tokens_B = (upload(x, self._cos_LD.device) for x in arrays)
        rotation = None
        if not self._rope.holds(step.positions_T):
            cos_TD, sin_TD = self._rope.rows(step.positions_T)
            rotation = cos_TD.to(self._cos_LD), sin_TD.to(self._cos_LD)
        return Inputs(step.tokens_RL[rows_T, columns], positions_T, slots_T, logit_tokens_B, rotation)

    def _turn_by(self, table: RopeTable) -> None:
        self._rope = table
        self._cos_LD, self._sin_LD = (x.to(self._weights.embed_VE) for x in (table.cos_LD, table.sin_LD))

    def compute(self, inputs: Inputs, alone: bool = False) -> Tensor:
        """Like :meth:`forward`, of tokens that are on the device, once the attention has begun the step.

        Args:
            alone: the other ranks do not compute it, so nothing is added up, and what comes out means nothing.
        """
        collectives = Solo() if alone else self._collectives
        weights, ops, eps = self._weights, self._ops, self._config.rms_norm_eps
        residual_TE = self._embed(inputs.token_ids_T, collectives)
        turns = self._turns(inputs)
        for index, layer in enumerate(weights.layers):
            x_TE = ops.rms_norm(residual_TE, layer.attn_norm_E, eps)
            attn_TX = self._attend(index, layer, x_TE, turns, inputs.slots_T)
            attn_TE = functional.linear(attn_TX, layer.o_weight, layer.o_bias)
            collectives.all_reduce_(attn_TE)
            x_TE = ops.add_rms_norm(residual_TE, attn_TE, layer.mlp_norm_E, eps)
            act_TM = ops.silu_mul(functional.linear(x_TE, layer.gate_up_weight, layer.gate_up_bias))
            mlp_TE = functional.linear(act_TM, layer.down_weight, layer.down_bias)
            collectives.all_reduce_(mlp_TE)
            residual_TE += mlp_TE
        if inputs.logit_tokens_B is not None:
            residual_TE = residual_TE[inputs.logit_tokens_B]
        last_BE = ops.rms_norm(residual_TE, weights.final_norm_E, eps)
        return functional.linear(last_BE, weights.lm_head_VE).float()

    def _embed(self, token_ids_T: Tensor, collectives: Collectives) -> Tensor:
        """Each rank looks up the tokens it owns; the others contribute zeros, so the sum is exact."""
        start, stop = self._partition.vocab
        local_T = token_ids_T - start
        foreign_T = (local_T < 0) | (local_T >= stop - start)
        x_TE = functional.embedding(local_T.masked_fill(foreign_T, 0), self._weights.embed_VE)
        x_TE.masked_fill_(foreign_T.unsqueeze(1), 0)
        collectives.all_reduce_(x_TE)
        return x_TE

    def _turns(self, inputs: Inputs) -> dict[int, tuple[Tensor, Tensor]]:
        """cos_TD and sin_TD by span: at 0 those of the positions, at the span of a reach with sinks those by which
        queries meet the sinks."""
        turns = {0: inputs.rotation or (self._cos_LD[inputs.positions_T], self._sin_LD[inputs.positions_T])}
        for span in set(self._sinks_spans) - {0}:
            capped_T = inputs.positions_T.clamp(max=span - 1)
            turns[span] = self._cos_LD[capped_T], self._sin_LD[capped_T]
        return turns

    def _attend(
        self,
        index: int,
        layer: LayerWeights,
        x_TE: Tensor,
        turns: dict[int, tuple[Tensor, Tensor]],
        slots_T: Tensor,
    ) -> Tensor:
        qkv_TX = functional.linear(x_TE, layer.qkv_weight, layer.qkv_bias)
        qkv_TXD = qkv_TX.view(len(qkv_TX), -1, self._config.head_dim)
        q_THD, q_sinks_THD = qkv_TXD[:, : self._num_heads], None
        if span := self._sinks_spans[index]:
            q_sinks_THD = q_THD.clone()
            rotate_(q_sinks_THD, *turns[span])
        self._ops.rotate_and_write(qkv_TXD, *turns[0], self.attention.cache, index, slots_T)
        return self.attention.attend(index, q_THD, q_sinks_THD).flatten(1)
