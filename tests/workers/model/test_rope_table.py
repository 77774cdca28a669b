"""cos and sin of positions, in the table and beyond."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headwise.workers.kv.policy import resolve_policy
from headwise.workers.model.model import RopeTable
from headwise.workers.model.model_config import ModelConfig, rope_inv_freq

CONFIG = ModelConfig(
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=64,
    vocab_size=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
)
SINKS = resolve_policy("dense@0;sinks:4,56@*", 2, 2)


def test_the_dense_table_has_float32_angles() -> None:
    table = RopeTable(CONFIG, 2048)
    inv_freq_D = torch.from_numpy(rope_inv_freq(CONFIG.rope, 16))
    angles_LD = torch.arange(2048, dtype=torch.float32)[:, None] * inv_freq_D
    assert torch.equal(table.cos_LD, angles_LD.cos()) and torch.equal(table.sin_LD, angles_LD.sin())


@pytest.mark.parametrize(("max_model_len", "length"), [(40, 60), (100, 100)])
def test_the_table_holds_every_position_of_sinks(max_model_len: int, length: int) -> None:
    table = RopeTable(CONFIG, max_model_len, SINKS)
    assert len(table.cos_LD) == len(table.sin_LD) == length
    assert table.holds(np.arange(length)) and not table.holds(np.array([3, length]))


def test_positions_beyond_the_table_are_exact_and_change_no_others() -> None:
    table = RopeTable(CONFIG, 100, SINKS)
    positions_T = np.array([3, 99, 100, 50_000, 3_000_000, 7])
    angles_TD = positions_T[:, None] * rope_inv_freq(CONFIG.rope, 16).astype(np.float64)
    for found_TD, table_LD, exact in zip(
        table.rows(positions_T), (table.cos_LD, table.sin_LD), (np.cos, np.sin), strict=True
    ):
        assert np.abs(found_TD.numpy() - exact(angles_TD)).max() < 1e-7
        assert torch.equal(found_TD[[0, 1, 5]], table_LD[[3, 99, 7]])
