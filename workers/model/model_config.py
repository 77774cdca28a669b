"""What a Llama checkpoint's config.json says, checked: either this runtime computes exactly that, or it refuses.
A Mistral is a Llama whose tokens attend to a window.

The file is read without transformers, so that a shard knows its shapes before torch is needed and nothing in the
checkpoint chooses which code runs.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from headwise.workers.errors import CheckpointError, InvalidValueError, UnsupportedModelError

RopeType = Literal["default", "linear", "llama3"]
DTypeName = Literal["float32", "bfloat16", "float16"]

MAX_JSON_BYTES = 1 << 20
"""The largest config.json or generation_config.json that is read; real ones are about 1 KiB."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        type: "default"; "linear", every frequency divided by ``factor``; or "llama3", low frequencies divided by it.
        theta: the base.
        low_freq_factor, high_freq_factor, original_max_position_embeddings: "llama3" only; see :func:`rope_inv_freq`.
    """

    type: RopeType = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a Llama model.

    Attributes:
        num_kv_heads: divides num_heads.
        attention_bias, mlp_bias: whether the linears of that part have biases.
        dtype: of the weights, as the checkpoint says.
        sliding_windows: of each layer, how many tokens a token attends to, the last of them itself; None is all.
            Empty if no layer has a window.
        bos_token_id: None if the model has none.
        eos_token_ids: the tokens that end a sequence: generation_config.json's if it names any, else config.json's,
            which is the order transformers' ``generate`` goes by.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope: RopeConfig = RopeConfig()
    sliding_windows: tuple[int | None, ...] = ()
    dtype: DTypeName = "float32"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()


def load_model_config(directory: Path) -> ModelConfig:
    """Read and check ``config.json`` (and the end-of-sequence tokens of ``generation_config.json``).

    Raises:
        CheckpointError: the file is missing, not a JSON object, or lacks a key.
        InvalidValueError: a key has the wrong type or a value out of range.
        UnsupportedModelError: the file asks for something other than a plain Llama or Mistral.
    """
    fields = _read_fields(directory / "config.json")
    _refuse_unsupported(fields)
    heads = fields.positive_int("num_attention_heads")
    kv_heads = fields.positive_int("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.invalid("num_key_value_heads", f"must divide num_attention_heads={heads}")
    hidden = fields.positive_int("hidden_size")
    vocab, layers = fields.positive_int("vocab_size"), fields.positive_int("num_hidden_layers")
    return ModelConfig(
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_head_dim(fields, hidden, heads),
        intermediate_size=fields.positive_int("intermediate_size"),
        vocab_size=vocab,
        max_position_embeddings=fields.positive_int("max_position_embeddings"),
        rms_norm_eps=fields.positive_float("rms_norm_eps"),
        tie_word_embeddings=fields.boolean("tie_word_embeddings"),
        attention_bias=fields.boolean("attention_bias"),
        mlp_bias=fields.boolean("mlp_bias"),
        rope=_rope(fields),
        sliding_windows=_sliding_windows(fields, layers),
        dtype=_dtype(fields),
        bos_token_id=next(iter(fields.token_ids("bos_token_id", vocab)), None),
        eos_token_ids=_eos_token_ids(directory, fields, vocab),
    )


def rope_inv_freq(rope: RopeConfig, head_dim: int) -> npt.NDArray[np.float32]:
    """Radians a position for each pair of a head's dimensions: float32 ``[head_dim // 2]``, bit for bit transformers'.

    "default" is RoFormer (Su et al., 2021), "linear" position interpolation (Chen et al., 2023), "llama3" that of
    Llama 3.1: wavelengths above ``original_max_position_embeddings / low_freq_factor`` are stretched by ``factor``,
    those below ``original_max_position_embeddings / high_freq_factor`` kept, those between blended.
    """
    # numpy's float32 power differs from torch's in the last bit, which is 1e-3 rad at position 10,000.
    import torch

    freq = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.type == "linear":
        freq = freq / rope.factor
    elif rope.type == "llama3":
        length, low, high = rope.original_max_position_embeddings, rope.low_freq_factor, rope.high_freq_factor
        wavelength = 2 * math.pi / freq
        kept = (length / wavelength - low) / (high - low)
        blended = (1 - kept) * freq / rope.factor + kept * freq
        freq = torch.where(wavelength > length / low, freq / rope.factor, freq)
        between = (wavelength >= length / high) & (wavelength <= length / low)
        freq = torch.where(between, blended, freq)
    return cast("npt.NDArray[np.float32]", freq.numpy())


class _Fields:
    """The keys of one JSON object, read with their types checked; errors name the key and the file."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values, self.source = values, source

    def get(self, key: str, default: Any = None) -> Any:
        """The value; ``default`` if it is missing or null."""
        value = self.values.get(key)
        return default if value is None else value

    def invalid(self, key: str, limit: str) -> InvalidValueError:
        return InvalidValueError(key, self.values.get(key), limit, f"correct {self.source}")

    def unsupported(self, key: str, supported: str) -> UnsupportedModelError:
        shown = json.dumps(self.values.get(key))
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        return UnsupportedModelError(f"{self.source}: {key}={shown} is not supported; only {supported} is")

    def positive_int(self, key: str, default: int | None = None) -> int:
        value = self._required(key, default)
        if type(value) is not int or value < 1:
            raise self.invalid(key, "must be an integer of at least 1")
        return value

    def positive_float(self, key: str, default: float | None = None) -> float:
        value = self._required(key, default)
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            raise self.invalid(key, "must be a finite number above 0")
        return float(value)

    def boolean(self, key: str) -> bool:
        value = self.get(key, False)
        if type(value) is not bool:
            raise self.invalid(key, "must be true or false")
        return value

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """One token id or a list of them; empty if the key is missing or null."""
        value = self.get(key, [])
        ids = value if isinstance(value, list) else [value]
        if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
            raise self.invalid(key, f"must be token ids from 0 to {vocab_size - 1}")
        return tuple(dict.fromkeys(ids))

    def _required(self, key: str, default: Any) -> Any:
        value = self.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.source} lacks the key {key!r}; it must be there to load a Llama model")
        return value


