"""The sampler does what a plain slow one does, for each row as if it were alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from headwise.workers.errors import InvalidValueError
from headwise.workers.plan import RowSampling, TokenLogprobs
from headwise.workers.sampling import sampler as module
from headwise.workers.sampling.best import greedy
from headwise.workers.sampling.philox import philox4x32, uniforms
from headwise.workers.sampling.sampler import Sampler
from headwise.workers.sampling.settings import GREEDY_TEMPERATURE
from tests.effort import examples
from tests.workers.sampling.sampling import ints, read, sample

Floats = NDArray[np.float64]


def process(logits: Floats, s: RowSampling, prompt: Sequence[int], generated: Sequence[int]) -> Floats:
    """One row's logits after bias, mask and penalties, token by token."""
    out = logits.copy()
    for token, bias in s.logit_bias:
        out[token] += bias
    if len(generated) < s.min_tokens:
        out[list(s.stop_token_ids)] = -math.inf
    for token in {*prompt, *generated}:
        out[token] = out[token] / s.repetition_penalty if out[token] > 0 else out[token] * s.repetition_penalty
    for token in set(generated):
        out[token] -= s.frequency_penalty * list(generated).count(token) + s.presence_penalty
    return out


def distribution(logits: Floats, s: RowSampling) -> Floats:
    """Probabilities after temperature, min_p, top_k and top_p, by sorting; equals of the last token survive too."""
    p = np.exp((logits - logits.max()) / s.temperature)
    p[p < s.min_p * p.max()] = 0
    if 0 < s.top_k < len(p):
        p[p < np.sort(p)[-s.top_k]] = 0
    p /= p.sum()
    if s.top_p < 1:
        ordered = np.sort(p)[::-1]
        size = int((np.cumsum(ordered) - ordered < s.top_p).sum())
        p[p < ordered[size - 1]] = 0
    return p / p.sum()


def allowed(logits: Floats, s: RowSampling, u: float) -> set[int]:
    """The tokens that are right, when boundaries are known to 1e-6 only."""
    tokens = set()
    for nudge in (-1e-6, 0.0, 1e-6):
        top_p = min(max(s.top_p + nudge, 1e-9), 1.0) if s.top_p < 1 else 1.0
        p = distribution(logits, replace(s, top_p=top_p, min_p=min(s.min_p * (1 + nudge), 1.0)))
        high = np.cumsum(p)
        tokens |= set(np.flatnonzero((p > 0) & (high - p <= u + 1e-6) & (high >= u - 1e-6)).tolist())
    return tokens


def sample_one(
    logits: Tensor | Floats | list[float],
    s: RowSampling,
    prompt: Sequence[int] = (),
    generated: Sequence[int] = (),
    position: int | None = None,
) -> tuple[int, bool, TokenLogprobs | None]:
    logits_1V = torch.as_tensor(np.asarray(logits), dtype=torch.float32)[None]
    sampler = Sampler(logits_1V.shape[1], 1, "cpu")
    sampler.admit(0, s, prompt, generated)
    at = len(prompt) + len(generated) if position is None else position
    sampled = read(sample(sampler, logits_1V, [0], [at], [len(generated)]), [0])
    return sampled.tokens[0], not sampled.failed, sampled.logprobs.get(0)


def uniform(seed: int, position: int) -> float:
    """The random number of one token."""
    [number] = uniforms(np.array([seed % 2**64], np.uint64), np.array([position], np.uint64))
    return float(number)


def mixed_rows(count: int, vocab_size: int) -> list[RowSampling]:
    """Every kind of row, again and again."""
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
        {"temperature": 1.0, "top_p": 0.8, "num_logprobs": 3},
        {"temperature": 1.3, "min_p": 0.05},
        {"repetition_penalty": 1.3, "num_logprobs": 0},
        {"temperature": 0.9, "frequency_penalty": 0.4, "presence_penalty": 0.3},
        {"temperature": 1.0, "logit_bias": ((1, 3.0), (vocab_size - 1, -4.0))},
        {"temperature": 1.0, "min_tokens": 9, "stop_token_ids": (0, 3)},
    ]
    return [RowSampling(**kinds[i % len(kinds)], seed=i) for i in range(count)]


