"""The forward pass of one shard of a Llama model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from headwise.workers.attention import AttentionBackend, AttentionBatch
from headwise.workers.checkpoint import LayerWeights, ShardWeights
from headwise.workers.collectives import Collectives
from headwise.workers.linear import Linear
from headwise.workers.model_config import ModelConfig, rope_inv_freq
from headwise.workers.ops import Ops, ops_for
from headwise.workers.partition import ShardPartition


@dataclass(slots=True)
class StepInput:
    """The tokens of a step.

    Attributes:
        token_ids_T: int64.
        positions_T: int64, each token's index in its row.
        logit_tokens_B: int64, the tokens of the step (indices into T) whose logits are wanted.
        attention: the rows as attention sees them.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    logit_tokens_B: Tensor
    attention: AttentionBatch


class Llama:
    """One rank's part of the model; every rank runs the same calls in the same order.

    Attributes:
        nbytes: memory of the weights, in bytes, packed copies included.
    """

    def __init__(
        self,
        config: ModelConfig,
        partition: ShardPartition,
        weights: ShardWeights,
        collectives: Collectives,
        max_model_len: int,
    ) -> None:
        self._config, self._partition, self._collectives = config, partition, collectives
        self._embed_VE = weights.embed_VE
        self._ops = ops_for(self._embed_VE.device, self._embed_VE.dtype)
        self._final_norm_E = weights.final_norm_E
        self._lm_head = Linear(weights.lm_head_VE)
        self._layers: list[_Layer] = []
        while weights.layers:  # a plain weight is let go as soon as its prepared form stands
            self._layers.append(_Layer(config, partition, weights.layers.pop(0), collectives, self._ops))
        self._cos_LD, self._sin_LD = _rope_tables(config, max_model_len, self._embed_VE)
        linears = [self._lm_head, *(linear for layer in self._layers for linear in layer.linears)]
        self.nbytes = self._embed_VE.nbytes + sum(linear.nbytes for linear in linears)
        if self._lm_head.shares(self._embed_VE):
            self.nbytes -= self._embed_VE.nbytes

    @torch.inference_mode()
    def forward(self, step: StepInput, attention: AttentionBackend) -> Tensor:
        """Computes a step and writes its KV.

        Returns:
            ``[B, V]`` float32: this rank's vocabulary rows of the logits of ``step.logit_tokens_B``.
        """
        residual_TE = self._embed(step.token_ids_T)
        cos_TD, sin_TD = self._cos_LD[step.positions_T], self._sin_LD[step.positions_T]
        delta_TE: Tensor | None = None
        for index, layer in enumerate(self._layers):
            delta_TE = layer.forward(index, residual_TE, delta_TE, cos_TD, sin_TD, attention, step.attention)
        wanted = step.logit_tokens_B
        last_BE = residual_TE[wanted]
        if delta_TE is not None:
            last_BE += delta_TE[wanted]
        hidden_BE = self._ops.rms_norm(last_BE, self._final_norm_E, self._config.rms_norm_eps)
        return self._lm_head(hidden_BE).float()

    def _embed(self, token_ids_T: Tensor) -> Tensor:
        """Each rank looks up the tokens it owns; the others contribute zeros, so the sum is exact."""
        start, stop = self._partition.vocab
        if self._collectives.world_size == 1:
            return functional.embedding(token_ids_T, self._embed_VE)
        local_T = token_ids_T - start
        foreign_T = (local_T < 0) | (local_T >= stop - start)
        x_TE = functional.embedding(local_T.masked_fill(foreign_T, 0), self._embed_VE)
        x_TE.masked_fill_(foreign_T.unsqueeze(1), 0)
        self._collectives.all_reduce_(x_TE)
        return x_TE


class _Layer:
    def __init__(
        self,
        config: ModelConfig,
        partition: ShardPartition,
        weights: LayerWeights,
        collectives: Collectives,
        ops: Ops,
    ) -> None:
        heads = partition.heads
        self._num_heads, self._num_kv_heads = heads.q_stop - heads.q_start, heads.kv_stop - heads.kv_start
        self._head_dim, self._eps = config.head_dim, config.rms_norm_eps
        self._collectives, self._ops = collectives, ops
        self._attn_norm_E, self._mlp_norm_E = weights.attn_norm_E, weights.mlp_norm_E
        self._qkv = Linear(weights.qkv_weight, weights.qkv_bias)
        self._o = Linear(weights.o_weight, weights.o_bias)
        self._gate_up = Linear(weights.gate_up_weight, weights.gate_up_bias)
        self._down = Linear(weights.down_weight, weights.down_bias)
        self.linears = [self._qkv, self._o, self._gate_up, self._down]

    def forward(
        self,
        index: int,
        residual_TE: Tensor,
        delta_TE: Tensor | None,
        cos_TD: Tensor,
        sin_TD: Tensor,
        attention: AttentionBackend,
        batch: AttentionBatch,
    ) -> Tensor:
        """Adds the previous layer's ``delta`` to the residual in place and returns this layer's MLP output."""
        if delta_TE is None:
            x_TE = self._ops.rms_norm(residual_TE, self._attn_norm_E, self._eps)
        else:
            x_TE = self._ops.add_rms_norm(residual_TE, delta_TE, self._attn_norm_E, self._eps)
        attn_TE = self._o(self._attend(index, self._qkv(x_TE), cos_TD, sin_TD, attention, batch))
        self._collectives.all_reduce_(attn_TE)
        x_TE = self._ops.add_rms_norm(residual_TE, attn_TE, self._mlp_norm_E, self._eps)
        mlp_TE = self._down(self._ops.silu_mul(self._gate_up(x_TE)))
        self._collectives.all_reduce_(mlp_TE)
        return mlp_TE

    def _attend(
        self,
        index: int,
        qkv_TX: Tensor,
        cos_TD: Tensor,
        sin_TD: Tensor,
        attention: AttentionBackend,
        batch: AttentionBatch,
    ) -> Tensor:
        heads, kv_heads = self._num_heads, self._num_kv_heads
        qkv_TXD = qkv_TX.view(-1, heads + 2 * kv_heads, self._head_dim)
        self._ops.rope_(qkv_TXD, heads + kv_heads, cos_TD, sin_TD)
        attention.write(index, qkv_TXD[:, heads : heads + kv_heads], qkv_TXD[:, heads + kv_heads :], batch)
        return attention.attend(index, qkv_TXD[:, :heads], batch).reshape(-1, heads * self._head_dim)


def _rope_tables(config: ModelConfig, max_model_len: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, ``[max_model_len, D/2]``, computed in float32 and kept in the model's dtype."""
    inv_freq_D = torch.from_numpy(rope_inv_freq(config.rope, config.head_dim))
    angles_LD = torch.arange(max_model_len, dtype=torch.float32)[:, None] * inv_freq_D[None, :]
    return angles_LD.cos().to(like), angles_LD.sin().to(like)