def _read_fields(path: Path) -> _Fields:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); name a Hugging Face model directory"
        ) from None
    if len(data) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_JSON_BYTES} bytes; it is no model configuration")
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); copy the checkpoint again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a JSON {type(values).__name__}, not an object; copy the checkpoint again")
    return _Fields(values, str(path))


_REFUSED_UNLESS: dict[str, tuple[Any, str]] = {
    "hidden_act": ("silu", '"silu"'),
    "pretraining_tp": (1, "1"),
    "partial_rotary_factor": (1, "1"),
    "quantization_config": (None, "an unquantized checkpoint (no such key)"),
    "compression_config": (None, "an unquantized checkpoint (no such key)"),
    "auto_map": (None, "a model without code of its own (no such key)"),
    "is_encoder_decoder": (False, "false"),
    "add_cross_attention": (False, "false"),
}
"""Keys that change what is computed: the one value (besides absence) that this runtime computes, and how to say it."""


_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
"""By model_type."""

_FULL, _SLIDING = "full_attention", "sliding_attention"
"""A layer's kind, in layer_types."""


def _refuse_unsupported(fields: _Fields) -> None:
    kind = fields.get("model_type")
    if kind is None:
        raise CheckpointError(f"{fields.source} lacks the key 'model_type'; only 'llama' and 'mistral' are supported")
    architecture = _ARCHITECTURES.get(kind) if isinstance(kind, str) else None
    if architecture is None:
        raise fields.unsupported("model_type", '"llama" or "mistral"')
    if fields.get("architectures", [architecture]) != [architecture]:
        raise fields.unsupported("architectures", f'["{architecture}"]')
    for key, (neutral, supported) in _REFUSED_UNLESS.items():
        if fields.get(key, neutral) != neutral:
            raise fields.unsupported(key, supported)
    # Where a Mistral has no such key, transformers takes a number that is not in the file.
    for key in ("sliding_window", "num_key_value_heads") if kind == "mistral" else ():
        if key not in fields.values:
            raise CheckpointError(f"{fields.source} lacks the key {key!r}; it must be there to load a Mistral model")


