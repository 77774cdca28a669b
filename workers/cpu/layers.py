"""The stages of a step on CPU cores, compiled into one function that every thread of a team runs.

A step is a list of *phases*, and between two of them the ranks of a group add up ``delta``:

    0               embed: delta = the tokens' embeddings (of the rows this rank owns), residual = 0
    1 + 2 l         the attention half of layer l: residual += delta; delta = attention(norm(residual))
    2 + 2 l         its MLP half: residual += delta; delta = mlp(norm(residual))
    1 + 2 L         head: logits of the tokens that are asked for

Addresses are bytes as int64. Rows of floats have widths rounded up to 16, the rest of them zeros.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np

from headwise.workers.cpu.attention_kernels import attend, write_token
from headwise.workers.cpu.linear import multiply
from headwise.workers.cpu.pointwise_simd import add_norm, copy, fill, turn
from headwise.workers.cpu.team import barrier, clear, join, lap
from headwise.workers.jit.kernel_cache import kernel
from headwise.workers.jit.native import load_int

PARTS = ("embed", "norm", "qkv", "rope_and_kv_write", "attention", "o", "gate_up", "down", "lm_head")
"""What the time of a step is divided into; ``Buffers.times`` has a counter of nanoseconds for each."""
_EMBED, _NORM, _QKV, _WRITE, _ATTENTION, _O, _GATE_UP, _DOWN, _LM_HEAD = range(9)

LAYER_WORDS = 8
_ATTN_NORM, _MLP_NORM, _QKV_AT, _O_AT, _GATE_UP_AT, _DOWN_AT, _KEYS, _VALUES = range(LAYER_WORDS)
"""A layer as the kernels see it: addresses of norm weights, packed linears and the layer's keys and values."""


class Shape(NamedTuple):
    """What holds for every step.

    Attributes:
        width: hidden size.  padded_width: of a row of residual, delta and x.
        qkv_width, attn_width, act_width, logit_width: of rows of qkv, attention's output, the MLP's inner
            activations and logits.
        vocab_start, vocab_stop: the rows of the embedding that this rank owns.
    """

    num_layers: int
    width: int
    padded_width: int
    heads: int
    kv_heads: int
    head_dim: int
    qkv_width: int
    attn_width: int
    act_width: int
    logit_width: int
    vocab_start: int
    vocab_stop: int


class Buffers(NamedTuple):
    """Addresses: what the model holds, then what a step works in, a row a token."""

    layers: int
    embed: int
    final_norm: int
    lm_head: int
    cos: int
    sin: int
    times: int
    residual: int
    delta: int
    x: int
    qkv: int
    attn: int
    act: int
    logits: int
    scratch: int
    scratch_bytes: int
    team: int


class Step(NamedTuple):
    """What holds for one step.

    Attributes:
        threads: most members of its team.
        tokens: rows of the buffers that it uses.
        eps: of the norms.  scale: of attention's scores, for powers of 2.
    """

    threads: int
    tokens: int
    eps: Any
    scale: Any


def _embed(team: Any, shape: Any, buffers: Any, token_ids: Any) -> None:
    row_bytes = 4 * shape.padded_width
    for t in range(team.member, len(token_ids), team.size):
        residual, delta = buffers.residual + t * row_bytes, buffers.delta + t * row_bytes
        # All of the delta: what pads it may hold a NaN of the step before, which would get into every sum.
        fill(residual, shape.padded_width, np.float32(0.0))
        fill(delta, shape.padded_width, np.float32(0.0))
        token = token_ids[t]
        if shape.vocab_start <= token < shape.vocab_stop:
            copy(buffers.embed + (token - shape.vocab_start) * 4 * shape.width, delta, shape.width)
    barrier(team)
    lap(team, buffers.times, _EMBED)