def test_philox_gives_the_published_answers() -> None:
    # Random123's kat_vectors, philox4x32 with 10 rounds.
    ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    counters = np.array([(0, 0, 0, 0), (ones,) * 4, pi], np.uint64)
    keys = np.array([(0, 0), (ones,) * 2, (0xA4093822, 0x299F31D0)], np.uint64)
    c0, c1, c2, c3 = counters.T
    words = np.stack(philox4x32((c0, c1, c2, c3), (keys[:, 0], keys[:, 1])), axis=1)
    assert words.tolist() == [
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ]


def test_uniform_is_pinned() -> None:
    assert uniform(0, 0) == (0x6627E8D5E169C58D >> 11) / 2**53
    assert [uniform(0, 1), uniform(1, 0), uniform(2**64 - 1, 2**40)] == [
        0.9722412015223156,
        0.8902591729757107,
        0.27738243478917834,
    ]
    assert uniform(5, 3) != uniform(3, 5)


def test_a_seed_counts_modulo_2_to_the_64() -> None:
    logits = np.random.default_rng(2).normal(size=300)
    for seed in (5, -1):
        rows = (RowSampling(temperature=2.0, seed=seed + wrap) for wrap in (0, 2**64))
        first, second = (sample_one(logits, s)[0] for s in rows)
        assert first == second


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_uniform_is_in_its_range(seed: int, position: int) -> None:
    assert 0 <= uniform(seed, position) < 1


def test_uniform_fills_its_range_over_positions_and_over_seeds() -> None:
    many, same = np.arange(20_000, dtype=np.uint64), np.full(20_000, 7, np.uint64)
    for values in (uniforms(same, many), uniforms(many, same)):
        counts, _ = np.histogram(values, bins=100, range=(0, 1))
        assert ((counts - 200) ** 2 / 200).sum() < 149  # the 99.9% quantile at 99 degrees of freedom
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03


# Eighths and powers of two, so that float32 and float64 have the same ties.
eighths = st.integers(-64, 64).map(lambda i: i / 8)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[float], RowSampling, list[int], list[int]]:
    size = draw(st.integers(2, 24))
    token = st.integers(0, size - 1)
    logits = draw(st.lists(eighths, min_size=size, max_size=size))
    bias = draw(st.dictionaries(token, eighths, max_size=3))
    sampling = RowSampling(
        temperature=draw(st.sampled_from([0.0, 0.25, 0.7, 1.0, 4.0])),
        top_k=draw(st.sampled_from([0, 0, 1, 2, 5, 30])),
        top_p=draw(st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.1, 1e-8])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.01, 0.3, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.25, 2.0, 0.5])),
        presence_penalty=draw(st.sampled_from([0.0, 0.5, -1.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.25, -0.5])),
        logit_bias=tuple(bias.items()),
        min_tokens=draw(st.integers(0, 3)),
        stop_token_ids=tuple(draw(st.sets(token, max_size=size - 1))),
        seed=draw(st.integers(0, 1000)),
    )
    return logits, sampling, draw(st.lists(token, max_size=6)), draw(st.lists(token, max_size=6))


@examples(400)
@given(cases())
@example(([0.0, 0.0, 0.0], RowSampling(temperature=1.0, top_k=1, seed=1), [], []))
def test_any_row_is_what_the_slow_sampler_says(case: tuple[list[float], RowSampling, list[int], list[int]]) -> None:
    logits, s, prompt, generated = case
    token, finite, _ = sample_one(logits, s, prompt, generated)
    processed = process(np.array(logits), s, prompt, generated)
    assert finite
    if s.temperature == 0:
        assert token == int(processed.argmax())
    else:
        assert token in allowed(processed, s, uniform(s.seed, len(prompt) + len(generated)))


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("changes", [{}, {"top_p": 0.95}, {"top_k": 2000, "top_p": 0.9}, {"top_k": 50}, {"min_p": 0.1}])
def test_a_whole_vocabulary_is_what_the_slow_sampler_says(scale: float, changes: dict[str, Any]) -> None:
    logits = np.random.default_rng(1).normal(size=49_152).astype(np.float32) * scale
    for seed in range(8):
        s = RowSampling(temperature=1.0, seed=seed, **changes)
        token, _, _ = sample_one(logits, s)
        # Sums of 49,152 float32 exponentials differ by more than those of a few: neighbours are near enough.
        p = distribution(logits.astype(np.float64), s)
        high = np.cumsum(p)[token]
        assert high - p[token] - 1e-5 <= uniform(seed, 0) <= high + 1e-5
        assert p[token] > 0


