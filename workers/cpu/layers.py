"""The stages of a step on CPU cores, compiled into one function that every thread of a team runs.

A step is a list of *phases*, and between two of them the ranks of a group add up ``delta``:

    0               embed: delta = the tokens' embeddings (of the rows this rank owns), residual = 0
    1 + 2 l         the attention half of layer l: residual += delta; delta = attention(norm(residual))
    2 + 2 l         its MLP half: residual += delta; delta = mlp(norm(residual))
    1 + 2 L         head: logits of the tokens that are asked for

Addresses are bytes as int64. Rows of floats have widths rounded up to 16, the rest of them zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from headwise.workers.cpu.attention_kernels import Heads, Work, attend
from headwise.workers.cpu.attention_plan import Sizes
from headwise.workers.cpu.kv_records import LayerKV, write_token
from headwise.workers.cpu.linear import multiply
from headwise.workers.cpu.pointwise_simd import add_norm, copy, fill, turn
from headwise.workers.cpu.team import Team, clear, join, meet, record_lap
from headwise.workers.jit.kernel_cache import kernel
from headwise.workers.jit.native import load_int

PARTS = ("embed", "norm", "qkv", "rope_and_kv_write", "attention", "o", "gate_up", "down", "lm_head")
"""What the time of a step is divided into; ``Buffers.times`` has a counter of nanoseconds for each."""
_EMBED, _NORM, _QKV, _WRITE, _ATTENTION, _O, _GATE_UP, _DOWN, _LM_HEAD = range(9)

LAYER_WORDS = 9
_ATTN_NORM, _MLP_NORM, _QKV_AT, _O_AT, _GATE_UP_AT, _DOWN_AT, _PLANES, _KIND, _CAPPED = range(LAYER_WORDS)
"""A layer as the kernels see it: addresses of norm weights and packed linears; its LayerKV; and the position at which
queries see sinks apart from the window, -1 if there are none."""


class Shape(NamedTuple):
    """What holds for every step.

    Attributes:
        width: hidden size.  padded_width: of a row of residual, delta and x.
        qkv_width, attn_width, act_width, logit_width: of rows of qkv, attention's output, the MLP's inner
            activations and logits.
        sinks_width: of rows of q_sinks; 0 if no layer has sinks.
        vocab_start, vocab_stop: the rows of the embedding that this rank owns.
        eps: of the norms.
        threads: most members of the team.
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
    sinks_width: int
    vocab_start: int
    vocab_stop: int
    eps: np.float32
    threads: int


class Buffers(NamedTuple):
    """Addresses: what the model holds, then what a step works in, a row a token.

    cos and sin are the rotary embedding's rows of all positions in its table; q_sinks the queries that see sinks apart.
    """

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
    q_sinks: int
    attn: int
    act: int
    logits: int
    scratch: int
    team: int


class Step(NamedTuple):
    """The tokens of a step, see :class:`~headwise.workers.model.model.StepInput`.

    Attributes:
        cos_TD, sin_TD: [T, D/2], the rotary embedding's rows of their positions.
    """

    tokens_RL: NDArray[np.int64]
    rows_T: NDArray[np.int64]
    positions_T: NDArray[np.int64]
    slots_T: NDArray[np.int64]
    logit_tokens_B: NDArray[np.int64]
    cos_TD: NDArray[np.float32]
    sin_TD: NDArray[np.float32]


@kernel(parallel=True)
def run_phases_in_threads(
    first: int, last: int, shape: Shape, buffers: Buffers, step: Step, work: Work, sizes: Sizes
) -> None:
    clear(buffers.team, shape.threads)
    for _ in numba.prange(shape.threads):
        run_phases(first, last, shape, buffers, step, work, sizes)


@kernel
def run_phases(first: int, last: int, shape: Shape, buffers: Buffers, step: Step, work: Work, sizes: Sizes) -> None:
    """The phases [first, last) of a step, as one of a team."""
    team = join(buffers.team, shape.threads)
    if team.member < 0:
        return
    record_lap(team, buffers.times, -1)
    for phase in range(first, last):
        layer = buffers.layers + (phase - 1) // 2 * LAYER_WORDS * 8
        if phase == 0:
            embed(team, shape, buffers, step)
        elif phase == 2 * shape.num_layers + 1:
            compute_logits(team, shape, buffers, step)
        elif phase % 2 == 1:
            run_attention_half(team, shape, buffers, step, work, sizes, layer)
        else:
            run_mlp_half(team, shape, buffers, len(step.rows_T), layer)


@kernel
def embed(team: Team, shape: Shape, buffers: Buffers, step: Step) -> None:
    row_bytes = 4 * shape.padded_width
    for t in range(team.member, len(step.rows_T), team.size):
        residual, delta = buffers.residual + t * row_bytes, buffers.delta + t * row_bytes
        # All of the delta: what pads it may hold a NaN of the step before, which would get into every sum.
        fill(residual, shape.padded_width, np.float32(0.0))
        fill(delta, shape.padded_width, np.float32(0.0))
        token = step.tokens_RL[step.rows_T[t], step.positions_T[t] % step.tokens_RL.shape[1]]
        if shape.vocab_start <= token < shape.vocab_stop:
            copy(buffers.embed + (token - shape.vocab_start) * 4 * shape.width, delta, shape.width)
    end_stage(team, buffers, _EMBED)