def _norm(team: Any, shape: Any, buffers: Any, rows: int, weight: int, eps: Any) -> None:
    """residual += delta; x = norm(residual)."""
    for t in range(rows * team.member // team.size, rows * (team.member + 1) // team.size):
        at = t * 4 * shape.padded_width
        vectors = shape.padded_width // 16
        add_norm(buffers.residual + at, buffers.delta + at, weight, vectors, shape.width, eps, buffers.x + at)
    barrier(team)
    lap(team, buffers.times, _NORM)


def _write(team: Any, shape: Any, buffers: Any, positions: Any, slots: Any, sizes: Any, layer: Any) -> None:
    """Turn queries and keys to their positions and put keys and values into the cache."""
    head_dim, heads, kv_heads = shape.head_dim, shape.heads, shape.kv_heads
    half, head_bytes, tokens = head_dim // 2, 4 * head_dim, len(slots)
    for t in range(tokens * team.member // team.size, tokens * (team.member + 1) // team.size):
        row = buffers.qkv + t * 4 * shape.qkv_width
        angles = positions[t] * 4 * half
        for head in range(heads + kv_heads):
            turn(row + head * head_bytes, buffers.cos + angles, buffers.sin + angles, half)
        key, value = row + heads * head_bytes, row + (heads + kv_heads) * head_bytes
        write_token(key, value, slots[t], sizes, layer, head_dim, head_dim)
    barrier(team)
    lap(team, buffers.times, _WRITE)


def _product(team: Any, buffers: Any, linear: int, x: int, rows: int, out: int, out_stride: int, part: int) -> None:
    multiply(linear, x, rows, out, out_stride, buffers.scratch + team.member * buffers.scratch_bytes, team)
    barrier(team)
    lap(team, buffers.times, part)


def _attention_half(
    team: Any, shape: Any, buffers: Any, step: Any, layer: int, positions: Any, slots: Any, arrays: Any, memory: Any
) -> None:
    kv = (load_int(layer, _KEYS), load_int(layer, _VALUES))
    q = (buffers.qkv, shape.qkv_width, shape.head_dim)
    norm(team, shape, buffers, step.tokens, load_int(layer, _ATTN_NORM), step.eps)
    qkv, o = load_int(layer, _QKV_AT), load_int(layer, _O_AT)
    product(team, buffers, qkv, buffers.x, step.tokens, buffers.qkv, shape.qkv_width, _QKV)
    write(team, shape, buffers, positions, slots, arrays[3], kv)
    attend(team, arrays, q, kv, step.scale, buffers.attn, memory)
    lap(team, buffers.times, _ATTENTION)
    product(team, buffers, o, buffers.attn, step.tokens, buffers.delta, shape.padded_width, _O)


def _mlp_half(team: Any, shape: Any, buffers: Any, step: Any, layer: int) -> None:
    norm(team, shape, buffers, step.tokens, load_int(layer, _MLP_NORM), step.eps)
    gate_up, down = load_int(layer, _GATE_UP_AT), load_int(layer, _DOWN_AT)
    product(team, buffers, gate_up, buffers.x, step.tokens, buffers.act, shape.act_width, _GATE_UP)
    product(team, buffers, down, buffers.act, step.tokens, buffers.delta, shape.padded_width, _DOWN)


def _head(team: Any, shape: Any, buffers: Any, step: Any, wanted: Any) -> None:
    """Only the rows that need logits go through the last norm and the vocabulary."""
    row_bytes, vectors = 4 * shape.padded_width, shape.padded_width // 16
    for b in range(len(wanted) * team.member // team.size, len(wanted) * (team.member + 1) // team.size):
        at, x = wanted[b] * row_bytes, buffers.x + b * row_bytes
        add_norm(buffers.residual + at, buffers.delta + at, buffers.final_norm, vectors, shape.width, step.eps, x)
    barrier(team)
    lap(team, buffers.times, _NORM)
    product(team, buffers, buffers.lm_head, buffers.x, len(wanted), buffers.logits, shape.logit_width, _LM_HEAD)


def _run_member(
    first: int,
    last: int,
    shape: Any,
    buffers: Any,
    step: Any,
    token_ids: Any,
    positions: Any,
    slots: Any,
    wanted: Any,
    arrays: Any,
    memory: Any,
) -> None:
    team = join(buffers.team, step.threads)
    if team.member < 0:
        return
    lap(team, buffers.times, -1)
    for phase in range(first, last):
        layer = buffers.layers + (phase - 1) // 2 * LAYER_WORDS * 8
        if phase == 0:
            embed(team, shape, buffers, token_ids)
        elif phase == 2 * shape.num_layers + 1:
            head(team, shape, buffers, step, wanted)
        elif phase % 2 == 1:
            attention_half(team, shape, buffers, step, layer, positions, slots, arrays, memory)
        else:
            mlp_half(team, shape, buffers, step, layer)


def _run_parallel(
    first: int,
    last: int,
    shape: Any,
    buffers: Any,
    step: Any,
    token_ids: Any,
    positions: Any,
    slots: Any,
    wanted: Any,
    arrays: Any,
    memory: Any,
) -> None:
    clear(buffers.team, step.threads)
    for _ in numba.prange(step.threads):
        run_member(first, last, shape, buffers, step, token_ids, positions, slots, wanted, arrays, memory)


embed = kernel(_embed)
norm = kernel(_norm)
write = kernel(_write)
product = kernel(_product)
attention_half = kernel(_attention_half)
mlp_half = kernel(_mlp_half)
head = kernel(_head)
run_member = kernel(_run_member)
run_parallel = kernel(_run_parallel, parallel=True)