def run_batch(
    logits_BV: Tensor, sampling: list[RowSampling], prompts: list[list[int]], generated: list[list[int]]
) -> tuple[list[int], list[bool], dict[int, TokenLogprobs]]:
    rows = list(range(len(sampling)))
    sampler = Sampler(logits_BV.shape[1], len(rows), "cpu")
    for row in rows:
        sampler.admit(row, sampling[row], prompts[row], generated[row])
    positions = [len(p) + len(g) for p, g in zip(prompts, generated, strict=True)]
    sampled = read(sample(sampler, logits_BV, rows, positions, [len(g) for g in generated]), rows)
    return sampled.tokens, [row not in sampled.failed for row in rows], sampled.logprobs


@pytest.mark.parametrize("chunk", [1, 5, 16])
@pytest.mark.parametrize("ties", [False, True])
def test_a_row_does_not_depend_on_its_batch(ties: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab_size, count = 3001, 16
    monkeypatch.setattr(module, "_CHUNK_LOGITS", chunk * vocab_size)
    generator = torch.Generator().manual_seed(3)
    logits_BV = torch.randn((count, vocab_size), generator=generator) * 2
    if ties:
        logits_BV = (logits_BV / 2).round()
    sampling = mixed_rows(count, vocab_size)
    prompts = [[i, 2 * i, 7] for i in range(count)]
    generated = [[5] * i for i in range(count)]
    before = logits_BV.clone()
    tokens, finite, logprobs = run_batch(logits_BV, sampling, prompts, generated)
    assert torch.equal(before, logits_BV)
    assert all(finite)
    for i in range(count):
        token, _, alone = sample_one(logits_BV[i], sampling[i], prompts[i], generated[i])
        assert tokens[i] == token
        assert logprobs.get(i) == alone


def test_which_of_equals_are_reported_does_not_depend_on_what_others_ask_for() -> None:
    logits_V = torch.randn(3001, generator=torch.Generator().manual_seed(5)).round()
    sampling = [RowSampling(num_logprobs=count) for count in (2, 20, 0, 1, 7)]
    none: list[list[int]] = [[]] * len(sampling)
    _, _, logprobs = run_batch(logits_V.expand(len(sampling), -1), sampling, none, none)
    for row, s in enumerate(sampling):
        assert logprobs[row] == sample_one(logits_V, s)[2]


def draw_many(logits: list[float], s: RowSampling, count: int) -> list[int]:
    """One token at each of ``count`` positions."""
    sampler = Sampler(len(logits), count, "cpu")
    for row in range(count):
        sampler.admit(row, s, [], [])
    logits_BV = torch.tensor(logits).expand(count, -1)
    return sample(sampler, logits_BV, range(count), range(count), [0] * count).tokens_B.tolist()


@pytest.mark.parametrize("changes", [{}, {"temperature": 2.0}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}])
def test_tokens_come_as_often_as_they_are_likely(changes: dict[str, Any]) -> None:
    logits = [0.3, -1.0, 2.0, 1.1, -0.2, 0.9, 1.7, -3.0]
    s = RowSampling(**{"temperature": 1.0, "seed": 42} | changes)
    expected = distribution(np.array(logits), s) * 20_000
    counts = np.bincount(draw_many(logits, s, 20_000), minlength=8)
    live = expected > 0
    assert (counts[~live] == 0).all()
    assert ((counts - expected)[live] ** 2 / expected[live]).sum() < 24.3  # the 99.9% quantile at 7 degrees of freedom


