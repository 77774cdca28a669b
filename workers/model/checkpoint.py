"""Reads one rank's slices of a safetensors checkpoint, and checks a whole one from its headers alone.

Files are mapped, and a slice is copied straight into the rank's own tensor: what other ranks own is not read.
Pickle checkpoints are refused; a safetensors file holds numbers and no code.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headwise.workers import failpoints
from headwise.workers.errors import CheckpointError
from headwise.workers.failpoints import Point
from headwise.workers.model.model_config import ModelConfig
from headwise.workers.model.partition import Range, ShardPartition
from headwise.workers.model.safetensors_index import SafetensorsIndex, read_index

_SAMPLE_BYTES = 4096


@dataclass(slots=True)
class LayerWeights:
    """One rank's part of one layer; Hl query heads, Kl KV heads, Ml MLP columns, all of the rank's dtype.

    Attributes:
        attn_norm_E, mlp_norm_E: ``[E]``, whole on every rank.
        qkv_weight: ``[(Hl + 2 * Kl) * D, E]``: the rows of its query heads, then keys, then values.
        o_weight: ``[E, Hl * D]``.
        gate_up_weight: ``[2 * Ml, E]``: the gate's rows, then up's.
        down_weight: ``[E, Ml]``.
        qkv_bias, gate_up_bias: one value a row of the weight, None if the model has none.
        o_bias, down_bias: ``[E]`` on rank 0, None on the others, so that the sum over ranks has it once.
    """

    attn_norm_E: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor | None
    o_weight: Tensor
    o_bias: Tensor | None
    mlp_norm_E: Tensor
    gate_up_weight: Tensor
    gate_up_bias: Tensor | None
    down_weight: Tensor
    down_bias: Tensor | None

    @property
    def nbytes(self) -> int:
        tensors: list[Tensor | None] = [getattr(self, field.name) for field in fields(self)]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@dataclass(slots=True)
class ShardWeights:
    """One rank's part of the model.

    Attributes:
        embed_VE, lm_head_VE: its vocabulary rows, ``[V_local, E]``; the same tensor if the embeddings are tied.
        final_norm_E: ``[E]``.
    """

    embed_VE: Tensor
    lm_head_VE: Tensor
    final_norm_E: Tensor
    layers: list[LayerWeights]


def load_shard(
    directory: Path,
    config: ModelConfig,
    part: ShardPartition,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> ShardWeights:
    """Read one rank's slices, layer by layer, into contiguous tensors of ``dtype`` on ``device``.

    Args:
        progress: called after each layer with (layers done, layers).

    Raises:
        CheckpointError: as :func:`verify_checkpoint`.
    """
    index = verify_checkpoint(directory, config)
    with _Reader(index, dtype, device) as reader:
        embed_VE = reader.rows("model.embed_tokens.weight", part.vocab)
        lm_head_VE = embed_VE if config.tie_word_embeddings else reader.rows("lm_head.weight", part.vocab)
        weights = ShardWeights(embed_VE, lm_head_VE, reader.whole("model.norm.weight"), [])
        for layer in range(config.num_layers):
            weights.layers.append(_load_layer(reader, f"model.layers.{layer}.", config, part))
            if failpoints.ENABLED:
                failpoints.hit(Point.LOAD_LAYER, part.rank)
            if progress is not None:
                progress(layer + 1, config.num_layers)
    return weights


def verify_checkpoint(directory: Path, config: ModelConfig) -> SafetensorsIndex:
    """Check names, shapes and file lengths against the configuration, reading no weight. Cheap: headers only.

    Raises:
        CheckpointError: a file is missing, truncated, corrupt or a pickle, or a tensor is missing, not of the shape
            that config.json promises, or promised by nothing in it.
    """
    index = read_index(directory)
    expected = dict(_expected_shapes(config))
    for name, shape in expected.items():
        stored = index.tensors.get(name)
        if stored is None:
            raise CheckpointError(f"{index.source} lacks the tensor {name} {list(shape)}, which config.json promises")
        if stored.shape != shape:
            raise CheckpointError(
                f"{stored.path}: tensor {name} is stored as {list(stored.shape)}, config.json promises {list(shape)}; "
                "config.json and the weights are not of one model"
            )
    for name in index.tensors.keys() - expected.keys():
        if not (name.endswith(".rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings)):
            raise CheckpointError(
                f"{index.tensors[name].path}: tensor {name} has no place in the model that config.json describes; "
                "computing without it would not be this model"
            )
    return index


def model_fingerprint(directory: Path) -> str:
    """Identifies a checkpoint: a SHA-256, in hex, that differs between models whose KV must not be mixed.

    Over config.json, every safetensors header and file length, and 4 KiB from the start, the middle and the end of
    each tensor: fine-tuned models have the same headers, but hardly the same weights at all of these places. A
    change elsewhere in a tensor alone goes unnoticed. Takes milliseconds, where hashing every byte takes minutes.

    Raises:
        CheckpointError: as :func:`verify_checkpoint`, for files and headers.
    """
    index = read_index(directory)
    digest = hashlib.sha256()

    def add(data: bytes) -> None:
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)

    try:
        add((directory / "config.json").read_bytes())
        for path in sorted(index.headers):
            add(path.name.encode())
            add(index.headers[path])
            add(path.stat().st_size.to_bytes(8, "little"))
            with path.open("rb") as file:
                stored = sorted((t.start, t.stop) for t in index.tensors.values() if t.path == path)
                for start, stop in stored:
                    last = max(stop - _SAMPLE_BYTES, start)
                    for offset in (start, (start + last) // 2, last):
                        add(os.pread(file.fileno(), min(_SAMPLE_BYTES, stop - offset), offset))
    except OSError as error:
        raise CheckpointError(f"{error.filename or directory} cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def _expected_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, mlp = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (q_rows, hidden, config.attention_bias),
        "self_attn.k_proj": (kv_rows, hidden, config.attention_bias),
        "self_attn.v_proj": (kv_rows, hidden, config.attention_bias),
        "self_attn.o_proj": (hidden, q_rows, config.attention_bias),
        "mlp.gate_proj": (mlp, hidden, config.mlp_bias),
        "mlp.up_proj": (mlp, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, mlp, config.mlp_bias),
    }
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
        for name, (rows, columns, bias) in linears.items():
            yield f"{prefix}{name}.weight", (rows, columns)
            if bias:
                yield f"{prefix}{name}.bias", (rows,)


def _load_layer(reader: _Reader, prefix: str, config: ModelConfig, part: ShardPartition) -> LayerWeights:
    heads, dim = part.heads, config.head_dim
    q_rows = (heads.q_start * dim, heads.q_stop * dim)
    kv_rows = (heads.kv_start * dim, heads.kv_stop * dim)
    attn, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
    qkv = [(f"{attn}q_proj.", q_rows), (f"{attn}k_proj.", kv_rows), (f"{attn}v_proj.", kv_rows)]
    gate_up = [(f"{mlp}gate_proj.", part.mlp), (f"{mlp}up_proj.", part.mlp)]
    first = part.rank == 0
    return LayerWeights(
        attn_norm_E=reader.whole(f"{prefix}input_layernorm.weight"),
        qkv_weight=reader.stacked("weight", qkv),
        qkv_bias=reader.stacked("bias", qkv) if config.attention_bias else None,
        o_weight=reader.columns(f"{attn}o_proj.weight", q_rows),
        o_bias=reader.whole(f"{attn}o_proj.bias") if config.attention_bias and first else None,
        mlp_norm_E=reader.whole(f"{prefix}post_attention_layernorm.weight"),
        gate_up_weight=reader.stacked("weight", gate_up),
        gate_up_bias=reader.stacked("bias", gate_up) if config.mlp_bias else None,
        down_weight=reader.columns(f"{mlp}down_proj.weight", part.mlp),
        down_bias=reader.whole(f"{mlp}down_proj.bias") if config.mlp_bias and first else None,
    )


class _Reader:
    """Copies slices of a checkpoint's tensors; each file is opened once, when first needed."""

    def __init__(self, index: SafetensorsIndex, dtype: torch.dtype, device: torch.device) -> None:
        self._index, self._dtype, self._device = index, dtype, device
        self._open: dict[Path, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def whole(self, name: str) -> Tensor:
        return self._copy([self._slice(name)[:]])

    def rows(self, name: str, bounds: Range) -> Tensor:
        return self._copy([self._slice(name)[bounds[0] : bounds[1]]])

    def columns(self, name: str, bounds: Range) -> Tensor:
        return self._copy([self._slice(name)[:, bounds[0] : bounds[1]]])

    def stacked(self, suffix: str, parts: list[tuple[str, Range]]) -> Tensor:
        """The given rows of several tensors, one below the other."""
        return self._copy([self._slice(f"{name}{suffix}")[start:stop] for name, (start, stop) in parts])

    def _slice(self, name: str) -> Any:
        path = self._index.tensors[name].path
        try:
            if path not in self._open:
                self._open[path] = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            return self._open[path].get_slice(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: tensor {name} cannot be read ({error}); copy the file again") from None

    def _copy(self, mapped: list[Tensor]) -> Tensor:
        # What safetensors gives out is a view of the mapped file, which must not outlive the reader.
        rows = sum(len(part) for part in mapped)
        out = torch.empty((rows, *mapped[0].shape[1:]), dtype=self._dtype, device=self._device)
        start = 0
        for part in mapped:
            out[start : start + len(part)].copy_(part)
            start += len(part)
        return out