def _sliding_windows(fields: _Fields, num_layers: int) -> tuple[int | None, ...]:
    window = None if fields.get("sliding_window") is None else fields.positive_int("sliding_window")
    if fields.get("use_sliding_window") is not None and not fields.boolean("use_sliding_window"):
        window = None
    default = _FULL if window is None else _SLIDING
    if window is not None and fields.get("layer_types") is None and fields.get("max_window_layers") is not None:
        raise fields.unsupported("max_window_layers", "a window in all layers, or layer_types,")
    kinds = fields.get("layer_types", [default] * num_layers)
    known = (_FULL, _SLIDING) if fields.get("model_type") == "llama" else (default,)
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in known for kind in kinds):
        shown = " or ".join(f'"{kind}"' for kind in known)
        raise fields.unsupported("layer_types", f"{shown} for each of {num_layers} layers")
    if window is None and _SLIDING in kinds:
        raise fields.invalid("sliding_window", f'must be a number of tokens where layer_types has "{_SLIDING}"')
    # A window that holds every position of the model leaves nothing out.
    if window is None or window >= fields.positive_int("max_position_embeddings") or _SLIDING not in kinds:
        return ()
    return tuple(window if kind == _SLIDING else None for kind in kinds)


def _head_dim(fields: _Fields, hidden: int, heads: int) -> int:
    if fields.get("head_dim") is None and hidden % heads:
        raise fields.invalid(
            "hidden_size", f"must be a multiple of num_attention_heads={heads} if head_dim is not given"
        )
    head_dim = fields.positive_int("head_dim", hidden // heads)
    if head_dim % 2:
        raise InvalidValueError("head_dim", head_dim, "must be even, rotary embeddings turn pairs of dimensions")
    return head_dim


def _dtype(fields: _Fields) -> DTypeName:
    key = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    name = fields.get(key, "float32")
    if name not in ("float32", "bfloat16", "float16"):
        raise fields.unsupported(key, '"float32", "bfloat16" or "float16"')
    return cast(DTypeName, name)


_ROPE_KEYS = {
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
}


def _rope(fields: _Fields) -> RopeConfig:
    """``rope_parameters`` as transformers 5 writes it, or ``rope_scaling`` and ``rope_theta`` as older ones did."""
    # transformers lets rope_scaling win over rope_parameters, and a theta inside either over one beside it.
    key = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    values = fields.get(key, {})
    if not isinstance(values, dict):
        raise fields.invalid(key, "must be an object")
    rope = _Fields(values, f"{fields.source} ({key})")
    for unknown in values.keys() - _ROPE_KEYS:
        raise rope.unsupported(unknown, f"a rotary embedding with the keys {', '.join(sorted(_ROPE_KEYS))}")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise rope.unsupported("partial_rotary_factor", "1")
    theta = rope.positive_float("rope_theta", fields.positive_float("rope_theta", 10_000.0))
    type_key = "rope_type" if rope.get("rope_type") is not None else "type"
    kind = rope.get(type_key, "default")
    if kind == "default":
        return RopeConfig("default", theta)
    if kind == "linear":
        return RopeConfig("linear", theta, rope.positive_float("factor"))
    if kind == "llama3":
        return _rope_llama3(fields, rope, theta)
    raise rope.unsupported(type_key, '"default", "linear" or "llama3"')


def _rope_llama3(fields: _Fields, rope: _Fields, theta: float) -> RopeConfig:
    outer = fields if fields.get("original_max_position_embeddings") is not None else rope
    low, high = rope.positive_float("low_freq_factor"), rope.positive_float("high_freq_factor")
    if low >= high:
        raise rope.invalid("low_freq_factor", f"must be below high_freq_factor={high}")
    length = outer.positive_int("original_max_position_embeddings", fields.positive_int("max_position_embeddings"))
    return RopeConfig("llama3", theta, rope.positive_float("factor"), low, high, length)


def _eos_token_ids(directory: Path, fields: _Fields, vocab_size: int) -> tuple[int, ...]:
    path = directory / "generation_config.json"
    if path.exists():
        ids = _read_fields(path).token_ids("eos_token_id", vocab_size)
        if ids:
            return ids
    return fields.token_ids("eos_token_id", vocab_size)