@pytest.mark.parametrize("changes", [{}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.95}, {"min_p": 0.05}])
def test_noise_in_the_logits_changes_next_to_nothing(changes: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(5)
    logits_BV = torch.randn((192, 4096), generator=generator) * 2
    noise_BV = torch.randn((192, 4096), generator=generator)
    sampling = [RowSampling(temperature=1.0, seed=i, **changes) for i in range(192)]
    nothing: list[list[int]] = [[]] * 192
    tokens, _, _ = run_batch(logits_BV, sampling, nothing, nothing)
    for size, at_most in ((1e-7, 1), (1e-6, 2)):
        noisy, _, _ = run_batch(logits_BV + size * noise_BV, sampling, nothing, nothing)
        assert sum(a != b for a, b in zip(tokens, noisy, strict=True)) <= at_most


def test_the_lowest_id_wins_a_tie() -> None:
    logits_BV = torch.zeros((3, 50_000))
    logits_BV[0, [40_000, 777, 49_999]] = 1.0
    logits_BV[1, 31:] = 2.0
    ids_B, finite_B = greedy(logits_BV)
    assert ids_B.tolist() == [777, 31, 0]
    assert finite_B.all()
    assert run_batch(logits_BV, [RowSampling()] * 3, [[]] * 3, [[]] * 3)[0] == [777, 31, 0]
    # A penalty on another token takes the long way to the same answer.
    assert sample_one(logits_BV[0], RowSampling(repetition_penalty=2.0), [5])[0] == 777


@pytest.mark.parametrize(
    "s",
    [
        *mixed_rows(9, 40),
        RowSampling(temperature=1.0, top_k=3, top_p=0.5),
        RowSampling(min_tokens=9, stop_token_ids=(0,)),
    ],
)
def test_a_row_that_is_not_finite_fails_alone(s: RowSampling) -> None:
    good = torch.linspace(-2, 2, 40)
    bad = [good.clone() for _ in range(5)]
    bad[0][7] = math.nan
    bad[1][7] = math.inf
    bad[2][:] = -math.inf
    bad[3][:] = math.nan
    bad[4][0] = math.nan  # may be a masked stop token
    s = replace(s, num_logprobs=2)
    logits_BV = torch.stack([good, bad[0], good, bad[1], bad[2], good, bad[3], bad[4]])
    empty: list[list[int]] = [[]] * 8
    tokens, finite, logprobs = run_batch(logits_BV, [s] * 8, empty, empty)
    assert finite == [True, False, True, False, False, True, False, False]
    assert {tokens[0], tokens[2], tokens[5]} == {sample_one(good, s)[0]}
    assert all(0 <= token < 40 for token in tokens)
    assert sorted(logprobs) == [0, 2, 5]


@pytest.mark.parametrize("changes", [{}, {"top_p": 0.9}, {"min_p": 0.5}])
def test_the_ends_of_the_range_hit_survivors(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    logits = [-math.inf, -90.0, 1.0, 0.9, -90.0, -math.inf]
    for u, token in ((0.0, 2), (1 - 2**-53, 3)):
        monkeypatch.setattr(module, "uniforms", lambda seeds_B, positions_B, u=u: np.full(len(seeds_B), u))
        assert sample_one(logits, RowSampling(temperature=1.0, **changes))[0] == token


def test_some_logits_of_minus_infinity_are_fine() -> None:
    logits = [-math.inf, 1.0, -math.inf, 1.0]
    assert set(draw_many(logits, RowSampling(temperature=1.0, top_k=3, top_p=0.99), 64)) == {1, 3}


def test_stop_tokens_wait_for_min_tokens() -> None:
    logits = [9.0, 8.0, 1.0, 0.0]
    s = RowSampling(min_tokens=2, stop_token_ids=(0, 1))
    assert [sample_one(logits, s, generated=[3] * n)[0] for n in range(4)] == [2, 2, 0, 0]
    drawn = replace(s, temperature=5.0)
    assert {sample_one(logits, replace(drawn, seed=i))[0] for i in range(64)} == {2, 3}
    assert not sample_one(logits, replace(s, stop_token_ids=(0, 1, 2, 3)))[1]


def test_logit_bias_forces_and_bans() -> None:
    logits = torch.randn(100, generator=torch.Generator().manual_seed(1)) * 3
    best = int(logits.argmax())
    for temperature in (0.0, 1.0):
        forced = RowSampling(temperature=temperature, logit_bias=((17, 100.0),))
        assert sample_one(logits, forced)[0] == 17
        banned = RowSampling(temperature=temperature, logit_bias=((best, -100.0),))
        assert best not in {sample_one(logits, replace(banned, seed=i))[0] for i in range(32)}


def test_extreme_temperatures() -> None:
    logits = [1.0, 1.001, 0.5, -80.0]
    cold = RowSampling(temperature=GREEDY_TEMPERATURE)
    assert set(draw_many(logits, cold, 200)) == {1}
    assert set(draw_many(logits, replace(cold, temperature=9e-6), 200)) == {1}
    assert set(draw_many([1e30, 2e30, 0.0], cold, 50)) == {1}
    hot = np.bincount(draw_many(logits, replace(cold, temperature=1e6), 4000), minlength=4)
    assert (abs(hot - 1000) < 150).all()
    # Below the threshold it is greedy in the order of ties too; at it, equal tokens are drawn.
    assert set(draw_many([2.0, 2.0], replace(cold, temperature=9e-6), 50)) == {0}
    assert set(draw_many([2.0, 2.0], cold, 50)) == {0, 1}


def test_cutting_to_one_token_is_greedy() -> None:
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(2))
    for changes in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        assert draw_many(logits.tolist(), RowSampling(temperature=3.0, **changes), 8) == [int(logits.argmax())] * 8


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = torch.randn(300, generator=torch.Generator().manual_seed(4)) * 2
    expected = logits.log_softmax(-1)
    order = logits.argsort(descending=True).tolist()
    s = RowSampling(temperature=0.0, logit_bias=((order[6], 100.0),), num_logprobs=20, repetition_penalty=2.0)
    token, _, reported = sample_one(logits, s, prompt=order[:3])
    assert reported is not None
    assert token == order[6]
    assert reported.rank == 7
    assert reported.chosen == pytest.approx(float(expected[token]), abs=1e-6)
    assert reported.top_ids == tuple(order[:20])
    assert reported.top == pytest.approx(expected[order[:20]].tolist(), abs=1e-6)
    none = sample_one(logits, replace(s, num_logprobs=0), prompt=order[:3])[2]
    assert none == replace(reported, top_ids=(), top=())
    assert sample_one(logits, replace(s, num_logprobs=-1))[2] is None
    few = sample_one([1.0, 2.0, 0.0], RowSampling(num_logprobs=20))[2]
    assert few is not None and few.top_ids == (1, 0, 2)


def test_penalties_see_the_same_tokens_whether_observed_or_admitted() -> None:
    generator = torch.Generator().manual_seed(6)
    s = RowSampling(temperature=0.8, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.2, seed=1)
    running, watching = Sampler(50, 2, "cpu"), Sampler(50, 2, "cpu")
    for sampler in (running, watching):
        sampler.admit(1, s, [3, 4], [])
        sampler.admit(0, RowSampling(), [3, 4], [])
    generated: list[int] = []
    for step in range(30):
        logits_BV = torch.randn((2, 50), generator=generator)
        args = ([0, 1], [2 + step] * 2, [step] * 2)
        result = sample(running, logits_BV, *args)
        assert torch.equal(result.tokens_B, sample(watching, logits_BV, *args).tokens_B)
        resumed = Sampler(50, 2, "cpu")
        resumed.admit(1, s, [3, 4], generated)
        assert int(sample(resumed, logits_BV[1:], [1], [2 + step], [step]).tokens_B[0]) == int(result.tokens_B[1])
        for sampler in (running, watching):
            sampler.observe(ints([0, 1]), result.tokens_B)
        generated.append(int(result.tokens_B[1]))
    assert len(set(generated)) < 30  # some token came twice, so counts mattered


def test_a_row_forgets_its_last_request() -> None:
    sampler = Sampler(4, 3, "cpu")
    logits_BV = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    heavy = RowSampling(repetition_penalty=100.0, logit_bias=((3, 2.0),), min_tokens=5, stop_token_ids=(1,))
    for row in (0, 1, 2):
        sampler.admit(row, heavy, [0], [0])
    assert [int(sample(sampler, logits_BV, [r], [2], [1]).tokens_B[0]) for r in (0, 1, 2)] == [3, 3, 3]
    sampler.drop(1)
    sampler.drop(1)
    sampler.admit(1, replace(heavy, logit_bias=(), min_tokens=0), [1], [])
    assert int(sample(sampler, logits_BV, [1], [1], [0]).tokens_B[0]) == 0
    sampler.admit(2, RowSampling(), [0], [])
    assert int(sample(sampler, logits_BV, [2], [1], [0]).tokens_B[0]) == 0
    assert int(sample(sampler, logits_BV, [0], [2], [1]).tokens_B[0]) == 3


def test_memory_is_held_only_for_rows_with_penalties() -> None:
    sampler = Sampler(1000, 64, "cpu")
    for row in range(64):
        sampler.admit(row, RowSampling(temperature=1.0), [1], [])
    assert sampler._penalties._counts_SV.numel() == 0
    for row in range(64):
        sampler.admit(row, RowSampling(presence_penalty=1.0), [1], [])
    assert sampler._penalties._counts_SV.shape == (64, 1000)


@pytest.mark.parametrize(
    ("changes", "plain"),
    [
        ({}, True),
        ({"temperature": 9e-6}, True),
        ({"top_k": 5, "top_p": 0.5, "min_p": 0.1, "seed": 3}, True),
        ({"stop_token_ids": (1,)}, True),
        ({"min_tokens": 3}, True),
        ({"temperature": 1e-5}, False),
        ({"num_logprobs": 0}, False),
        ({"logit_bias": ((1, 1.0),)}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"presence_penalty": 0.1}, False),
        ({"frequency_penalty": -0.1}, False),
        ({"min_tokens": 3, "stop_token_ids": (1,)}, False),
    ],
)
def test_which_rows_are_plain_greedy(changes: dict[str, Any], plain: bool) -> None:
    sampler = Sampler(10, 2, "cpu")
    sampler.admit(0, RowSampling(), [1], [])
    sampler.admit(1, RowSampling(**changes), [1], [])
    assert sampler.greedy_only(ints([0]), ints([0]))
    assert sampler.greedy_only(ints([0, 1]), ints([0, 2])) is plain


