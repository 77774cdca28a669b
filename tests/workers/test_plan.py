"""Step messages come out of the codec as they went in, are small, and junk is a ValueError."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.workers import plan as module
from headwise.workers.plan import (
    RowAdmit,
    RowSampling,
    StepOutput,
    StepPlan,
    TokenLogprobs,
    admit_bytes,
    decode_output,
    decode_plan,
    encode_output,
    encode_plan,
)
from tests.effort import examples

rows = st.integers(0, 2**16)
tokens = st.integers(0, 2**31 - 1)
counts = st.integers(0, 2**31)
floats = st.floats(allow_nan=False)

samplings = st.builds(
    RowSampling,
    temperature=floats,
    top_k=counts,
    top_p=floats,
    min_p=floats,
    repetition_penalty=floats,
    presence_penalty=floats,
    frequency_penalty=floats,
    logit_bias=st.lists(st.tuples(tokens, floats), max_size=4).map(tuple),
    num_logprobs=st.integers(-1, 20),
    min_tokens=counts,
    stop_token_ids=st.lists(tokens, max_size=4).map(tuple),
    seed=st.integers(0, 2**64 - 1),
    grammar=st.sampled_from(["", "é", "x" * 200]),
)
blocks = st.lists(st.integers(-1, 2**31), max_size=5)
admits = st.builds(
    RowAdmit,
    rows,
    st.lists(tokens, max_size=20),
    counts,
    counts,
    blocks,
    samplings,
    st.lists(blocks, max_size=2).map(tuple),
)
plans = st.builds(
    StepPlan,
    counts,
    st.lists(rows, max_size=5),
    st.lists(admits, max_size=3),
    st.lists(st.tuples(rows, counts), max_size=5),
    st.lists(st.tuples(rows, st.integers(1, 4)), max_size=8),
    counts,
    counts,
    st.lists(st.tuples(st.integers(1, 3), rows, counts), max_size=5),
)
logprobs = st.builds(
    TokenLogprobs, floats, counts, st.lists(tokens, max_size=3).map(tuple), st.lists(floats, max_size=3).map(tuple)
)
outputs = st.builds(
    StepOutput,
    counts,
    st.lists(st.tuples(rows, tokens), max_size=6),
    st.dictionaries(rows, logprobs, max_size=3),
    st.lists(st.tuples(rows, st.text(max_size=20)), max_size=3),
    st.lists(rows, max_size=3),
    floats,
)


@settings(deadline=None)
@given(plans)
def test_a_plan_comes_out_as_it_went_in(plan: StepPlan) -> None:
    decoded = decode_plan(encode_plan(plan))
    # One-token computes come first; within each kind the order stays.
    plan.computes.sort(key=lambda compute: compute[1] != 1)
    assert decoded == plan
    for admit in decoded.admits:
        hash(admit.sampling)


@settings(deadline=None)
@given(outputs)
def test_an_output_comes_out_as_it_went_in(output: StepOutput) -> None:
    decoded = decode_output(encode_output(output))
    assert decoded == output
    for reported in decoded.logprobs.values():
        hash(reported)


@settings(deadline=None)
@given(st.lists(admits, max_size=4))
def test_an_admission_takes_no_more_than_was_reckoned(admits: list[RowAdmit]) -> None:
    for admit in admits:
        for blocks in (admit.block_ids, *admit.other_block_ids):
            admit.token_ids.extend(blocks)  # never more blocks than tokens
    reckoned = sum(admit_bytes(len(a.token_ids), a.sampling, 1 + len(a.other_block_ids)) for a in admits)
    assert len(encode_plan(StepPlan(0, admits=admits))) <= reckoned + 64


def test_a_grammar_of_many_rows_is_sent_once() -> None:
    def size(num_rows: int, grammar: str) -> int:
        admits = [RowAdmit(row, [1], 1, 0, [row], RowSampling(grammar=grammar)) for row in range(num_rows)]
        return len(encode_plan(StepPlan(0, admits=admits)))

    grammar = "x" * 100_000
    assert size(64, grammar) - size(64, "") < 1.01 * len(grammar)


@pytest.mark.parametrize("num_rows", [1, 8, 32, 256])
def test_a_steady_decode_step_is_small(num_rows: int) -> None:
    """Late in a long run: large step and block numbers, and every row gets a block in the same step."""
    step, blocks = 2**40, range(1_000_000, 1_000_000 + num_rows)
    plan = StepPlan(step, appends=list(enumerate(blocks)), computes=[(row, 1) for row in range(num_rows)])
    assert len(encode_plan(plan)) < 16 * num_rows + 64
    output = StepOutput(step, tokens=[(row, 128_000 + row) for row in range(num_rows)], seconds=0.0123)
    assert len(encode_output(output)) < 16 * num_rows + 64


def test_an_oversize_message_is_refused_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = StepPlan(0, admits=[RowAdmit(0, list(range(1000)), 1000, 0, [0], RowSampling())])
    output = StepOutput(0, failed=[(0, "x" * 2000)])
    sent = encode_plan(plan), encode_output(output)
    monkeypatch.setattr(module, "MAX_MESSAGE_BYTES", 1000)
    with pytest.raises(ValueError, match="limit of 1000"):
        encode_plan(plan)
    with pytest.raises(ValueError, match="limit of 1000"):
        encode_output(output)
    with pytest.raises(ValueError, match="limit of 1000"):
        decode_plan(sent[0])
    with pytest.raises(ValueError, match="limit of 1000"):
        decode_output(sent[1])


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=13) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=40,
)


def assert_value_error_or_nothing(data: bytes) -> None:
    for decode in (decode_plan, decode_output):
        try:
            decode(data)  # type: ignore[operator]
        except ValueError:
            continue


@examples(300)
@given(st.binary(max_size=200))
def test_junk_bytes_raise_nothing_but_value_error(data: bytes) -> None:
    assert_value_error_or_nothing(data)


@examples(250)
@given(st.one_of(values, *(st.lists(values, min_size=n, max_size=n) for n in (6, 7))))
def test_foreign_messages_raise_nothing_but_value_error(message: Any) -> None:
    assert_value_error_or_nothing(msgpack.packb(message))


@examples(200)
@given(plans, st.data())
def test_a_cut_plan_is_refused(plan: StepPlan, data: st.DataObject) -> None:
    encoded = encode_plan(plan)
    with pytest.raises(ValueError):
        decode_plan(encoded[: data.draw(st.integers(0, len(encoded) - 1))])
    with pytest.raises(ValueError):
        decode_plan(encoded + b"\x00")


def test_a_message_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="array"):
        decode_plan(msgpack.packb({"step": 1}))
    with pytest.raises(ValueError):
        decode_plan(encode_output(StepOutput(3)))
    with pytest.raises(ValueError):
        decode_output(encode_plan(StepPlan(3)))
