"""The Triton kernels of paged attention.

The softmax is the online one of FlashAttention (Dao et al., 2022); dividing a context and adding up its parts is
Flash-Decoding (Dao et al., 2023). Items, tiles, parts and slots are those of attention_plan.py.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, no-any-return, untyped-decorator"

import triton
import triton.language as tl

from headwise.workers.cuda.addresses import first_element

_FIELDS = tl.constexpr(8)  # of an item


@triton.jit
def attend(
    o,
    sums,
    q,
    keys,
    values,
    step,
    q_starts,
    num_sums,
    scale,
    q_token_stride,
    TILES: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Attends for items, programs taking them in turn, and leaves outputs, or sums where a tile has several parts.

    Args:
        o: [T, NUM_HEADS, HEAD_DIM], of the queries' dtype.
        sums: float32 [num_sums, HEAD_DIM] of unnormalized outputs, then the highest score and the sum of weights, each
            [num_sums]. There are ROWS of them for each slot and KV head.
        q: queries, q_token_stride elements from token to token, heads one after the other.
        keys, values: of the layer, [N, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM].
        step: int32, see step_pack.py. That it says where items and block tables are, and how many, and not an argument,
            lets a captured graph work on other steps.
        q_starts: int32 [NUM_KV_HEADS + 1], the first query head of each KV head.
        scale: of the scores, which are powers of 2.
        TILES: whose items, 0 for those of small tiles and 1 for those of large ones.
        GROUP: the most query heads of a KV head.
    """
    d = tl.arange(0, PADDED_DIM)
    sums_end = num_sums.to(tl.int64)
    tables, table_stride = step + tl.load(step + 4), tl.load(step + 5)
    num_works = tl.load(step + 2 * TILES) * NUM_KV_HEADS
    for work in range(tl.program_id(0), num_works, tl.num_programs(0)):
        item, kv_head, m, token, head, first_token, first_head, is_row = _tile(
            step, work, q_starts, TILES, NUM_KV_HEADS, GROUP, ROWS
        )
        row, first_position = tl.load(item), tl.load(item + 3)
        key_start, key_end, slot = tl.load(item + 4), tl.load(item + 5), tl.load(item + 6)
        q_offsets = (first_token + token).to(tl.int64) * q_token_stride + (first_head + head) * HEAD_DIM
        is_query = is_row[:, None] & (d < HEAD_DIM)[None, :]
        q_MD = tl.load(q + q_offsets[:, None] + d[None, :], mask=is_query, other=0.0)

        position_M = first_position + token
        highest_M = tl.full([ROWS], -float("inf"), tl.float32)
        total_M = tl.zeros([ROWS], tl.float32)
        o_MD = tl.zeros([ROWS, PADDED_DIM], tl.float32)
        layer = keys, values, tables + row.to(tl.int64) * table_stride, kv_head, key_end
        # Every query sees the keys before `seen`, so they need no mask.
        seen = tl.maximum(key_start, tl.minimum(key_end, first_position + 1) // KEYS * KEYS)
        for key in range(key_start, seen, KEYS):
            highest_M, total_M, o_MD = _attend_keys(
                q_MD, position_M, key, layer, highest_M, total_M, o_MD, scale, False,
                NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, KEYS, PADDED_DIM, INTERPRETED,
            )  # fmt: skip
        for key in range(seen, key_end, KEYS):
            highest_M, total_M, o_MD = _attend_keys(
                q_MD, position_M, key, layer, highest_M, total_M, o_MD, scale, True,
                NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, KEYS, PADDED_DIM, INTERPRETED,
            )  # fmt: skip

        if slot < 0:
            _store(o, o_MD / total_M[:, None], first_token + token, first_head + head, is_query, d, NUM_HEADS, HEAD_DIM)
        else:
            at_M = (slot.to(tl.int64) * NUM_KV_HEADS + kv_head) * ROWS + m
            tl.store(sums + at_M[:, None] * HEAD_DIM + d[None, :], o_MD, mask=is_query)
            tl.store(sums + sums_end * HEAD_DIM + at_M, highest_M, mask=is_row)
            tl.store(sums + sums_end * (HEAD_DIM + 1) + at_M, total_M, mask=is_row)


@triton.jit
def add_parts(
    o,
    sums,
    step,
    q_starts,
    num_sums,
    TILES: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    NUM_HEADS: tl.constexpr,
):
    """Makes the outputs of tiles with several parts of the sums that :func:`attend` left; arguments as there."""
    d = tl.arange(0, PADDED_DIM)
    sums_end = num_sums.to(tl.int64)
    num_works = tl.load(step + 2 * TILES) * NUM_KV_HEADS
    for work in range(tl.program_id(0), num_works, tl.num_programs(0)):
        item, kv_head, m, token, head, first_token, first_head, is_row = _tile(
            step, work, q_starts, TILES, NUM_KV_HEADS, GROUP, ROWS
        )
        key_start, slot, num_parts = tl.load(item + 4), tl.load(item + 6), tl.load(item + 7)
        # One item of each tile, its first, stands for all.
        if (slot >= 0) & (key_start == 0):
            is_query = is_row[:, None] & (d < HEAD_DIM)[None, :]
            highest_M = tl.full([ROWS], -float("inf"), tl.float32)
            total_M = tl.zeros([ROWS], tl.float32)
            o_MD = tl.zeros([ROWS, PADDED_DIM], tl.float32)
            for part in range(0, num_parts):
                at_M = ((slot + part).to(tl.int64) * NUM_KV_HEADS + kv_head) * ROWS + m
                # Each row sees a key of the first part, so `highest` is a number from there on.
                part_highest_M = tl.load(sums + sums_end * HEAD_DIM + at_M, mask=is_row, other=0.0)
                part_total_M = tl.load(sums + sums_end * (HEAD_DIM + 1) + at_M, mask=is_row, other=1.0)
                part_MD = tl.load(sums + at_M[:, None] * HEAD_DIM + d[None, :], mask=is_query, other=0.0)
                above_M = tl.maximum(highest_M, part_highest_M)
                keep_M, add_M = tl.exp2(highest_M - above_M), tl.exp2(part_highest_M - above_M)
                total_M = total_M * keep_M + part_total_M * add_M
                o_MD = o_MD * keep_M[:, None] + part_MD * add_M[:, None]
                highest_M = above_M
            _store(o, o_MD / total_M[:, None], first_token + token, first_head + head, is_query, d, NUM_HEADS, HEAD_DIM)


@triton.jit
def _tile(
    step,
    work,
    q_starts,
    TILES: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The item and the KV head of a work, and the query rows of its tile: their numbers, tokens and heads within it,
    the first token and head, and which of them there are."""
    item = step + tl.load(step + 2 * TILES + 1) + (work // NUM_KV_HEADS) * _FIELDS
    kv_head = work % NUM_KV_HEADS
    first_token, num_tokens = tl.load(item + 1), tl.load(item + 2)
    first_head = tl.load(q_starts + kv_head)
    num_heads = tl.load(q_starts + kv_head + 1) - first_head
    m = tl.arange(0, ROWS)
    token, head = m // GROUP, m % GROUP
    return item, kv_head, m, token, head, first_token, first_head, (token < num_tokens) & (head < num_heads)


@triton.jit
def _attend_keys(
    q_MD,
    position_M,
    key,
    layer,
    highest_M,
    total_M,
    o_MD,
    scale,
    MASKED: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Lets the query rows of a tile see KEYS keys from ``key`` on; returns their sums."""
    keys, values, table, kv_head, key_end = layer
    d = tl.arange(0, PADDED_DIM)
    key_C = key + tl.arange(0, KEYS)
    is_dim = d < HEAD_DIM
    if MASKED:
        is_key_C = key_C < key_end
        block_C = tl.load(table + key_C // BLOCK_SIZE, mask=is_key_C, other=0)
    else:
        is_key_C = key_C >= 0
        block_C = tl.load(table + key_C // BLOCK_SIZE)
    at_C = first_element(block_C, kv_head, key_C % BLOCK_SIZE, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    if MASKED or PADDED_DIM != HEAD_DIM:
        # What lies past the context may be anything, NaN too, which no weight of 0 takes away.
        k_DC = tl.load(keys + at_C[None, :] + d[:, None], mask=is_key_C[None, :] & is_dim[:, None], other=0.0)
        v_CD = tl.load(values + at_C[:, None] + d[None, :], mask=is_key_C[:, None] & is_dim[None, :], other=0.0)
    else:
        k_DC = tl.load(keys + at_C[None, :] + d[:, None])
        v_CD = tl.load(values + at_C[:, None] + d[None, :])
    scores_MC = _dot(q_MD, k_DC, INTERPRETED) * scale
    if MASKED:
        scores_MC = tl.where(is_key_C[None, :] & (key_C[None, :] <= position_M[:, None]), scores_MC, -float("inf"))
    above_M = tl.maximum(highest_M, tl.max(scores_MC, 1))
    # A row may have seen no key of this part so far; minus infinity less itself is no number.
    base_M = tl.where(above_M == -float("inf"), 0.0, above_M)
    weights_MC = tl.exp2(scores_MC - base_M[:, None])
    keep_M = tl.exp2(highest_M - base_M)
    total_M = total_M * keep_M + tl.sum(weights_MC, 1)
    o_MD = o_MD * keep_M[:, None] + _dot(weights_MC.to(v_CD.dtype), v_CD, INTERPRETED)
    return above_M, total_M, o_MD


@triton.jit
def _dot(a, b, INTERPRETED: tl.constexpr):
    """The product in float32. Tensor cores take float32 as three numbers of 10 bits each (tf32x3), so nothing is lost
    that float32 has. Triton's interpreter multiplies bfloat16 as if its bits were integers (triton#11585), so there all
    is float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _store(o, o_MD, token_M, head_M, is_query, d, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    at_M = (token_M.to(tl.int64) * NUM_HEADS + head_M) * HEAD_DIM
    tl.store(o + at_M[:, None] + d[None, :], o_MD.to(o.dtype.element_ty), mask=is_query)
