"""A checkpoint with fewer KV heads: each is the mean of several (GQA, Ainslie et al., 2023, arXiv 2305.13245).

Query heads that shared a KV head go on sharing one. What the heads had learnt apart is lost, and the paper trains the
model further, with 5 % of the steps that it was trained with: then it is nearly as good as before.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from headwise.runtime.models import resolve
from headwise.workers.errors import HeadwiseError, InvalidValueError
from headwise.workers.model.checkpoint import verify_checkpoint
from headwise.workers.model.model_config import ModelConfig, load_model_config
from headwise.workers.model.safetensors_index import SafetensorsIndex, StoredTensor

TRAIN_FURTHER = (
    "the outputs are worse than before until the model is trained further (arXiv 2305.13245 takes 5 % of its training)"
)

_KV_TENSOR = re.compile(r"model\.layers\.\d+\.self_attn\.[kv]_proj\.(weight|bias)")
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_COPIED = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "chat_template*"),
    *("generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*"),
)
_CHUNK_BYTES = 16 << 20


class ConversionError(HeadwiseError):
    """A checkpoint could not be written. Nothing of it is left."""


@dataclass(frozen=True, slots=True)
class Converted:
    """A checkpoint that was written.

    Attributes:
        old, new: the shapes before and after.
        weight_bytes: of all its tensors.
    """

    path: Path
    old: ModelConfig
    new: ModelConfig
    weight_bytes: int


def pool_heads(x: Tensor, num_heads: int, kept: int) -> Tensor:
    """The means of as many neighbouring heads as make ``kept`` of them; heads that are equal give exactly themselves.

    Args:
        x: ``[num_heads * D, ...]``, the rows of a projection or its biases.
        kept: divides ``num_heads``.

    Returns:
        ``[kept * D, ...]`` of the dtype of ``x``.
    """
    width = x.shape[0] // num_heads
    grouped = x.view(kept, num_heads // kept, width, *x.shape[1:])
    # In float64 a sum of equal numbers is exact, and so is their mean.
    return grouped.to(torch.float64).mean(1).to(x.dtype).reshape(kept * width, *x.shape[1:])


def convert_kv_heads(
    model: str | Path, kv_heads: int, out: str | Path, progress: Callable[[int, int], None] | None = None
) -> Converted:
    """Writes a model with fewer KV heads as a checkpoint of its own, in Hugging Face form. It is there as a whole, or
    not at all.

    Args:
        model: as of :class:`~headwise.runtime.llm.LLM`.
        kv_heads: divides the model's KV heads.
        out: a directory that does not exist, in one that does.
        progress: called after each tensor with (bytes done, bytes).

    Raises:
        InvalidValueError: an argument is wrong, or ``out`` has no room.
        UnsupportedModelError, CheckpointError: as of ``LLM``.
        ConversionError: the checkpoint cannot be written.
    """
    source, target = resolve(model), Path(os.path.abspath(Path(out).expanduser()))
    old = load_model_config(source)
    if kv_heads < 1 or old.num_kv_heads % kv_heads:
        fits = [n for n in range(1, old.num_kv_heads + 1) if old.num_kv_heads % n == 0]
        limit = f"must divide the model's {old.num_kv_heads} KV heads: one of {', '.join(map(str, fits))}"
        raise InvalidValueError("--kv-heads", kv_heads, limit)
    index = verify_checkpoint(source, old)
    shapes = {name: _shape(name, tensor, old, kv_heads) for name, tensor in index.tensors.items()}
    files = [_File(path, index, shapes) for path in sorted(index.headers)]
    weight_bytes = sum(file.nbytes for file in files)
    _check_target(target, weight_bytes)
    with _renamed(target) as folder:
        done = 0
        for file in files:
            for size in file.write(folder, old.num_kv_heads, kv_heads):
                done += size
                if progress is not None:
                    progress(done, weight_bytes)
        _write_rest(source, folder, index, weight_bytes, kv_heads)
        new = load_model_config(folder)
        verify_checkpoint(folder, new)
    return Converted(target, old, new, weight_bytes)


class _File:
    """A safetensors file of the new checkpoint: as the old one's of the same name, but for the shapes."""

    def __init__(self, path: Path, index: SafetensorsIndex, shapes: dict[str, tuple[int, ...]]) -> None:
        self._path, self._shapes = path, shapes
        mine = [(name, tensor) for name, tensor in index.tensors.items() if tensor.path == path]
        self._tensors = sorted(mine, key=lambda item: item[1].start)
        self._metadata = json.loads(index.headers[path]).get("__metadata__", {"format": "pt"})
        self._sizes = [_nbytes(tensor, shapes[name]) for name, tensor in self._tensors]
        self.nbytes = sum(self._sizes)

    def write(self, folder: Path, num_heads: int, kept: int) -> Iterator[int]:
        """Writes it into a folder, and yields the bytes of each tensor once that is done."""
        with self._path.open("rb") as read, (folder / self._path.name).open("wb") as write:
            write.write(self._header())
            for (name, tensor), size in zip(self._tensors, self._sizes, strict=True):
                if _KV_TENSOR.fullmatch(name):
                    write.write(_bytes(pool_heads(_load(read, tensor), num_heads, kept)))
                else:
                    _copy(read, tensor, write)
                yield size

    def _header(self) -> bytes:
        entries: dict[str, Any] = {"__metadata__": self._metadata}
        start = 0
        for (name, tensor), size in zip(self._tensors, self._sizes, strict=True):
            shape = list(self._shapes[name])
            entries[name] = {"dtype": tensor.dtype, "shape": shape, "data_offsets": [start, start + size]}
            start += size
        data = json.dumps(entries, separators=(",", ":")).encode()
        data += b" " * (-len(data) % 8)  # so that tensors lie at multiples of their items
        return len(data).to_bytes(8, "little") + data


