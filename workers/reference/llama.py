"""The forward pass of one shard of a Llama model in plain torch, on any device and in any dtype."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from torch.nn import functional

from headwise.workers.collectives import Collectives
from headwise.workers.model.attention import AttentionBackend, AttentionBatch
from headwise.workers.model.checkpoint import LayerWeights, ShardWeights
from headwise.workers.model.model import StepInput, rope_tables
from headwise.workers.model.model_config import ModelConfig
from headwise.workers.model.partition import ShardPartition
from headwise.workers.reference import ops


class Llama:
    """See :class:`~headwise.workers.model.model.Model`."""

    def __init__(
        self,
        config: ModelConfig,
        partition: ShardPartition,
        weights: ShardWeights,
        collectives: Collectives,
        max_model_len: int,
    ) -> None:
        self._config, self._partition, self._collectives, self._weights = config, partition, collectives, weights
        self._seconds = 0.0
        cos_LD, sin_LD = rope_tables(config, max_model_len)
        self._cos_LD, self._sin_LD = cos_LD.to(weights.embed_VE), sin_LD.to(weights.embed_VE)
        heads = partition.heads
        self._num_heads, self._num_kv_heads = heads.q_stop - heads.q_start, heads.kv_stop - heads.kv_start
        tied = weights.lm_head_VE.data_ptr() == weights.embed_VE.data_ptr()
        self.nbytes = weights.embed_VE.nbytes + (0 if tied else weights.lm_head_VE.nbytes)
        self.nbytes += sum(layer.nbytes for layer in weights.layers)

    @property
    def seconds(self) -> dict[str, float]:
        return {"forward": self._seconds}

    @torch.inference_mode()
    def forward(self, step: StepInput, attention: AttentionBackend) -> Tensor:
        started = time.perf_counter()
        logits_BV = self._forward(step, attention)
        self._seconds += time.perf_counter() - started
        return logits_BV

    def _forward(self, step: StepInput, attention: AttentionBackend) -> Tensor:
        weights, eps = self._weights, self._config.rms_norm_eps
        residual_TE = self._embed(step.token_ids_T)
        cos_TD, sin_TD = self._cos_LD[step.positions_T], self._sin_LD[step.positions_T]
        for index, layer in enumerate(weights.layers):
            x_TE = ops.rms_norm(residual_TE, layer.attn_norm_E, eps)
            attn_TX = self._attend(index, layer, x_TE, cos_TD, sin_TD, attention, step.attention)
            attn_TE = functional.linear(attn_TX, layer.o_weight, layer.o_bias)
            self._collectives.all_reduce_(attn_TE)
            x_TE = ops.add_rms_norm(residual_TE, attn_TE, layer.mlp_norm_E, eps)
            act_TM = ops.silu_mul(functional.linear(x_TE, layer.gate_up_weight, layer.gate_up_bias))
            mlp_TE = functional.linear(act_TM, layer.down_weight, layer.down_bias)
            self._collectives.all_reduce_(mlp_TE)
            residual_TE += mlp_TE
        last_BE = ops.rms_norm(residual_TE[step.logit_tokens_B], weights.final_norm_E, eps)
        return functional.linear(last_BE, weights.lm_head_VE).float()

    def _embed(self, token_ids_T: Tensor) -> Tensor:
        """Each rank looks up the tokens it owns; the others contribute zeros, so the sum is exact."""
        start, stop = self._partition.vocab
        local_T = token_ids_T - start
        foreign_T = (local_T < 0) | (local_T >= stop - start)
        x_TE = functional.embedding(local_T.masked_fill(foreign_T, 0), self._weights.embed_VE)
        x_TE.masked_fill_(foreign_T.unsqueeze(1), 0)
        self._collectives.all_reduce_(x_TE)
        return x_TE

    def _attend(
        self,
        index: int,
        layer: LayerWeights,
        x_TE: Tensor,
        cos_TD: Tensor,
        sin_TD: Tensor,
        attention: AttentionBackend,
        batch: AttentionBatch,
    ) -> Tensor:
        heads, kv_heads = self._num_heads, self._num_kv_heads
        qkv_TX = functional.linear(x_TE, layer.qkv_weight, layer.qkv_bias)
        qkv_TXD = qkv_TX.view(-1, heads + 2 * kv_heads, self._config.head_dim)
        ops.rope_(qkv_TXD, heads + kv_heads, cos_TD, sin_TD)
        attention.write(index, qkv_TXD[:, heads : heads + kv_heads], qkv_TXD[:, heads + kv_heads :], batch)
        return attention.attend(index, qkv_TXD[:, :heads], batch).flatten(1)
