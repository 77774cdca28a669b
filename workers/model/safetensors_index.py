"""Where each tensor of a safetensors checkpoint lies: which file, which bytes, what shape. Reads headers only.

The format: 8 bytes with the header's length N (u64, little-endian), N bytes of JSON, then the tensors' bytes;
https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headwise.workers.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The largest header, as in safetensors itself."""

_ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint.

    Attributes:
        dtype: as safetensors names it: "F32", "BF16" or "F16".
        start, stop: its bytes, as offsets from the beginning of the file.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(slots=True)
class SafetensorsIndex:
    """Every tensor of a checkpoint.

    Attributes:
        source: the file that says which tensors there are: the weights themselves or their index.
        headers: the JSON of each file's header, as stored.
    """

    source: Path
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    headers: dict[Path, bytes] = field(default_factory=dict)


def read_index(directory: Path) -> SafetensorsIndex:
    """Read the headers of ``model.safetensors``, or of the files ``model.safetensors.index.json`` lists.

    Raises:
        CheckpointError: there is neither, or a file is missing, truncated or corrupt, or a tensor is of another dtype
            than float32, bfloat16 and float16.
    """
    single, sharded = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        index = SafetensorsIndex(single)
        index.tensors.update(_read_header(single, index))
        return index
    if not sharded.is_file():
        raise _no_safetensors(directory)
    index = SafetensorsIndex(sharded)
    weight_map = _read_weight_map(sharded)
    found = {name: _read_header(directory / name, index) for name in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in found[file]:
            raise CheckpointError(f"{directory / file} lacks the tensor {name} that {sharded.name} places in it")
        index.tensors[name] = found[file][name]
    return index


def _no_safetensors(directory: Path) -> CheckpointError:
    pickles = sorted(p.name for suffix in ("bin", "pt", "pth", "ckpt") for p in directory.glob(f"*.{suffix}"))
    if pickles:
        return CheckpointError(
            f"{directory} holds only {pickles[0]}, a pickle, which can run code and is never loaded; "
            "convert it to safetensors (save_pretrained of transformers writes them)"
        )
    return CheckpointError(f"{directory} holds neither model.safetensors nor model.safetensors.index.json")


def _read_weight_map(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_bytes())
        weight_map = index["weight_map"]
        names = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no safetensors index ({error!r}); copy the file again") from None
    for file in names.values():
        if Path(file).name != file:
            raise CheckpointError(f"{path} names the file {file!r}; only files beside it are read")
    return names


def _read_header(path: Path, index: SafetensorsIndex) -> dict[str, StoredTensor]:
    """The tensors of one file, whose header is kept in ``index.headers``."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise _corrupt(path, f"{size} bytes do not hold a header of {length} bytes")
            header = file.read(length)
        entries = json.loads(header)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); copy the file again") from None
    except (ValueError, RecursionError):
        raise _corrupt(path, "its header is not JSON") from None
    if not isinstance(entries, dict):
        raise _corrupt(path, "its header is not a JSON object")
    entries.pop("__metadata__", None)
    index.headers[path] = header
    tensors = {name: _parse_entry(path, name, entry, 8 + length) for name, entry in entries.items()}
    _check_coverage(path, tensors, 8 + length, size)
    return tensors


def _parse_entry(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _corrupt(path, f"the header's entry of tensor {name} is malformed") from None
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise CheckpointError(f"{path}: tensor {name} is stored as {dtype!r}; only F32, BF16 and F16 are supported")
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise _corrupt(path, f"the shape or offsets of tensor {name} are not counts")
    if stop - start != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise _corrupt(path, f"tensor {name} {list(shape)} of {dtype} does not fill its {stop - start} bytes")
    return StoredTensor(path, dtype, shape, data_start + start, data_start + stop)


def _check_coverage(path: Path, tensors: dict[str, StoredTensor], data_start: int, size: int) -> None:
    """Each byte after the header belongs to exactly one tensor."""
    end = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != end:
            raise _corrupt(path, f"tensor {name} starts at byte {tensor.start} instead of {end}")
        if tensor.stop > size:
            raise _corrupt(path, f"it is truncated: tensor {name} ends at byte {tensor.stop}, the file at {size}")
        end = tensor.stop
    if end != size:
        raise _corrupt(path, f"its tensors end at byte {end}, the file at {size}")


def _corrupt(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {why}; copy the file again")
