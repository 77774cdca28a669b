"""One shard's forward pass against transformers' logits."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from headwise.workers import collectives
from headwise.workers.backends import BACKENDS
from headwise.workers.collectives import Collectives, Solo
from headwise.workers.kv.cache import KVCache
from headwise.workers.model.attention import AttentionBatch
from headwise.workers.model.checkpoint import load_shard
from headwise.workers.model.model import StepInput
from headwise.workers.model.model_config import load_model_config
from headwise.workers.model.partition import partition_model
from tests.checkpoints import SHAPES, reference_model

BLOCK_SIZE = 16


def logits_of_a_rank(
    directory: Path,
    token_ids: list[int],
    chunks: list[int],
    attention: str,
    threads: int = 1,
    tp: int = 1,
    peers: Collectives | None = None,
) -> torch.Tensor:
    """A rank's part of the logits of every token, computed in chunks of the given lengths."""
    config, peers = load_model_config(directory), peers or Solo()
    rank = peers.rank
    part = partition_model(config, tp)[rank]
    weights = load_shard(directory, config, part, torch.float32, torch.device("cpu"))
    backend = BACKENDS[attention]
    model = backend.model(config, part, weights, peers, 512, threads)
    cache = KVCache(
        num_layers=config.num_layers,
        num_blocks=40,
        num_kv_heads=part.heads.num_kv,
        block_size=BLOCK_SIZE,
        head_dim=config.head_dim,
        dtype=torch.float32,
        device=torch.device("cpu"),
        transposed_keys=bool(backend.attention.transposed_keys),
    )
    model.attach(cache)
    blocks_N = np.random.default_rng(rank).permutation(40)[: -(-len(token_ids) // BLOCK_SIZE)].astype(np.int32)
    tokens_RL = torch.zeros(2, len(token_ids), dtype=torch.int64)
    tokens_RL[1] = torch.tensor(token_ids)
    found, done = [], 0
    for chunk in chunks:
        positions_T = np.arange(done, done + chunk)
        step = StepInput(
            tokens_RL=tokens_RL,
            rows_T=np.ones(chunk, np.int64),
            positions_T=positions_T,
            slots_T=blocks_N[positions_T // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + positions_T % BLOCK_SIZE,
            logit_tokens_B=np.arange(chunk),
            attention=AttentionBatch(
                query_starts_B1=np.array([0, chunk], np.int32),
                context_lens_B=np.array([done + chunk], np.int32),
                block_tables_BN=blocks_N[None],
            ),
        )
        found.append(model.forward(step).clone())
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
            return logits_of_a_rank(directory, token_ids, [1, 30, 40, 1, 11], attention, 1, tp, peers)
        finally:
            peers.close()

    with ThreadPoolExecutor(tp) as ranks:
        found = torch.cat(list(ranks.map(rank_logits, range(tp))), dim=1)
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < 1e-4
