"""What is measured, and how large: on a GPU, and by --tiny."""

from __future__ import annotations

from dataclasses import dataclass

from headwise.workers.model.model_config import ModelConfig, RopeConfig

BLOCK_SIZE = 16


@dataclass(frozen=True)
class Sizes:
    """Attributes:
    model: its shape; the weights are random.
    dtype: of weights, activations and KV.
    decodes: (rows, tokens of context) of decode steps; most rows first, as an engine captures graphs.
    steps: decode steps that are timed.
    prefills: (tokens of a prompt, tokens of a step).
    attentions: (rows, tokens of context) of attention alone.
    peer: (rows, tokens of the prompt, tokens to generate) of transformers.
    compared: tokens of a prompt whose logits are compared with those of transformers.
    norms: (tokens, hidden size, MLP columns) of the small operations.
    shapes: of attention's numbers: (head_dim, query heads of a KV head), with `rows` each.
    rows: (tokens of the step, tokens of context).
    long_rows: likewise, for the first of `shapes` only.
    copied: KV blocks that are copied at once.
    ceiling: bytes of the copy, and rows and columns of the matrices, whose speed is the ceiling.
    repeats: of everything but decode steps.
    """

    model: ModelConfig
    dtype: str
    decodes: tuple[tuple[int, int], ...]
    steps: int
    prefills: tuple[tuple[int, int], ...]
    attentions: tuple[tuple[int, int], ...]
    peer: tuple[int, int, int]
    compared: int
    norms: tuple[tuple[int, int, int], ...]
    shapes: tuple[tuple[int, int], ...]
    rows: tuple[tuple[int, int], ...]
    long_rows: tuple[tuple[int, int], ...]
    copied: int
    ceiling: tuple[int, int]
    repeats: int


FULL = Sizes(
    model=ModelConfig(
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=14_336,
        vocab_size=128_256,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        rope=RopeConfig("llama3", 500_000.0, 8.0),
    ),
    dtype="bfloat16",
    decodes=tuple((rows, context) for context in (512, 4096, 32_768) for rows in (256, 64, 8, 1)),
    steps=48,
    prefills=((512, 512), (4096, 4096), (4096, 1024), (16_384, 4096)),
    attentions=tuple((rows, context) for context in (512, 4096, 32_768) for rows in (1, 8, 64)),
    peer=(8, 512, 64),
    compared=64,
    norms=((1, 4096, 14_336), (7, 576, 1536), (333, 4096, 14_336), (5, 4100, 1025)),
    shapes=((128, 4), (64, 3), (64, 8), (80, 1), (96, 4), (128, 1), (128, 16), (256, 2)),
    rows=((1, 1), (1, 16), (1, 511), (1, 513), (1, 2049), (5, 5), (20, 90), (130, 700)),
    long_rows=((1, 32_768), (1, 20_001), (1, 512), (1024, 5000)),
    copied=256,
    ceiling=(1 << 32, 8192),
    repeats=5,
)
"""The model is shaped like Llama 3.1 8B. Whatever does not fit the GPU's memory is left out, and that is said."""

TINY = Sizes(
    model=ModelConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        intermediate_size=48,
        vocab_size=96,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
    ),
    dtype="float32",
    decodes=((1, 20), (3, 20), (1, 520)),
    steps=2,
    prefills=((24, 16),),
    attentions=((1, 20), (2, 20)),
    peer=(2, 10, 4),
    compared=12,
    norms=((3, 64, 96), (2, 65, 40)),
    shapes=((16, 2), (24, 3)),
    rows=((1, 1), (1, 17), (5, 5), (20, 40)),
    long_rows=((1, 1100),),
    copied=4,
    ceiling=(1 << 20, 128),
    repeats=1,
)
"""So small that Triton's interpreter takes seconds."""