@kernel
def run_attention_half(
    team: Team, shape: Shape, buffers: Buffers, step: Step, work: Work, sizes: Sizes, layer: int
) -> None:
    tokens = len(step.rows_T)
    kv = LayerKV(load_int(layer, _PLANES), load_int(layer, _KIND))
    q = Heads(buffers.qkv, shape.qkv_width, shape.head_dim)
    q_sinks = Heads(buffers.q_sinks, shape.sinks_width, shape.head_dim)
    attn = Heads(buffers.attn, shape.attn_width, shape.head_dim)
    qkv_linear, o_linear = load_int(layer, _QKV_AT), load_int(layer, _O_AT)
    add_and_norm(team, shape, buffers, tokens, load_int(layer, _ATTN_NORM))
    multiply_rows(team, buffers, qkv_linear, buffers.x, tokens, buffers.qkv, shape.qkv_width, _QKV)
    rotate_and_write(team, shape, buffers, step, sizes, kv, load_int(layer, _CAPPED))
    attend(team, work, sizes, q, q_sinks, kv, attn)
    record_lap(team, buffers.times, _ATTENTION)
    multiply_rows(team, buffers, o_linear, buffers.attn, tokens, buffers.delta, shape.padded_width, _O)


@kernel
def run_mlp_half(team: Team, shape: Shape, buffers: Buffers, tokens: int, layer: int) -> None:
    gate_up, down = load_int(layer, _GATE_UP_AT), load_int(layer, _DOWN_AT)
    add_and_norm(team, shape, buffers, tokens, load_int(layer, _MLP_NORM))
    multiply_rows(team, buffers, gate_up, buffers.x, tokens, buffers.act, shape.act_width, _GATE_UP)
    multiply_rows(team, buffers, down, buffers.act, tokens, buffers.delta, shape.padded_width, _DOWN)


@kernel
def compute_logits(team: Team, shape: Shape, buffers: Buffers, step: Step) -> None:
    """Only the rows that need logits go through the last norm and the vocabulary."""
    wanted = len(step.logit_tokens_B)
    row_bytes, vectors = 4 * shape.padded_width, shape.padded_width // 16
    for b in range(wanted * team.member // team.size, wanted * (team.member + 1) // team.size):
        at, x = step.logit_tokens_B[b] * row_bytes, buffers.x + b * row_bytes
        add_norm(buffers.residual + at, buffers.delta + at, buffers.final_norm, vectors, shape.width, shape.eps, x)
    end_stage(team, buffers, _NORM)
    multiply_rows(team, buffers, buffers.lm_head, buffers.x, wanted, buffers.logits, shape.logit_width, _LM_HEAD)


@kernel
def add_and_norm(team: Team, shape: Shape, buffers: Buffers, tokens: int, weight: int) -> None:
    """residual += delta; x = norm(residual)."""
    vectors = shape.padded_width // 16
    for t in range(tokens * team.member // team.size, tokens * (team.member + 1) // team.size):
        at = t * 4 * shape.padded_width
        add_norm(buffers.residual + at, buffers.delta + at, weight, vectors, shape.width, shape.eps, buffers.x + at)
    end_stage(team, buffers, _NORM)


@kernel
def rotate_and_write(
    team: Team, shape: Shape, buffers: Buffers, step: Step, sizes: Sizes, kv: LayerKV, capped: int
) -> None:
    """Turn queries and keys to their positions and put keys and values into the cache; where there is a capped
    position, turn copies of the queries to that."""
    head_dim, heads, kv_heads = shape.head_dim, shape.heads, shape.kv_heads
    half, head_bytes, tokens = head_dim // 2, 4 * head_dim, len(step.rows_T)
    for t in range(tokens * team.member // team.size, tokens * (team.member + 1) // team.size):
        row, angles = buffers.qkv + t * 4 * shape.qkv_width, t * 4 * half
        if capped >= 0:
            turn_copies(shape, row, buffers.q_sinks + t * 4 * shape.sinks_width, buffers, capped)
        for head in range(heads + kv_heads):
            turn(row + head * head_bytes, step.cos_TD.ctypes.data + angles, step.sin_TD.ctypes.data + angles, half)
        key, value = row + heads * head_bytes, row + (heads + kv_heads) * head_bytes
        write_token(key, value, head_dim, step.slots_T, t, tokens, sizes, kv)
    end_stage(team, buffers, _WRITE)


@kernel
def turn_copies(shape: Shape, queries: int, into: int, buffers: Buffers, position: int) -> None:
    """Copy a token's queries and turn the copies to a position in the table."""
    half = shape.head_dim // 2
    angles = position * 4 * half
    copy(queries, into, shape.heads * shape.head_dim)
    for head in range(shape.heads):
        turn(into + head * 4 * shape.head_dim, buffers.cos + angles, buffers.sin + angles, half)


@kernel
def multiply_rows(
    team: Team, buffers: Buffers, linear: int, x: int, rows: int, out: int, out_stride: int, part: int
) -> None:
    multiply(linear, x, rows, out, out_stride, buffers.scratch, team)
    end_stage(team, buffers, part)


@kernel
def end_stage(team: Team, buffers: Buffers, part: int) -> None:
    meet(team)
    record_lap(team, buffers.times, part)
