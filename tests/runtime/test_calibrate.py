"""``headwise calibrate``: masses against transformers' attention weights, which heads are chosen, what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from headwise.runtime.calibrate import CHUNK_TOKENS, attention_mass, streaming_heads
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.policy import Reach, resolve_policy
from headwise.workers.model.checkpoint import model_fingerprint
from tests.byte_tokenizer import VOCAB, write_byte_tokenizer
from tests.checkpoints import reference_model, write_checkpoint
from tests.runtime.conftest import Run


@pytest.mark.parametrize("reach", [Reach(4, 20), Reach(0, 7)])
def test_mass_is_what_transformers_attends_outside(checkpoint: Callable[..., Path], reach: Reach) -> None:
    model, count = checkpoint("gqa"), CHUNK_TOKENS + 40
    token_ids = torch.randint(3, 256, (count,), generator=torch.Generator().manual_seed(1)).tolist()
    steps: list[int] = []
    mass = attention_mass(model, token_ids, reach, progress=steps.append)
    assert sum(steps) == count and len(steps) == 2
    oracle = reference_model(model)
    oracle.set_attn_implementation("eager")
    with torch.inference_mode():
        layers = oracle(torch.tensor([token_ids]), output_attentions=True).attentions
    outside_TC = torch.tensor(
        [[reach.sinks <= key <= query - (reach.window or 0) for key in range(count)] for query in range(count)]
    )
    seen = outside_TC.any(1)
    for row, weights_1HTC in zip(mass, layers, strict=True):
        lost_H = (weights_1HTC[0] * outside_TC).sum(-1)[:, seen].mean(1)
        assert row == pytest.approx(lost_H.view(4, 2).mean(1).tolist(), abs=1e-5)  # 8 query, 4 KV heads


def test_what_a_model_was_trained_not_to_see_has_no_mass(checkpoint: Callable[..., Path]) -> None:
    model = checkpoint("gqa", sliding_window=10, layer_types=["sliding_attention", "full_attention"])
    mass = attention_mass(model, [*range(3, 63)], Reach(0, 10))
    assert mass[0] == [0] * 4 and min(mass[1]) > 0


def test_a_text_that_is_all_inside_or_too_long_is_refused(checkpoint: Callable[..., Path]) -> None:
    for count in (24, 513):
        with pytest.raises(InvalidValueError, match="--tokens"):
            attention_mass(checkpoint("gqa"), [5] * count, Reach(4, 20))


def test_the_heads_with_the_least_mass_stream() -> None:
    mass = [[0.5, 0.1, 0.3], [0.1, 0.0, 0.9]]
    assert streaming_heads(mass, 0.0) == []
    assert streaming_heads(mass, 1 / 3) == [(0, 1), (1, 1)]
    assert streaming_heads(mass, 0.5) == [(0, 1), (1, 0), (1, 1)]
    assert len(streaming_heads(mass, 1.0)) == 6


@pytest.fixture
def readable(tmp_path: Path) -> Path:
    """A model that can read text."""
    write_byte_tokenizer(write_checkpoint(tmp_path / "model", vocab_size=VOCAB))
    return tmp_path / "model"


def test_calibrate(headwise: Run, readable: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text", tmp_path / "heads.json"
    text.write_text("A text is read from its first letter to its last. " * 3)
    flags = ["--text", str(text), "--sinks", "2", "--window", "30", "--tokens", "64", "--device", "cpu"]
    code, _, err = headwise("calibrate", str(readable), str(out), *flags)
    assert code == 0 and "calibrating" in err
    found = json.loads(out.read_text())
    assert found["kv_policy"] == "sinks:2,30" and found["tokens"] == 64 and found["share"] == 0.5
    assert found["model"] == model_fingerprint(readable)
    assert len(found["heads"]) == 2 and len(found["mass"]) == 2 and all(len(row) == 2 for row in found["mass"])
    places = ",".join(f"{layer}.{head}" for layer, head in found["heads"])
    assert resolve_policy(f"{found['kv_policy']}@{places};dense@*", 2, 2).num_groups == 2
    code, printed, _ = headwise("calibrate", str(readable), str(out), *flags, "--sinks", "0", "--share", "1", "--json")
    assert code == 0 and json.loads(printed) == {"out": str(out)} | json.loads(out.read_text())
    assert json.loads(printed)["kv_policy"] == "window:30" and len(json.loads(printed)["heads"]) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--tokens": "32"}, "--tokens=32: must be more than --sinks and --window together, 32"),
        ({"--tokens": "600"}, "at most the model's length, 512"),
        ({"--tokens": "400"}, "400 are needed"),
        ({"--text": "nowhere"}, "cannot be read"),
        ({"--share": "2"}, "share"),
        ({"--device": "gpu"}, "device='gpu'"),
    ],
)
def test_bad_flags(headwise: Run, readable: Path, tmp_path: Path, changes: dict[str, str], message: str) -> None:
    (tmp_path / "text").write_text("short " * 20)
    flags = {"--text": str(tmp_path / "text"), "--sinks": "2", "--window": "30", "--tokens": "64"} | changes
    arguments = [word for pair in flags.items() for word in pair]
    code, _, err = headwise("calibrate", str(readable), str(tmp_path / "heads.json"), *arguments)
    assert code == 2 and message in err and not (tmp_path / "heads.json").exists()


def test_where_nothing_can_be_written(headwise: Run, readable: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("some text " * 20)
    code, _, err = headwise(
        "calibrate", str(readable), str(tmp_path / "no" / "o.json"), "--text", str(tmp_path / "text")
    )
    assert code == 2 and "OUT" in err and "is not there" in err


@pytest.mark.parametrize(("name", "message"), [("", "is a folder"), ("text", "is the text itself")])
def test_what_is_not_to_be_overwritten(headwise: Run, readable: Path, tmp_path: Path, name: str, message: str) -> None:
    """It is said before the text is read."""
    (tmp_path / "text").write_text("some text " * 20)
    flags = ["--text", str(tmp_path / "text"), "--sinks", "2", "--window", "30", "--tokens", "64"]
    code, _, err = headwise("calibrate", str(readable), str(tmp_path / name), *flags)
    assert code == 2 and err.startswith("headwise: OUT=") and message in err
    assert (tmp_path / "text").read_text() == "some text " * 20


def test_a_model_without_a_tokenizer(headwise: Run, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("some text " * 20)
    flags = ["--text", str(tmp_path / "text"), "--window", "30", "--tokens", "64"]
    code, _, err = headwise("calibrate", str(checkpoint("gqa")), str(tmp_path / "o.json"), *flags)
    assert code == 2 and "has no tokenizer" in err
