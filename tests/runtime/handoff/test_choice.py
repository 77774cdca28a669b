"""Which prompts are handed over, and to whom."""

from __future__ import annotations

import pytest

from headwise.runtime.handoff.choice import MAX_FAILURES_S, PATIENCE, HandoffCost, Peer, Prompt

SIZE, MIXED = 16, 64
TOKEN_S = 0.01


def prompt(tokens: int = 320, cached: int = 0) -> Prompt:
    return Prompt(tokens, cached, [bytes([number]) for number in range(tokens // SIZE)], SIZE)


def peer(address: str = "a", queued: int = 0, token_s: float = TOKEN_S, holds: int = 0) -> Peer:
    return Peer(address, queued, token_s, {bytes([number]) for number in range(holds)})


def measured(min_tokens: int | None = None) -> HandoffCost:
    cost = HandoffCost(min_tokens, MIXED)
    cost.saw_prefill(100, 100 * TOKEN_S)
    return cost


@pytest.mark.parametrize(
    ("min_tokens", "tokens", "cached", "handed"),
    [
        (0, 15, 0, False),  # no full block
        (0, 16, 0, True),
        (0, 40, 16, True),
        (0, 40, 32, False),  # every full block is here
        (100, 99, 0, False),
        (100, 100, 0, True),
        (100, 131, 32, False),
        (100, 132, 32, True),
        (None, MIXED - 1, 0, False),
        (None, MIXED, 0, True),
        (None, MIXED + 31, 32, False),
    ],
)
def test_how_many_tokens_it_takes(min_tokens: int | None, tokens: int, cached: int, handed: bool) -> None:
    slow, fast = peer(token_s=1e6), peer(token_s=TOKEN_S / 2)
    chosen = measured(min_tokens).choose(prompt(tokens, cached), [fast if min_tokens is None else slow], 0, False)
    assert (chosen is not None) == handed


def test_without_a_peer_a_prompt_is_computed_here() -> None:
    assert measured(0).choose(prompt(), [], 0, False) is None


def test_a_prompt_goes_where_it_is_readable_first() -> None:
    cost = measured()
    idle, busy = peer(queued=0), peer(queued=1)
    assert cost.choose(prompt(), [idle], 0, False) is None  # as fast as here
    assert cost.choose(prompt(), [idle], 1, False) is idle
    assert cost.choose(prompt(), [busy], 1, False) is None
    assert cost.choose(prompt(320, cached=160), [idle], 0, False) is None  # it has to compute those too
    assert cost.choose(prompt(320, cached=160), [peer(holds=11)], 0, False) is not None


def test_while_streams_run_here_more_is_put_up_with() -> None:
    cost = measured()
    slow, slower = peer(token_s=TOKEN_S * (PATIENCE - 0.1)), peer(token_s=TOKEN_S * PATIENCE)
    assert cost.choose(prompt(), [slow], 0, False) is None
    assert cost.choose(prompt(), [slow], 0, True) is slow
    assert cost.choose(prompt(), [slower], 0, True) is None


def test_the_peer_with_the_earliest_finish_is_chosen() -> None:
    cost = measured(0)
    far, near = peer("far", queued=300), peer("near", queued=200)
    assert cost.choose(prompt(), [far, near], 0, False) is near
    assert cost.choose(prompt(), [peer("far", queued=300, holds=10), near], 0, False) == peer("far", 300, TOKEN_S, 10)
    cost.saw_handoff(prompt(), near, cost.remote_s(prompt(), near) + 10)
    assert cost.choose(prompt(), [far, near], 0, False) is far


def test_only_leading_blocks_count_as_held() -> None:
    digests = prompt().digests
    assert peer(holds=3).held(digests) == 3
    assert peer(holds=20).held(digests) == 20
    assert Peer("a", 0, TOKEN_S, set(digests[1:])).held(digests) == 0
    whole = Peer("a", 0, TOKEN_S, set(digests))
    assert measured().remote_s(prompt(), whole) == pytest.approx(TOKEN_S), "one token is computed all the same"


def test_what_was_never_measured_counts_as_nothing_and_so_gets_measured() -> None:
    cost = HandoffCost(None, MIXED)
    unknown = peer(token_s=0)
    assert cost.choose(prompt(), [unknown], 0, False) is unknown  # who has one means it to be used
    cost.saw_prefill(100, 100 * TOKEN_S)
    assert cost.choose(prompt(), [unknown], 0, False) is unknown


def test_the_overhead_is_a_running_mean_of_what_computing_does_not_explain() -> None:
    cost, fast = measured(), peer(token_s=TOKEN_S / 2)
    computing_s = cost.remote_s(prompt(), fast)
    assert computing_s == pytest.approx(320 * TOKEN_S / 2)
    cost.saw_handoff(prompt(), fast, computing_s + 1.0)
    assert cost.remote_s(prompt(), fast) == pytest.approx(computing_s + 1.0)
    cost.saw_handoff(prompt(), fast, computing_s + 2.0)
    assert cost.remote_s(prompt(), fast) == pytest.approx(computing_s + 1.3)
    cost.saw_handoff(prompt(), fast, 0.0)  # sooner than promised
    assert cost.stats() == pytest.approx({"overhead a": 1.3 * 0.7, "computed_token": TOKEN_S})
    assert cost.remote_s(prompt(), peer("b", token_s=TOKEN_S / 2)) == pytest.approx(computing_s)


def test_a_peer_that_is_passed_over_gets_another_chance() -> None:
    cost, fast = measured(), peer(token_s=TOKEN_S / 2)
    cost.saw_handoff(prompt(), fast, 320 * TOKEN_S * 2)
    tries = 0
    while cost.choose(prompt(), [fast], 0, False) is None:
        cost.pass_over([fast], None)
        tries += 1
        assert tries < 100
    assert tries > 10


def test_a_peer_is_not_passed_over_before_the_choice_is_acted_upon() -> None:
    """A prompt that waits for room is looked at in every step."""
    cost, slow, fast = measured(0), peer("slow"), peer("fast")
    cost.saw_handoff(prompt(), slow, 320 * TOKEN_S + 5)
    cost.saw_handoff(prompt(), fast, 320 * TOKEN_S + 1)
    assert all(cost.choose(prompt(), [slow, fast], 0, False) is fast for _ in range(1000))
    cost.pass_over([slow, fast], fast)
    assert cost.stats()["overhead slow"] == pytest.approx(5 * 0.98)


@pytest.mark.parametrize("streams", [False, True])
def test_a_peer_whose_handoffs_fail_is_not_chosen_for_a_while(streams: bool) -> None:
    """However soon they fail, and however busy this engine is with streams."""
    cost, fast = measured(), peer(token_s=TOKEN_S / 100)
    assert cost.choose(prompt(), [fast], 0, streams) is fast
    cost.saw_failure(prompt(), fast, 0.001)
    assert cost.choose(prompt(), [fast], 0, streams) is None
    other = peer("b", token_s=TOKEN_S)
    assert cost.choose(prompt(), [fast, other], 1, streams) is other


def test_failures_add_up_and_success_makes_up_for_them() -> None:
    cost, fast, slow = measured(0), peer("fast", token_s=0.0), peer("slow", token_s=0.1)
    tries = 0
    while cost.choose(prompt(32), [fast, slow], 0, False) is fast:
        cost.saw_failure(prompt(32), fast, 0.0)
        tries += 1
        assert tries < 10
    for _ in range(1000):
        cost.saw_failure(prompt(32), fast, 0.0)
    assert cost.remote_s(prompt(32), fast) == MAX_FAILURES_S
    for _ in range(10):
        cost.saw_handoff(prompt(32), fast, 0.0)
    assert cost.remote_s(prompt(32), fast) < 0.03 * MAX_FAILURES_S


def test_what_is_left_of_prompts_that_were_handed_over_does_not_tell_what_a_long_one_takes() -> None:
    """A step of few tokens takes long for each of them; nothing else is computed here once all is handed over."""
    cost, slower = measured(), peer(token_s=TOKEN_S * 2)
    for _ in range(100):
        cost.saw_prefill(SIZE, SIZE * 10 * TOKEN_S)
    assert cost.choose(prompt(), [slower], 0, False) is None


def test_this_engine_too_gets_another_chance() -> None:
    """Measured when it was cold, it would be slow for ever."""
    cost, other = HandoffCost(None, MIXED), peer(token_s=TOKEN_S)
    cost.saw_prefill(100, 100 * 5 * TOKEN_S)
    tries = 0
    while (chosen := cost.choose(prompt(), [other], 0, False)) is not None:
        cost.pass_over([other], chosen)
        tries += 1
        assert tries < 1000
    assert tries > 100
    cost.saw_prefill(100, 100 * 5 * TOKEN_S)
    assert cost.choose(prompt(), [other], 0, False) is other
