"""Ranks read their own slices and nothing else, and a damaged checkpoint is refused from its headers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from headwise.workers.errors import CheckpointError
from headwise.workers.model.checkpoint import (
    LayerWeights,
    ShardWeights,
    load_shard,
    model_fingerprint,
    verify_checkpoint,
)
from headwise.workers.model.model_config import ModelConfig, load_model_config
from headwise.workers.model.partition import ShardPartition, partition_model
from tests.checkpoints import SHAPES, reference_model, write_checkpoint

CPU = torch.device("cpu")
MakeCheckpoint = Callable[..., Path]


def load_all(directory: Path, tp: int) -> tuple[ModelConfig, list[ShardPartition], list[ShardWeights]]:
    config = load_model_config(directory)
    parts = partition_model(config, tp)
    return config, parts, [load_shard(directory, config, part, torch.float32, CPU) for part in parts]


def copy(directory: Path, to: Path) -> Path:
    shutil.copytree(directory, to, dirs_exist_ok=True)
    return to


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def heads(rows: Tensor, head_dim: int) -> list[Tensor]:
    return list(rows.split(head_dim))


def assert_layer_reassembles(
    layers: list[LayerWeights], parts: list[ShardPartition], config: ModelConfig, full: Callable[[str], Tensor]
) -> None:
    """Each head of each rank is the global head the partition says, and outputs are split without a gap."""
    for suffix, biased in (("weight", True), ("bias", config.attention_bias)):
        if not biased:
            assert all(layer.qkv_bias is None and layer.o_bias is None for layer in layers)
            continue
        q, k, v = (heads(full(f"self_attn.{name}_proj.{suffix}"), config.head_dim) for name in "qkv")
        for layer, part in zip(layers, parts, strict=True):
            h = part.heads
            wanted = [*q[h.q_start : h.q_stop], *k[h.kv_start : h.kv_stop], *v[h.kv_start : h.kv_stop]]
            torch.testing.assert_close(getattr(layer, f"qkv_{suffix}"), torch.cat(wanted), rtol=0, atol=0)
    torch.testing.assert_close(
        torch.cat([layer.o_weight for layer in layers], dim=1), full("self_attn.o_proj.weight"), rtol=0, atol=0
    )
    torch.testing.assert_close(
        torch.cat([layer.down_weight for layer in layers], dim=1), full("mlp.down_proj.weight"), rtol=0, atol=0
    )
    gates, ups = zip(*(layer.gate_up_weight.chunk(2) for layer in layers), strict=True)
    torch.testing.assert_close(torch.cat(gates), full("mlp.gate_proj.weight"), rtol=0, atol=0)
    torch.testing.assert_close(torch.cat(ups), full("mlp.up_proj.weight"), rtol=0, atol=0)


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_ranks_slices_make_up_the_model(checkpoint: MakeCheckpoint, shape: str, tied: bool, tp: int) -> None:
    directory = checkpoint(shape, tie_word_embeddings=tied)
    config, parts, shards = load_all(directory, tp)
    full = reference_model(directory).state_dict()
    torch.testing.assert_close(torch.cat([s.embed_VE for s in shards]), full["model.embed_tokens.weight"])
    torch.testing.assert_close(torch.cat([s.lm_head_VE for s in shards]), full["lm_head.weight"])
    for shard in shards:
        assert (shard.lm_head_VE is shard.embed_VE) is tied
        torch.testing.assert_close(shard.final_norm_E, full["model.norm.weight"])
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}."
        layers = [shard.layers[index] for shard in shards]
        assert_layer_reassembles(layers, parts, config, lambda name, prefix=prefix: full[f"{prefix}{name}"])
        for layer in layers:
            torch.testing.assert_close(layer.attn_norm_E, full[f"{prefix}input_layernorm.weight"])
            torch.testing.assert_close(layer.mlp_norm_E, full[f"{prefix}post_attention_layernorm.weight"])


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_output_biases_are_added_once(checkpoint: MakeCheckpoint, tp: int) -> None:
    directory = checkpoint("uneven", attention_bias=True, mlp_bias=True)
    config, parts, shards = load_all(directory, tp)
    full = reference_model(directory).state_dict()
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}."
        layers = [shard.layers[index] for shard in shards]
        assert_layer_reassembles(layers, parts, config, lambda name, prefix=prefix: full[f"{prefix}{name}"])
        gate_up = [layer.gate_up_bias for layer in layers]
        gates, ups = zip(*(bias.chunk(2) for bias in gate_up if bias is not None), strict=True)
        torch.testing.assert_close(torch.cat(gates), full[f"{prefix}mlp.gate_proj.bias"])
        torch.testing.assert_close(torch.cat(ups), full[f"{prefix}mlp.up_proj.bias"])
        torch.testing.assert_close(layers[0].o_bias, full[f"{prefix}self_attn.o_proj.bias"])
        torch.testing.assert_close(layers[0].down_bias, full[f"{prefix}mlp.down_proj.bias"])
        assert all(layer.o_bias is None and layer.down_bias is None for layer in layers[1:])


def test_a_sharded_checkpoint_reads_the_same(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    single = checkpoint("gqa")
    reference_model(single).save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    _, _, expected = load_all(single, 3)
    _, _, shards = load_all(tmp_path, 3)
    for one, other in zip(expected, shards, strict=True):
        torch.testing.assert_close(other.embed_VE, one.embed_VE)
        torch.testing.assert_close(other.lm_head_VE, one.lm_head_VE)
        torch.testing.assert_close(other.layers[1].qkv_weight, one.layers[1].qkv_weight)
        torch.testing.assert_close(other.layers[1].down_weight, one.layers[1].down_weight)


class CountingFile:
    """An opened safetensors file that counts the elements handed out by tensor."""

    def __init__(self, file: Any, counts: dict[str, int]) -> None:
        self._file, self._counts = file, counts

    def __enter__(self) -> CountingFile:
        self._file.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.__exit__(*exc_info)

    def get_slice(self, name: str) -> CountingSlice:
        return CountingSlice(self._file.get_slice(name), name, self._counts)


class CountingSlice:
    def __init__(self, tensor_slice: Any, name: str, counts: dict[str, int]) -> None:
        self._slice, self._name, self._counts = tensor_slice, name, counts

    def __getitem__(self, key: Any) -> Tensor:
        tensor: Tensor = self._slice[key]
        self._counts[self._name] = self._counts.get(self._name, 0) + tensor.numel()
        return tensor


def test_a_rank_reads_only_its_slices(checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: dict[str, int] = {}
    monkeypatch.setattr(
        "headwise.workers.model.checkpoint.safe_open",
        lambda *args, **kwargs: CountingFile(safe_open(*args, **kwargs), counts),
    )
    directory = checkpoint("uneven", tie_word_embeddings=True)
    config = load_model_config(directory)
    for part in partition_model(config, 4):
        counts.clear()
        shard = load_shard(directory, config, part, torch.float32, CPU)
        held = shard.embed_VE.numel() + shard.final_norm_E.numel()
        for layer in shard.layers:
            held += sum(
                tensor.numel() for name in LayerWeights.__slots__ if (tensor := getattr(layer, name)) is not None
            )
        assert sum(counts.values()) == held
        columns = part.mlp[1] - part.mlp[0]
        assert counts["model.layers.0.mlp.down_proj.weight"] == columns * config.hidden_size
        assert counts["model.layers.0.self_attn.k_proj.weight"] == part.heads.num_kv * 16 * config.hidden_size


def test_weights_do_not_hang_on_the_file(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    directory = copy(checkpoint("gqa"), tmp_path)
    _, _, shards = load_all(directory, 2)
    before = shards[0].layers[0].attn_norm_E.clone()
    path = directory / "model.safetensors"
    with path.open("r+b") as file:  # in place, as a mapping would see it
        file.seek(-(path.stat().st_size // 2), 2)
        file.write(b"\0" * (path.stat().st_size // 2))
    torch.testing.assert_close(shards[0].layers[0].attn_norm_E, before)
    for tensor in (shards[1].embed_VE, shards[1].layers[0].down_weight, shards[1].layers[0].qkv_weight):
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert tensor.abs().sum() > 0


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_weights_come_in_the_dtype_asked_for(tmp_path: Path, stored: str) -> None:
    write_checkpoint(tmp_path, dtype=stored)
    rewrite(tmp_path, lambda tensors: tensors.update({n: t.to(getattr(torch, stored)) for n, t in tensors.items()}))
    config = load_model_config(tmp_path)
    part = partition_model(config, 2)[1]
    raw = load_file(tmp_path / "model.safetensors")["model.norm.weight"]
    assert raw.dtype == getattr(torch, stored)
    shard = load_shard(tmp_path, config, part, torch.float32, CPU)
    assert {shard.embed_VE.dtype, shard.layers[0].o_weight.dtype, shard.final_norm_E.dtype} == {torch.float32}
    torch.testing.assert_close(shard.final_norm_E, raw.float(), rtol=0, atol=0)


def test_progress_counts_layers(checkpoint: MakeCheckpoint) -> None:
    directory = checkpoint("gqa")
    config = load_model_config(directory)
    seen: list[tuple[int, int]] = []
    part = partition_model(config, 1)[0]
    load_shard(directory, config, part, torch.float32, CPU, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


def refused(directory: Path) -> str:
    """The message, the same from the check ahead of everything and from the load itself."""
    config = load_model_config(directory)
    with pytest.raises(CheckpointError) as caught:
        verify_checkpoint(directory, config)
    with pytest.raises(CheckpointError):
        load_shard(directory, config, partition_model(config, 2)[0], torch.float32, CPU)
    return str(caught.value)


def test_a_missing_tensor_is_named(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    copy(checkpoint("gqa"), tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    message = refused(tmp_path)
    assert "model.safetensors lacks the tensor model.layers.1.mlp.up_proj.weight [150, 96]" in message


def test_a_wrong_shape_is_told_with_both(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    copy(checkpoint("gqa"), tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(95)}))
    assert "model.norm.weight is stored as [95], config.json promises [96]" in refused(tmp_path)


def test_a_tensor_without_a_place_is_refused(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    copy(checkpoint("gqa"), tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(128)}))
    assert "model.layers.0.self_attn.q_proj.bias has no place" in refused(tmp_path)


def test_buffers_of_older_checkpoints_are_passed_over(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    copy(checkpoint("gqa", tie_word_embeddings=True), tmp_path)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8), "lm_head.weight": torch.zeros(256, 96)}
    rewrite(tmp_path, lambda tensors: tensors.update(extra))
    verify_checkpoint(tmp_path, load_model_config(tmp_path))


def test_another_dtype_is_named(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    copy(checkpoint("gqa"), tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(96, dtype=torch.int8)}))
    assert "model.norm.weight is stored as 'I8'; only F32, BF16 and F16" in refused(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 200, -1, -5000])
def test_a_truncated_file_is_named(checkpoint: MakeCheckpoint, tmp_path: Path, kept: int) -> None:
    copy(checkpoint("gqa"), tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:kept])
    message = refused(tmp_path)
    assert str(path) in message
    assert "damaged" in message
    assert "copy the file again" in message


def test_a_longer_file_is_refused(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    copy(checkpoint("gqa"), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    assert "its tensors end at byte" in refused(tmp_path)


def header_of(entries: Any) -> bytes:
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\xff" * 64, "do not hold a header"),
        ((4).to_bytes(8, "little") + b"oops", "not JSON"),
        (header_of([]), "not a JSON object"),
        (header_of({"x": 3}), "entry of tensor x is malformed"),
        (header_of({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}), "entry of tensor x is malformed"),
        (header_of({"x": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}) + b"\0" * 4, "only F32"),
        (header_of({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}) + b"\0" * 4, "not counts"),
        (header_of({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}) + b"\0" * 4, "does not fill"),
        (header_of({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}) + b"\0" * 8, "starts at byte"),
    ],
)
def test_a_corrupt_header_is_told(checkpoint: MakeCheckpoint, tmp_path: Path, data: bytes, why: str) -> None:
    copy(checkpoint("gqa"), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(data)
    assert why in refused(tmp_path)


def test_a_missing_file_of_a_sharded_checkpoint_is_named(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    reference_model(checkpoint("gqa")).save_pretrained(tmp_path, max_shard_size="30KB")
    missing = sorted(tmp_path.glob("*.safetensors"))[2]
    missing.unlink()
    assert f"{missing} cannot be read" in refused(tmp_path)


@pytest.mark.parametrize(
    ("index", "why"),
    [
        ("{", "is no safetensors index"),
        ('{"weight_map": 3}', "is no safetensors index"),
        ('{"weight_map": {"model.norm.weight": "../model.safetensors"}}', "only files beside it are read"),
        ('{"weight_map": {"model.norm.weight": ".."}}', "cannot be read"),
        ('{"weight_map": {"nothing": "part.safetensors"}}', "lacks the tensor nothing"),
    ],
)
def test_a_bad_index_is_told(checkpoint: MakeCheckpoint, tmp_path: Path, index: str, why: str) -> None:
    copy(checkpoint("gqa"), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "part.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert why in refused(tmp_path)


def test_a_pickle_is_never_loaded(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    copy(checkpoint("gqa"), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert "holds only pytorch_model.bin, a pickle" in refused(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    assert "holds neither model.safetensors nor model.safetensors.index.json" in refused(tmp_path)


def test_the_fingerprint_tells_models_apart(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    original = checkpoint("gqa")
    same = copy(original, tmp_path / "same")
    fingerprint = model_fingerprint(original)
    assert len(bytes.fromhex(fingerprint)) == 32
    assert model_fingerprint(same) == fingerprint

    tuned = copy(original, tmp_path / "tuned")  # same names, shapes and sizes; one weight differs
    rewrite(tuned, lambda tensors: tensors["model.layers.1.self_attn.v_proj.weight"][0].add_(1e-3))
    assert (tuned / "model.safetensors").stat().st_size == (same / "model.safetensors").stat().st_size
    other_config = copy(original, tmp_path / "other_config")
    values = json.loads((other_config / "config.json").read_text())
    (other_config / "config.json").write_text(json.dumps(values | {"rms_norm_eps": 1e-3}))
    assert len({fingerprint, model_fingerprint(tuned), model_fingerprint(other_config)}) == 3


def test_a_directory_without_weights_has_no_fingerprint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds neither"):
        model_fingerprint(tmp_path)