def test_a_row_is_plain_once_its_min_tokens_are_there() -> None:
    sampler = Sampler(10, 1, "cpu")
    sampler.admit(0, RowSampling(min_tokens=3, stop_token_ids=(1,)), [1], [])
    assert [sampler.greedy_only(ints([0]), ints([n])) for n in (2, 3, 4)] == [False, True, True]


@pytest.mark.parametrize(
    ("field", "changes", "prompt"),
    [
        ("logit_bias", {"logit_bias": ((10, 1.0),)}, []),
        ("stop_token_ids", {"stop_token_ids": (-1,)}, []),
        ("prompt_token_ids", {"presence_penalty": 1.0}, [3, 10]),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(field: str, changes: dict[str, Any], prompt: list[int]) -> None:
    with pytest.raises(InvalidValueError, match=r"\[0, 10\)") as caught:
        Sampler(10, 1, "cpu").admit(0, RowSampling(**changes), prompt, [])
    assert caught.value.field == field
    with pytest.raises(InvalidValueError, match="row=1"):
        Sampler(10, 1, "cpu").admit(1, RowSampling(), [], [])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_chooses_what_a_cpu_chooses() -> None:
    logits_BV = torch.randn((18, 49_152), generator=torch.Generator().manual_seed(8)) * 2
    sampling, chosen = mixed_rows(18, 49_152), []
    for device in ("cpu", "cuda"):
        sampler = Sampler(49_152, 18, device)
        for row, s in enumerate(sampling):
            sampler.admit(row, s, [1, 2], [3])
        result = sample(sampler, logits_BV.to(device), range(18), [3] * 18, [1] * 18)
        assert result.finite_B.all()
        chosen.append(result.tokens_B.tolist())
    assert chosen[0] == chosen[1]
