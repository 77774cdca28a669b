"""SamplingParams takes what vLLM's users know, and refuses everything else by name."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.runtime import sampling_params as limits
from headwise.runtime.sampling_params import SamplingParams
from headwise.workers.errors import InvalidValueError
from headwise.workers.plan import RowSampling

NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
INTEGERS = ("n", "top_k", "logprobs", "max_tokens", "min_tokens", "seed")
FLAGS = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens")


def row(params: SamplingParams, **changes: Any) -> RowSampling:
    return params.row_sampling(**{"eos_token_ids": (2,), "default_seed": 7} | changes)


def test_defaults_are_those_of_vllm() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.0, 0.0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.logprobs, params.seed) == (16, 0, None, None)
    assert (params.stop, params.stop_token_ids, params.logit_bias) == ((), (), ())
    assert (params.ignore_eos, params.include_stop_str_in_output, params.skip_special_tokens) == (False, False, True)


def test_forms_that_mean_the_same_are_kept_alike() -> None:
    assert SamplingParams(stop="END") == SamplingParams(stop=["END"])
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)
    assert SamplingParams(seed=-1) == SamplingParams(seed=None)
    assert SamplingParams(temperature=1) == SamplingParams(temperature=1.0)
    assert SamplingParams(logit_bias={9: 1, 3: -1.5}).logit_bias == ((3, -1.5), (9, 1.0))
    assert SamplingParams(logit_bias={}, stop=[], stop_token_ids=[]) == SamplingParams()


@pytest.mark.parametrize(
    ("field", "low", "high", "step"),
    [
        ("n", 1, limits.MAX_N, 1),
        ("temperature", 0, limits.MAX_TEMPERATURE, 1e-6),
        ("top_p", 1e-9, 1, 1e-6),
        ("top_k", -1, limits.MAX_TOKENS, 1),
        ("min_p", 0, 1, 1e-6),
        ("repetition_penalty", limits.MIN_REPETITION_PENALTY, limits.MAX_REPETITION_PENALTY, 1e-6),
        ("presence_penalty", -2, 2, 1e-6),
        ("frequency_penalty", -2, 2, 1e-6),
        ("logprobs", 0, limits.MAX_LOGPROBS, 1),
        ("max_tokens", 1, limits.MAX_TOKENS, 1),
        ("seed", -(1 << 63), (1 << 63) - 1, 1),
    ],
)
def test_limits_are_inclusive_and_nothing_beyond_them_passes(field: str, low: float, high: float, step: float) -> None:
    for value in (low, high):
        SamplingParams(**{field: value})
    for value in (low - step, high + step):
        with pytest.raises(InvalidValueError, match=rf"{field}=.*in [\[(]") as caught:
            SamplingParams(**{field: value})
        assert caught.value.field == field
        assert caught.value.value == value


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), float("-inf"), pytest.param(10**5000, id="huge"), True, "1", None, [1.0]],
)
def test_a_number_that_is_none_is_refused(field: str, value: object) -> None:
    with pytest.raises(InvalidValueError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field


@pytest.mark.parametrize("field", INTEGERS)
@pytest.mark.parametrize("value", [True, False, 1.0, -1.0, "1", float("nan"), pytest.param(10**5000, id="huge"), [1]])
def test_an_integer_that_is_none_is_refused(field: str, value: object) -> None:
    with pytest.raises(InvalidValueError, match=r"must be (an int )?in") as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field


@pytest.mark.parametrize("field", FLAGS)
@pytest.mark.parametrize("value", [0, 1, None, "yes"])
def test_a_flag_is_true_or_false(field: str, value: object) -> None:
    with pytest.raises(InvalidValueError, match="True or False"):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("stop", "", "1 to 256 characters"),
        ("stop", ["ok", ""], "1 to 256 characters"),
        ("stop", "x" * 257, "not 257"),
        ("stop", ["x"] * 17, "at most 16"),
        ("stop", [1], "a string, not int"),
        ("stop", b"x", "not bytes"),
        ("stop", 5, "not int"),
        ("stop_token_ids", [-1], "in \\[0, "),
        ("stop_token_ids", [True], "not bool"),
        ("stop_token_ids", "12", "not str"),
        ("stop_token_ids", 12, "not int"),
        ("stop_token_ids", list(range(129)), "at most 128"),
        ("logit_bias", {"5": 1.0}, "not str"),
        ("logit_bias", {-1: 1.0}, "in \\[0, "),
        ("logit_bias", [(1, 1.0)], "not list"),
        ("logit_bias", dict.fromkeys(range(1025), 0.0), "at most 1024"),
        ("logit_bias[5]", {5: 100.5}, "in \\[-100, 100\\]"),
        ("logit_bias[5]", {5: float("nan")}, "in \\[-100, 100\\]"),
        ("logit_bias[5]", {5: "1"}, "not str"),
    ],
)
def test_lists_are_checked_and_their_limits_named(field: str, value: object, says: str) -> None:
    with pytest.raises(InvalidValueError, match=says) as caught:
        SamplingParams(**{field.partition("[")[0]: value})  # type: ignore[arg-type]
    assert caught.value.field == field


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidValueError, match=r"best_of=.*temperature.*max_tokens"):
        SamplingParams(best_of=2)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        SamplingParams(1)  # type: ignore[misc]


def test_min_tokens_is_at_most_max_tokens() -> None:
    assert SamplingParams(min_tokens=16).min_tokens == 16
    assert SamplingParams(min_tokens=500, max_tokens=None).max_tokens is None
    with pytest.raises(InvalidValueError, match=r"min_tokens=17.*max_tokens=16"):
        SamplingParams(min_tokens=17)


def test_it_is_immutable_hashable_and_survives_pickle() -> None:
    bias, stop = {5: 1.0}, ["a"]
    params = SamplingParams(logit_bias=bias, stop=stop, seed=3)
    bias[6], stop[0] = 2.0, "b"
    assert params == SamplingParams(logit_bias={5: 1.0}, stop="a", seed=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(params)) == copy.deepcopy(params) == params  # noqa: S301
    assert hash(params) == hash(params.clone())


def test_clone_changes_what_it_is_told_and_checks_it() -> None:
    params = SamplingParams(logit_bias={5: 1.0}, stop="a", stop_token_ids=[4], temperature=0.5)
    assert params.clone(n=3) == SamplingParams(n=3, logit_bias={5: 1.0}, stop="a", stop_token_ids=[4], temperature=0.5)
    assert params.clone(logit_bias=None).logit_bias == ()
    for change in ({"n": 0}, {"tempreature": 1}):
        with pytest.raises(InvalidValueError):
            params.clone(**change)


def test_check_holds_it_against_the_model() -> None:
    SamplingParams(logit_bias={99: 1}, stop_token_ids=[99], max_tokens=64).check(vocab_size=100, max_model_len=64)
    SamplingParams(max_tokens=None).check(vocab_size=100, max_model_len=64)
    for params, field in (
        (SamplingParams(logit_bias={100: 1.0}), "logit_bias"),
        (SamplingParams(stop_token_ids=[3, 100]), "stop_token_ids"),
        (SamplingParams(max_tokens=65), "max_tokens"),
        (SamplingParams(max_tokens=None, min_tokens=65), "min_tokens"),
    ):
        with pytest.raises(InvalidValueError) as caught:
            params.check(vocab_size=100, max_model_len=64)
        assert caught.value.field == field


def test_row_sampling_carries_every_field() -> None:
    params = SamplingParams(
        temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, repetition_penalty=1.2, presence_penalty=0.3,
        frequency_penalty=0.4, logit_bias={8: 1}, logprobs=0, min_tokens=2, stop_token_ids=[9, 1, 9], seed=5,
    )  # fmt: skip
    assert row(params) == RowSampling(
        temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, repetition_penalty=1.2, presence_penalty=0.3,
        frequency_penalty=0.4, logit_bias=((8, 1.0),), num_logprobs=0, min_tokens=2, stop_token_ids=(1, 2, 9), seed=5,
    )  # fmt: skip
    assert row(params.clone(ignore_eos=True)).stop_token_ids == (1, 9)
    assert row(SamplingParams()).num_logprobs == -1


def test_seeds_of_samples_are_pinned() -> None:
    seeded = SamplingParams(n=3, seed=5)
    assert [row(seeded, index=i).seed for i in range(3)] == [5, 2857855798702778734, 2906599674846763927]
    assert row(SamplingParams()).seed == 7
    assert row(SamplingParams(seed=-2)).seed == (1 << 64) - 2


@given(st.integers(-(1 << 63), (1 << 63) - 1), st.integers(0, 1 << 70))
def test_seeds_of_samples_differ_and_fit_the_wire(seed: int, default: int) -> None:
    params = SamplingParams(n=64, seed=seed)
    seeds = [row(params, default_seed=default, index=i).seed for i in range(64)]
    assert len(set(seeds)) == 64
    assert all(0 <= s < 1 << 64 for s in seeds)


def test_torch_is_not_imported() -> None:
    # The package's own __init__ may import more; the module itself must not.
    script = (
        "import sys, types, headwise\n"
        "package = types.ModuleType('headwise.runtime')\n"
        "package.__path__ = [p + '/runtime' for p in headwise.__path__]\n"
        "sys.modules['headwise.runtime'] = package\n"
        "import headwise.runtime.sampling_params\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
