"""``headwise bench policies``: perplexities, errors of kv_dtypes, and what is printed and drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from headwise.runtime.bench import kv_errors, perplexity
from headwise.runtime.bench.kv_errors import NEW_TOKENS, PROMPT_TOKENS, divergences, pieces, regrets
from headwise.runtime.bench.perplexity import DECODED, Reading
from headwise.runtime.bench.policies import Load, check, shapes
from headwise.runtime.bench.scorer import ScoredModel
from headwise.workers.errors import InvalidValueError
from headwise.workers.model.model_config import load_model_config
from tests.byte_tokenizer import VOCAB, write_byte_tokenizer
from tests.checkpoints import write_checkpoint
from tests.policy_oracle import Oracle
from tests.runtime.conftest import Run

TOKENS = torch.randint(3, 256, (400,), generator=torch.Generator().manual_seed(1)).tolist()
LOAD = Load(("dense", "recompute:32"), 400, 4, 2, ("int8",), 2)


@pytest.fixture(scope="module")
def path(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("gqa")


@pytest.fixture(scope="module")
def model(path: Path) -> ScoredModel:
    return ScoredModel(path, threads=1)


def oracle_losses(logits_TV: torch.Tensor) -> list[float]:
    """Of all tokens but the first."""
    logprobs_TV = logits_TV[:-1].log_softmax(-1)
    return (-logprobs_TV[torch.arange(len(TOKENS) - 1), torch.tensor(TOKENS[1:])]).tolist()


def test_losses_times_and_memory_of_a_text(model: ScoredModel, path: Path) -> None:
    done: list[int] = []
    reading = perplexity.read(model, "dense", "float32", TOKENS, 150, done.append)
    losses = oracle_losses(Oracle(path).logits(TOKENS))
    assert [*reading.losses] == [*range(1, 400)] and sum(done) == 400
    assert [*reading.losses.values()] == pytest.approx(losses, rel=1e-3)
    assert reading.perplexity(range(400)) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-3)
    assert reading.perplexity(range(100, 200)) == pytest.approx(math.exp(sum(losses[99:199]) / 100), rel=1e-3)
    assert reading.perplexity([0]) is None
    assert [*reading.token_ms] == [150, 300] and done.count(1) == 2 * DECODED
    assert reading.bytes_per_token == 2 * 2 * 4 * 16 * 4 and reading.kv_bytes[400] == 400 * reading.bytes_per_token


def test_recomputed_losses(model: ScoredModel, path: Path) -> None:
    samples = [1, 20, 32, 33, 399]
    reading = perplexity.recompute(model, 32, "float32", TOKENS, samples, lambda _: None)
    losses = oracle_losses(Oracle(path).recomputed(TOKENS, 32))
    assert [*reading.losses.values()] == pytest.approx([losses[position - 1] for position in samples], rel=1e-3)
    assert reading.kv_bytes[399] == 32 * reading.bytes_per_token and reading.token_ms.keys() == set(samples)


def test_a_sample_is_told_by_its_difference_to_a_whole() -> None:
    whole = Reading({position: float(position % 7) for position in range(1, 100)})
    sample = Reading({position: position % 7 + 0.5 for position in (10, 20, 30)})
    mean = sum(whole.losses.values()) / 99
    assert sample.perplexity(range(100), whole) == pytest.approx(math.exp(mean + 0.5))
    assert sample.perplexity(range(40, 50), whole) is None
    assert sample.distance(whole) == 0 and whole.distance(sample) == math.inf


def test_narrow_keys_and_values_are_compared_with_float32(model: ScoredModel) -> None:
    done: list[int] = []
    kinds = ["float32", "int8", "int4"]
    errors = kv_errors.kv_errors(model, kinds, TOKENS, 2, done.append)
    assert sum(done) == kv_errors.work(3, 400, 2)
    exact, int8, int4 = (errors[kind].result() for kind in kinds)
    assert exact["kl_max"] == 0 and exact["agreement"] == exact["greedy_agreement"] == 1
    assert exact["greedy_same_prompts"] == exact["greedy_prompts"] == 2 and exact["greedy_same_tokens"] == NEW_TOKENS
    assert 0 < int8["kl_mean"] < int4["kl_mean"] and int8["kl_mean"] < 0.01
    assert int4["agreement"] <= int8["agreement"] <= 1 and int8["agreement"] > 0.9
    assert exact["regret_max"] == 0 and 0 < int4["regret_median"] <= int4["regret_max"]
    floats, codes = exact["bytes_per_token"], 2 * 2 * 4
    assert floats == codes * 16 * 4
    assert int8["bytes_per_token"] == codes * (16 + 4) and int4["bytes_per_token"] == codes * (8 + 4)


def test_divergence_is_that_of_kullback_and_leibler() -> None:
    exact_TV, other_TV = (torch.randn(5, 9).log_softmax(-1) for _ in range(2))
    expected = torch.nn.functional.kl_div(other_TV, exact_TV, log_target=True, reduction="none").sum(-1)
    assert divergences(exact_TV, other_TV) == pytest.approx(expected.tolist(), rel=1e-4)


def test_regret_is_what_the_other_choice_is_less_likely() -> None:
    exact_TV = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0], [-3.0, -1.5, -1.0]])
    other_TV = torch.tensor([[5.0, 4.0, 0.0], [4.0, 0.0, 5.0], [0.0, 5.0, 4.0]])
    assert regrets(exact_TV, other_TV) == [2.0, 0.5]


def test_pieces_are_from_all_over_the_text() -> None:
    found = pieces(TOKENS, 3)
    assert [len(piece) for piece in found] == [PROMPT_TOKENS] * 3
    assert found[0] == TOKENS[:PROMPT_TOKENS] and found[-1] == TOKENS[-PROMPT_TOKENS:]
    assert pieces(TOKENS, 1) == found[:1] and pieces(TOKENS, 0) == []


def test_stretches_and_samples() -> None:
    assert LOAD.bounds == [(0, 100), (100, 200), (200, 300), (300, 400)]
    assert LOAD.sampled == [25, 75, 125, 175, 225, 275, 325, 375]


@pytest.mark.parametrize(("shape", "names"), [("gqa", ["MHA", "GQA", "MQA"]), ("mha", ["MHA", "MQA"])])
def test_bytes_by_shape(checkpoint: Callable[..., Path], shape: str, names: list[str]) -> None:
    config = load_model_config(checkpoint(shape))
    found = shapes(config, ["float32", "int8"])
    assert [one["shape"] for one in found] == names
    assert [one["kv_heads"] for one in found if one["of_this_model"]] == [config.num_kv_heads]
    assert found[0]["bytes_per_token"] == {"float32": 2 * 2 * 16 * 4 * config.num_heads, "int8": 80 * config.num_heads}


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (Load(("window:0",), 400, 4, 2, (), 0), "kv_policy"),
        (Load(("recompute:600",), 400, 4, 2, (), 0), "more tokens at once than the model can, 512"),
        (Load(("dense",), 400, 4, 2, ("int2",), 0), "kv_dtype"),
        (Load(("dense",), 400, 50, 2, (), 0), "stretches of 8 tokens"),
        (Load((), 400, 4, 2, (), 0), "--policies"),
        (Load(("dense",), 63, 1, 2, ("int8",), 1), r"--prompts=1: takes 64 tokens of the text .* of --tokens 63"),
    ],
)
def test_bad_loads(path: Path, load: Load, message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        check(load, load_model_config(path))


@pytest.fixture
def readable(tmp_path: Path) -> Path:
    """A model that can read text."""
    write_byte_tokenizer(write_checkpoint(tmp_path / "model", vocab_size=VOCAB, max_position_embeddings=256))
    return tmp_path / "model"


def test_what_is_printed_and_drawn(headwise: Run, readable: Path, tmp_path: Path) -> None:
    text, plot = tmp_path / "text", tmp_path / "out.png"
    text.write_text("A text is read from its first letter to its last. " * 8)
    policies = ["dense", "window:64", "sinks:4,60", "recompute:64"]
    command = ("bench", "policies", "--text", str(text), "--model", str(readable), "--device", "cpu")
    flags = ["--policies", " ".join(policies), "--tokens", "300", "--stretches", "3", "--samples", "2"]
    flags += ["--kv-dtypes", "float32,int8", "--prompts", "1", "--threads", "1"]
    code, out, _ = headwise(*command, *flags, "--json", "--plot", str(plot))
    *results, closing = map(json.loads, out.splitlines())
    assert code == 0 and closing["benchmark"] == "policies" and closing["settings"]["text"] == "text"
    assert [one["policy"] for one in results[:4]] == policies
    dense, window, sinks, again = results[:4]
    assert dense["read_tokens"] == 255 and window["read_tokens"] == sinks["read_tokens"] == 299
    assert again["read_tokens"] == 6 and again["control"] in ("window:64", "sinks:4,60")
    assert [bounds[:2] for bounds in sinks["stretches"]] == [[0, 100], [100, 200], [200, 300]]
    assert dense["stretches"][2][2] is not None and window["sample"] == 5
    assert sinks["most_kv_bytes"] < dense["most_kv_bytes"] == 256 * dense["bytes_per_token"]
    assert [one["kv_dtype"] for one in results[4:6]] == ["float32", "int8"]
    assert [one["shape"] for one in results[6:]] == ["MHA", "GQA", "MQA"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    code, out, _ = headwise(*command, *flags)
    assert code == 0 and all(word in out for word in (*policies, "of the sample", "int8", "MQA", "100 to 199"))


def test_only_policies(headwise: Run, readable: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("A text is read from its first letter to its last. " * 8)
    flags = [
        "--policies",
        "recompute:16",
        "--tokens",
        "64",
        "--stretches",
        "2",
        "--samples",
        "1",
        "--kv-dtypes",
        "none",
    ]
    command = ("bench", "policies", "--text", str(text), "--model", str(readable), "--device", "cpu", *flags)
    code, out, _ = headwise(*command)
    assert code == 0 and "recompute:16" in out and "float32" in out
    code, out, _ = headwise(*command, "--json")
    [reading] = [json.loads(line) for line in out.splitlines()][:1]
    assert code == 0 and reading["control"] is None and reading["sample"] == reading["read_tokens"] == 2


def test_streaming_heads_are_one_more_policy(headwise: Run, readable: Path, tmp_path: Path) -> None:
    text, heads = tmp_path / "text", tmp_path / "heads.json"
    text.write_text("A text is read from its first letter to its last. " * 8)
    heads.write_text(json.dumps({"kv_policy": "sinks:2,20", "heads": [[0, 1], [1, 0]]}))
    flags = ["--policies", "dense", "--streaming-heads", str(heads), "--tokens", "64", "--stretches", "2"]
    flags += ["--kv-dtypes", "none", "--threads", "1", "--device", "cpu", "--json"]
    code, out, _ = headwise("bench", "policies", "--text", str(text), "--model", str(readable), *flags)
    dense, mixed, *_ = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and mixed["policy"] == "dense@0.0,1.1;sinks:2,20@0.1,1.0"
    assert mixed["most_kv_bytes"] <= dense["most_kv_bytes"] and mixed["perplexity"] != dense["perplexity"]


def test_a_policy_that_ends_within_a_stretch_has_no_time(headwise: Run, readable: Path, tmp_path: Path) -> None:
    """A stretch is longer than what the model can read densely."""
    (tmp_path / "text").write_text("A text is read from its first letter to its last. " * 8)
    flags = ["--policies", "dense", "--tokens", "300", "--stretches", "1", "--kv-dtypes", "none", "--threads", "1"]
    command = ("bench", "policies", "--text", str(tmp_path / "text"), "--model", str(readable), "--device", "cpu")
    code, out, err = headwise(*command, *flags, "--plot", str(tmp_path / "out.png"))
    assert code == 0, err
    assert next(line for line in out.splitlines() if "dense" in line and "255" in line).rstrip(" │").endswith("-")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "gpu"], "device='gpu'"),
        (["--attention", "fast"], "attention='fast'"),
        (["--streaming-heads", "{heads}"], r"heads[1]=[9, 0] in it: the model has layers 0 to 1"),
    ],
)
def test_settings_that_no_engine_has(
    headwise: Run, readable: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    heads = tmp_path / "heads.json"
    heads.write_text(json.dumps({"kv_policy": "sinks:2,20", "heads": [[0, 1], [9, 0]]}))
    command = ("bench", "policies", "--text", str(tmp_path / "text"), "--model", str(readable))
    code, _, err = headwise(*command, *(flag.format(heads=heads) for flag in flags))
    assert code == 2 and message in err and "Traceback" not in err


def test_a_text_that_is_too_short(headwise: Run, readable: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("short")
    flags = ["--model", str(readable), "--policies", "dense"]
    code, _, err = headwise("bench", "policies", "--text", str(tmp_path / "text"), *flags)
    assert code == 2 and "--text" in err and "16384 are needed" in err
