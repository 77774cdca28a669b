"""A model's weights, random."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.workers.model.checkpoint import LayerWeights, ShardWeights
from headwise.workers.model.model_config import ModelConfig


def random_weights(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> ShardWeights:
    """Made on the device, so large that activations neither grow nor vanish."""
    torch.manual_seed(0)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns, dtype=dtype, device=device).normal_(0, columns**-0.5)

    def ones() -> Tensor:
        return torch.ones(hidden, dtype=dtype, device=device)

    hidden, heads, mlp = config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size
    keys = config.num_kv_heads * config.head_dim
    layers = [
        LayerWeights(
            attn_norm_E=ones(),
            qkv_weight=matrix(heads + 2 * keys, hidden),
            qkv_bias=None,
            o_weight=matrix(hidden, heads),
            o_bias=None,
            mlp_norm_E=ones(),
            gate_up_weight=matrix(2 * mlp, hidden),
            gate_up_bias=None,
            down_weight=matrix(hidden, mlp),
            down_bias=None,
        )
        for _ in range(config.num_layers)
    ]
    return ShardWeights(matrix(config.vocab_size, hidden), matrix(config.vocab_size, hidden), ones(), layers)
