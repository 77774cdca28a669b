"""KV policies: what a token sees, which blocks that takes, and what a policy may say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.policy import DENSE, Reach, check_policy, resolve_policy
from tests.effort import examples

REACHES = st.one_of(
    st.just(DENSE),
    st.builds(Reach, st.just(0), st.integers(1, 40)),
    st.builds(Reach, st.integers(1, 20), st.integers(1, 40)),
)


def seen(reach: Reach, position: int) -> set[int]:
    """By definition."""
    if reach.window is None:
        return set(range(position + 1))
    return {key for key in range(position + 1) if key < reach.sinks or key > position - reach.window}


@examples(100)
@given(reach=REACHES, position=st.integers(0, 100))
def test_a_token_sees_the_sinks_and_all_from_its_first_key(reach: Reach, position: int) -> None:
    first = reach.first_key(position)
    assert seen(reach, position) == {*range(min(reach.sinks, first)), *range(first, position + 1)}
    assert (first == 0) == (reach.span is None or position < reach.span)


@examples(100)
@given(reach=REACHES, num_blocks=st.integers(0, 8), block_size=st.sampled_from([1, 4, 16]))
def test_whoever_goes_on_needs_the_blocks_that_it_sees(reach: Reach, num_blocks: int, block_size: int) -> None:
    computed = num_blocks * block_size
    keys = set().union(*(seen(reach, position) for position in range(computed, computed + 80)))
    expected = sorted({key // block_size for key in keys if key < computed})
    assert reach.needed_blocks(num_blocks, block_size) == expected


@examples(100)
@given(
    reach=REACHES, block_size=st.sampled_from([1, 4, 16]), counts=st.lists(st.integers(1, 12), min_size=1, max_size=20)
)
def test_a_row_never_has_more_than_its_most_blocks(reach: Reach, block_size: int, counts: list[int]) -> None:
    """Blocks are given back when a step is done, and the next one has been sent by then."""
    steps = [0, *counts]
    starts = [sum(steps[: i + 1]) for i in range(len(steps))]
    for before, stop in zip([0, *starts], starts[1:], strict=False):
        held = {key // block_size for position in range(before, stop) for key in seen(reach, position)}
        in_flight = stop - before
        assert len(held) <= reach.most_blocks(block_size, starts[-1], in_flight)


@pytest.mark.parametrize(
    ("text", "reaches", "groups"),
    [
        ("dense", [DENSE], [[0, 0], [0, 0], [0, 0]]),
        ("window:7", [Reach(0, 7)], [[0, 0], [0, 0], [0, 0]]),
        ("sinks:4,12", [Reach(4, 12)], [[0, 0], [0, 0], [0, 0]]),
        ("dense@0,2;sinks:4,12@*", [DENSE, Reach(4, 12)], [[0, 0], [1, 1], [0, 0]]),
        ("window:9@1.1;dense", [DENSE, Reach(0, 9)], [[0, 0], [0, 1], [0, 0]]),
        ("window:9@0-1;window:3@1-2", [Reach(0, 9), Reach(0, 3)], [[0, 0], [0, 0], [1, 1]]),
        (" dense @ 0 - 1 ; dense", [DENSE], [[0, 0], [0, 0], [0, 0]]),
    ],
)
def test_the_first_part_that_names_a_head_decides(text: str, reaches: list[Reach], groups: list[list[int]]) -> None:
    check_policy(text)
    policy = resolve_policy(text, 3, 2)
    assert (list(policy.reaches), [list(row) for row in policy.groups_LK]) == (reaches, groups)
    assert resolve_policy(policy.text, 3, 2) == policy
    assert policy.plain == (reaches == [DENSE]) and policy.bounded == (DENSE not in reaches)


@examples(100)
@given(data=st.data(), shape=st.tuples(st.integers(1, 4), st.integers(1, 3)))
def test_a_policy_is_its_text(data: st.DataObject, shape: tuple[int, int]) -> None:
    """One reach with sinks, for heads of one layer may have no others."""
    reach = st.sampled_from([DENSE, Reach(0, 3), Reach(0, 8), Reach(4, 8)])
    parts = [f"{data.draw(reach)}@{layer}.{head}" for layer in range(shape[0]) for head in range(shape[1])]
    policy = resolve_policy(";".join(parts), *shape)
    assert resolve_policy(policy.text, *shape) == policy
    for layer, row in enumerate(policy.groups_LK):
        sinks = {policy.reaches[group] for group in row if policy.reaches[group].sinks}
        assert policy.sinks_of_layer(layer) == next(iter(sinks), None)
    local = policy.heads(1, shape[1])
    assert local.reaches == policy.reaches and [row[1:] for row in policy.groups_LK] == list(local.groups_LK)


@pytest.mark.parametrize(
    "text",
    [
        *("", "full", "window", "window:0", "window:-1", "window:1.5", "sinks:4", "sinks:0,4", "sinks:4,0", "Dense"),
        *(
            "dense@",
            "dense@;window:3",
            "dense@a",
            "dense@1-",
            "dense@1.2.3",
            "dense@0-1.0",
            "window:12345678901",
            ";dense",
        ),
        *("sinks:4,1048573", "window:1048577", "window:999999999@0;dense"),
        *("dense@0x1", "dense@*.0", "window:4@@1"),
    ],
)
def test_what_is_no_policy_is_refused(text: str) -> None:
    with pytest.raises(InvalidValueError, match=r"^kv_policy="):
        check_policy(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("dense@0-3;window:4", "names layers 0 to 3; the model has layers 0 to 2"),
        ("dense@2-1;window:4", "names layers 2 to 1"),
        ("dense@1.2;window:4", "names KV head 2 of layer 1; the model has KV heads 0 to 1"),
        ("dense@0;window:4@1", "says nothing of KV head 0 of layer 2"),
        ("sinks:4,8@0.0;sinks:2,8@*", "heads of layer 0 have different sinks"),
        ("sinks:4,8@0.0;sinks:4,9@*", "heads of layer 0 have different sinks"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(text: str, why: str) -> None:
    with pytest.raises(InvalidValueError, match=f"^kv_policy=.*{why}"):
        resolve_policy(text, 3, 2)


def test_a_model_sees_no_more_than_it_was_trained_with() -> None:
    policy = resolve_policy("dense@0-1;sinks:4,50", 4, 1, [None, 20, 100, 30])
    assert [policy.reaches[row[0]] for row in policy.groups_LK] == [DENSE, Reach(0, 20), Reach(4, 50), Reach(4, 30)]


def test_groups_with_a_window_leave_memory_to_those_without() -> None:
    assert resolve_policy("sinks:4,60", 2, 1).caps(16, 8, 256) == (None,)
    assert resolve_policy("window:60@0;sinks:4,60", 2, 1).caps(16, 8, 256) == (None, None)
    dense, window = resolve_policy("dense@0;window:60", 2, 1).caps(16, 8, 256)
    assert dense is None and window is not None
    assert window >= 8 * Reach(0, 60).most_blocks(16, 10_000, 1) + 2 * 256 // 16


def test_the_text_of_some_heads_names_only_those() -> None:
    policy = resolve_policy("dense@0.0,1.0;window:8", 2, 2)
    assert (policy.heads(1, 2).text, policy.heads(1, 2).num_groups) == ("window:8@0-1", 2)
