"""One shard's forward pass against transformers' logits."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from headwise.workers import collectives
from headwise.workers.attention import AttentionBatch, create_backend, transposed_keys
from headwise.workers.checkpoint import load_shard
from headwise.workers.collectives import Collectives
from headwise.workers.kv_cache import KVCache
from headwise.workers.linear import Linear
from headwise.workers.llama import Llama, StepInput
from headwise.workers.model_config import load_model_config
from headwise.workers.partition import partition_model
from tests.checkpoints import SHAPES, reference_model

BLOCK_SIZE = 16


def all_logits(
    directory: Path, token_ids: list[int], chunks: list[int], attention: str, tp: int, rank: int, peers: Collectives
) -> torch.Tensor:
    """A rank's part of the logits of every token, computed in chunks of the given lengths."""
    config = load_model_config(directory)
    part = partition_model(config, tp)[rank]
    weights = load_shard(directory, config, part, torch.float32, torch.device("cpu"))
    model = Llama(config, part, weights, peers, 512)
    cache = KVCache(
        num_layers=config.num_layers,
        num_blocks=40,
        num_kv_heads=part.heads.num_kv,
        block_size=BLOCK_SIZE,
        head_dim=config.head_dim,
        dtype=torch.float32,
        device=torch.device("cpu"),
        transposed_keys=transposed_keys(attention),
    )
    backend = create_backend(attention, cache, part.heads.q_starts, config.head_dim**-0.5, 1)
    blocks = torch.randperm(40, generator=torch.Generator().manual_seed(rank))[: -(-len(token_ids) // BLOCK_SIZE)]
    found, done = [], 0
    for chunk in chunks:
        positions = torch.arange(done, done + chunk)
        batch = AttentionBatch(
            query_starts_B1=torch.tensor([0, chunk], dtype=torch.int32),
            context_lens_B=torch.tensor([done + chunk], dtype=torch.int32),
            block_tables_BN=blocks.to(torch.int32).unsqueeze(0),
            slots_T=blocks[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE,
            max_query_len=chunk,
            max_context_len=done + chunk,
        )
        ids = torch.tensor(token_ids[done : done + chunk])
        found.append(model.forward(StepInput(ids, positions, torch.arange(chunk), batch), backend))
        done += chunk
    return torch.cat(found)


@pytest.mark.parametrize("attention", ["reference", "cpu"])
@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_logits_are_those_of_transformers(checkpoint: Callable[..., Path], shape: str, attention: str, tp: int) -> None:
    directory = checkpoint(shape)
    token_ids = torch.randint(3, 256, (83,), generator=torch.Generator().manual_seed(3)).tolist()
    with torch.inference_mode():
        expected = reference_model(directory)(torch.tensor([token_ids])).logits[0]
    rendezvous = collectives.open_rendezvous("solo" if tp == 1 else "shared_memory", tp)

    def rank_logits(rank: int) -> torch.Tensor:
        peers = collectives.connect(rendezvous, rank, tp, 60.0)
        try:
            return all_logits(directory, token_ids, [1, 30, 40, 1, 11], attention, tp, rank, peers)
        finally:
            peers.close()

    with ThreadPoolExecutor(tp) as ranks:
        found = torch.cat(list(ranks.map(rank_logits, range(tp))), dim=1)
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < 1e-4


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 300])
@pytest.mark.parametrize("biased", [True, False])
def test_a_packed_weight_computes_what_the_plain_one_does(rows: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(683, 96, generator=generator)
    bias = torch.randn(683, generator=generator) if biased else None
    x = torch.randn(rows, 96, generator=generator)
    expected = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(Linear(weight, bias)(x), expected, rtol=1e-5, atol=1e-4)
