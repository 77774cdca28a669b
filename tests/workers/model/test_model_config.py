"""config.json is read as transformers reads it, or refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import GenerationConfig, LlamaConfig, MistralConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from headwise.workers.errors import CheckpointError, InvalidValueError, UnsupportedModelError
from headwise.workers.model.model_config import (
    MAX_JSON_BYTES,
    ModelConfig,
    RopeConfig,
    load_model_config,
    rope_inv_freq,
)

PLAIN: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 100,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 8}


def write(directory: Path, drop: str | None = None, **changes: Any) -> Path:
    values = {key: value for key, value in {**PLAIN, **changes}.items() if key != drop}
    (directory / "config.json").write_text(json.dumps(values))
    return directory


def test_what_transformers_writes(tmp_path: Path) -> None:
    LlamaConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=96,
        vocab_size=100,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        max_position_embeddings=4096,
        rope_parameters=LLAMA3,
        dtype="bfloat16",
        bos_token_id=7,
        eos_token_id=[8, 9],
    ).save_pretrained(tmp_path)
    assert load_model_config(tmp_path) == ModelConfig(
        hidden_size=64,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        intermediate_size=96,
        vocab_size=100,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        rope=RopeConfig("llama3", 500000.0, 8.0, 1.0, 4.0, 512),
        dtype="bfloat16",
        bos_token_id=7,
        eos_token_ids=(8, 9),
    )


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    config = load_model_config(write(tmp_path, drop="num_key_value_heads"))
    theirs = LlamaConfig.from_pretrained(tmp_path)
    assert (config.num_kv_heads, config.head_dim) == (theirs.num_key_value_heads, theirs.head_dim) == (4, 16)
    assert config.tie_word_embeddings is theirs.tie_word_embeddings is False
    assert config.rope == RopeConfig("default", theirs.rope_parameters["rope_theta"])
    assert config.dtype == "float32"


ROPES: list[dict[str, Any]] = [
    {},
    {"rope_theta": 250000.0},
    {"rope_theta": 250000.0, "rope_scaling": None},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000}},
    {"rope_theta": 20000.0, "rope_scaling": {"type": "linear", "factor": 3}},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}},
    {"rope_parameters": LLAMA3},
    {"rope_theta": 500000.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
    {"rope_parameters": {**LLAMA3, "factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 8.0}},
    {"rope_parameters": LLAMA3, "original_max_position_embeddings": 256},
    {"rope_parameters": {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}},
    {"rope_parameters": LLAMA3, "rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 30000.0},
]


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("rope", ROPES, ids=lambda r: json.dumps(r)[:60])
def test_inverse_frequencies_are_bit_for_bit_those_of_transformers(
    tmp_path: Path, rope: dict[str, Any], head_dim: int
) -> None:
    write(tmp_path, head_dim=head_dim, **rope)
    theirs = LlamaRotaryEmbedding(LlamaConfig.from_pretrained(tmp_path))
    config = load_model_config(tmp_path)
    ours = rope_inv_freq(config.rope, config.head_dim)
    assert theirs.attention_scaling == 1.0
    assert ours.dtype == np.float32
    assert ours.shape == (head_dim // 2,)
    np.testing.assert_array_equal(ours, theirs.inv_freq.numpy())


def test_generation_config_says_what_ends_a_sequence(tmp_path: Path) -> None:
    write(tmp_path, eos_token_id=2)
    GenerationConfig(eos_token_id=[5, 6, 5]).save_pretrained(tmp_path)
    assert load_model_config(tmp_path).eos_token_ids == (5, 6)
    GenerationConfig(bos_token_id=1).save_pretrained(tmp_path)
    assert load_model_config(tmp_path).eos_token_ids == (2,)


def test_no_end_of_sequence(tmp_path: Path) -> None:
    config = load_model_config(write(tmp_path, eos_token_id=None, bos_token_id=None))
    assert (config.eos_token_ids, config.bos_token_id) == ((), None)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"model_type": "mixtral"}, 'model_type="mixtral"'),
        ({"model_type": ["llama"]}, 'model_type=["llama"]'),
        ({"model_type": "mistral", "sliding_window": None}, 'architectures=["LlamaForCausalLM"]'),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures="),
        ({"hidden_act": "gelu"}, 'hidden_act="gelu"'),
        ({"architectures": ["MistralForCausalLM"]}, 'architectures=["MistralForCausalLM"]'),
        ({"sliding_window": 8, "max_window_layers": 1}, "max_window_layers=1"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types="),
        ({"layer_types": ["full_attention"]}, "for each of 2 layers"),
        ({"layer_types": "full_attention"}, "layer_types="),
        (MISTRAL | {"layer_types": ["full_attention", "sliding_attention"]}, '"sliding_attention" for each'),
        (MISTRAL | {"sliding_window": None, "layer_types": ["sliding_attention"] * 2}, '"full_attention" for each'),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config="),
        ({"pretraining_tp": 2}, "pretraining_tp=2"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map="),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"dtype": "float64"}, 'dtype="float64"'),
        ({"torch_dtype": "float8_e4m3fn"}, 'torch_dtype="float8_e4m3fn"'),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 'rope_type="yarn"'),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 'type="dynamic"'),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "mrope_section="),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention="),
    ],
)
def test_other_models_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], names: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        load_model_config(write(tmp_path, **changes))
    assert names in str(caught.value)
    assert "config.json" in str(caught.value)


def test_a_mistral_is_a_llama_with_windows(tmp_path: Path) -> None:
    plain = load_model_config(write(tmp_path))
    assert plain.sliding_windows == ()
    for window in (1, 8, 2047):
        config = load_model_config(write(tmp_path, **MISTRAL | {"sliding_window": window}))
        assert config == replace(plain, sliding_windows=(window, window))
    for window in (None, 2048, 32768):  # no token is further away than the model's length
        assert load_model_config(write(tmp_path, **MISTRAL | {"sliding_window": window})) == plain


def test_what_transformers_writes_of_a_mistral(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 96}
    MistralConfig(**sizes, architectures=["MistralForCausalLM"]).save_pretrained(tmp_path)
    config = load_model_config(tmp_path)
    assert (config.sliding_windows, config.num_kv_heads, config.head_dim) == ((4096, 4096), 8, 8)


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"sliding_window": 8}, (8, 8)),
        ({"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}, (8, None)),
        ({"sliding_window": 8, "layer_types": ["full_attention", "full_attention"]}, ()),
        ({"sliding_window": 8, "use_sliding_window": False, "max_window_layers": 1}, ()),
        ({"max_window_layers": 1}, ()),
        ({"sliding_window": None, "layer_types": ["full_attention", "full_attention"]}, ()),
    ],
)
def test_layers_may_have_windows(tmp_path: Path, changes: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert load_model_config(write(tmp_path, **changes)).sliding_windows == windows


def test_a_window_of_no_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match=r"^sliding_window=None: must be a number of tokens where layer_types"):
        load_model_config(write(tmp_path, layer_types=["full_attention", "sliding_attention"]))


@pytest.mark.parametrize("key", ["sliding_window", "num_key_value_heads"])
def test_of_a_mistral_no_key_is_made_up(tmp_path: Path, key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json lacks the key '{key}'.*Mistral"):
        load_model_config(write(tmp_path, drop=key, **MISTRAL))


@pytest.mark.parametrize(
    "key",
    [
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
    ],
)
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json lacks the key '{key}'"):
        load_model_config(write(tmp_path, drop=key))


@pytest.mark.parametrize("key", ["factor", "low_freq_factor", "high_freq_factor"])
def test_a_missing_rope_key_is_named(tmp_path: Path, key: str) -> None:
    rope = {k: v for k, v in LLAMA3.items() if k != key}
    with pytest.raises(CheckpointError, match=rf"config\.json \(rope_parameters\) lacks the key '{key}'"):
        load_model_config(write(tmp_path, rope_parameters=rope))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "64"),
        ("hidden_size", 64.0),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", True),
        ("num_attention_heads", -4),
        ("num_key_value_heads", 3),
        ("head_dim", 15),
        ("rms_norm_eps", "small"),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", float("inf")),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", 10**400),
        ("rope_theta", -1.0),
        ("rope_parameters", [1]),
        ("tie_word_embeddings", "yes"),
        ("attention_bias", 1),
        ("sliding_window", 0),
        ("sliding_window", "8"),
        ("use_sliding_window", 1),
        ("eos_token_id", 100),
        ("eos_token_id", [2, "3"]),
        ("bos_token_id", -1),
    ],
)
def test_an_ill_typed_value_is_named(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(InvalidValueError) as caught:
        load_model_config(write(tmp_path, **{key: value}))
    assert caught.value.field == key


def test_a_hidden_size_the_heads_do_not_divide_needs_a_head_dim(tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match="hidden_size=66: must be a multiple of num_attention_heads=4"):
        load_model_config(write(tmp_path, hidden_size=66))
    assert load_model_config(write(tmp_path, hidden_size=66, head_dim=8)).head_dim == 8


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "\xff", '{"a": ' * 100_000, " " * (MAX_JSON_BYTES + 1)])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model_config(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        load_model_config(tmp_path)