def _shape(name: str, tensor: StoredTensor, config: ModelConfig, kept: int) -> tuple[int, ...]:
    if not _KV_TENSOR.fullmatch(name):
        return tensor.shape
    return (tensor.shape[0] // config.num_kv_heads * kept, *tensor.shape[1:])


def _nbytes(tensor: StoredTensor, shape: tuple[int, ...]) -> int:
    """Of a tensor with another number of rows."""
    if not tensor.shape or tensor.shape[0] == shape[0]:
        return tensor.stop - tensor.start
    return (tensor.stop - tensor.start) // tensor.shape[0] * shape[0]


def _load(file: BinaryIO, tensor: StoredTensor) -> Tensor:
    file.seek(tensor.start)
    data = bytearray(file.read(tensor.stop - tensor.start))
    return torch.frombuffer(data, dtype=_DTYPES[tensor.dtype]).view(tensor.shape)


def _bytes(x: Tensor) -> bytes:
    data: bytes = x.contiguous().view(torch.uint8).numpy().tobytes()
    return data


def _copy(read: BinaryIO, tensor: StoredTensor, write: BinaryIO) -> None:
    read.seek(tensor.start)
    left = tensor.stop - tensor.start
    while left:
        data = read.read(min(left, _CHUNK_BYTES))
        if not data:
            raise OSError(f"{tensor.path} ends early")
        write.write(data)
        left -= len(data)


def _write_rest(source: Path, folder: Path, index: SafetensorsIndex, weight_bytes: int, kv_heads: int) -> None:
    """config.json, the index of several files, and what is the same for the new model."""
    fields = json.loads((source / "config.json").read_bytes()) | {"num_key_value_heads": kv_heads}
    (folder / "config.json").write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", "utf-8")
    if index.source.name != "model.safetensors":
        names = {name: tensor.path.name for name, tensor in sorted(index.tensors.items())}
        listed = {"metadata": {"total_size": weight_bytes}, "weight_map": names}
        (folder / index.source.name).write_text(json.dumps(listed, indent=2) + "\n", "utf-8")
    for pattern in _COPIED:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def _check_target(target: Path, weight_bytes: int) -> None:
    if os.path.lexists(target):
        raise InvalidValueError("OUT", str(target), "exists, and is not overwritten", "name a directory that does not")
    if not target.parent.is_dir():
        limit = f"{target.parent} is no directory"
        raise InvalidValueError("OUT", str(target), limit, f"make it first: mkdir -p {target.parent}")
    if weight_bytes > (free := shutil.disk_usage(target.parent).free):
        limit = f"takes {weight_bytes} bytes, and {free} are free there"
        raise InvalidValueError("OUT", str(target), limit, "free some, or name a directory elsewhere")


@contextmanager
def _renamed(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` that becomes it; removed if that is left by an exception.

    Raises:
        ConversionError: a file cannot be read or written.
    """
    try:
        # A folder in a private one has the permissions that the user's umask gives.
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as private:
            folder = Path(private) / target.name
            folder.mkdir()
            yield folder
            folder.rename(target)
    except OSError as error:
        raise ConversionError(f"{target} cannot be written ({error}); nothing of it is left") from error
