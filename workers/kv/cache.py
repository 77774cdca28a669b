"""The shard's paged KV memory: the keys and values of its own KV heads, for every layer, in blocks of tokens."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.handoff import Range
from headwise.workers.kv.pages import PageTaker, take_pages

Buffer = bytes | bytearray | memoryview
Bits = np.ndarray[tuple[int, ...], np.dtype[np.signedinteger[Any]]]

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By item size: NumPy has no bfloat16, and copies bits."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


class Mover(Protocol):
    """Moves blocks of one cache that is not in host memory. Complete when a call returns; any thread may call.

    Attributes:
        blocks_at_once: how many whole blocks a call should have.
    """

    blocks_at_once: int

    def read(self, blocks: Sequence[int], heads: Range, layers: Range, out: Sequence[Bits]) -> None:
        """Copy heads and layers, that lie within the cache, of blocks to host memory.

        Args:
            out: for each block, [layers, 2 (K, V), heads, block_size, head_dim] as integers.
        """

    def write(self, blocks: Sequence[int], heads: Range, layers: Range, data: Sequence[Bits]) -> None:
        """The inverse of :meth:`read`; no block may come twice."""


class KVCache:
    """Keys and values, per layer each [num_blocks, kv heads, block_size, head_dim].

    With ``transposed_keys`` the keys of a block are kept as [head_dim, block_size], so that one load holds the same
    element of several keys and a query times a block of keys needs no horizontal sums. Only this class and the
    backends that ask for it know: ``gather`` and what moves blocks in and out speak [block_size, head_dim].

    Attributes:
        keys: [L, N, K, block_size, D], or [L, N, K, D, block_size] with ``transposed_keys``.
        values: [L, N, K, block_size, D].
        mover: what moves blocks in and out; None on a CPU, where this class does.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        transposed_keys: bool = False,
        in_haste: bool = False,
    ) -> None:
        """Args: ``in_haste``: on a CPU, pages are taken beside the steps, and not here."""
        sizes = (num_layers, num_blocks, num_kv_heads, block_size, head_dim)
        for name, size in zip(
            ("num_layers", "num_blocks", "num_kv_heads", "block_size", "head_dim"), sizes, strict=True
        ):
            if size < 1:
                raise InvalidValueError(name, size, "must be at least 1")
        self.num_layers, self.num_blocks, self.num_kv_heads, self.block_size, self.head_dim = sizes
        self.dtype, self.device, self.transposed_keys = dtype, torch.device(device), transposed_keys
        key_block = (head_dim, block_size) if transposed_keys else (block_size, head_dim)
        self.keys = _zeros((num_layers, num_blocks, num_kv_heads, *key_block), dtype, self.device)
        self.values = _zeros(sizes, dtype, self.device)
        self.mover: Mover | None = None
        self._pages: PageTaker | None = None
        if self.device.type == "cpu":
            arrays = [x.view(-1).view(torch.uint8).numpy() for x in (self.keys, self.values)]
            if in_haste:
                self._pages = PageTaker(arrays)
            else:
                take_pages(arrays)

    def close(self) -> None:
        """Call it before the cache is given up, so that its memory is free then. Idempotent."""
        self.mover = None  # it knows who finishes steps, who knows the model, which knows this cache
        if self._pages is not None:
            self._pages.close()

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """Of one block outside the cache: (num_layers, 2 for K and V, kv heads, block_size, head_dim)."""
        return self.num_layers, 2, self.num_kv_heads, self.block_size, self.head_dim

    @property
    def blocks_at_once(self) -> int:
        """How many blocks move best in one call."""
        return self.mover.blocks_at_once if self.mover is not None else 1

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values together."""
        return self.keys.nbytes + self.values.nbytes

    def write(self, layer: int, k_TKD: Tensor, v_TKD: Tensor, slots_T: Tensor) -> None:
        """Put the K and V of T tokens at their slots (block * block_size + offset, int64)."""
        blocks_T = torch.div(slots_T, self.block_size, rounding_mode="floor")
        offsets_T = slots_T - blocks_T * self.block_size
        if self.transposed_keys:
            self.keys[layer][blocks_T, :, :, offsets_T] = k_TKD
        else:
            self.keys[layer][blocks_T, :, offsets_T] = k_TKD
        self.values[layer][blocks_T, :, offsets_T] = v_TKD

    def gather(self, layer: int, blocks_N: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The first ``length`` tokens held by a list of blocks: k_KCD and v_KCD, C = length."""
        used_N = blocks_N[: -(-length // self.block_size)].long()
        k_NKSD, v_NKSD = self.keys[layer][used_N], self.values[layer][used_N]
        if self.transposed_keys:
            k_NKSD = k_NKSD.transpose(2, 3)
        k_KCD, v_KCD = (x_NKSD.transpose(0, 1).flatten(1, 2)[:, :length] for x_NKSD in (k_NKSD, v_NKSD))
        return k_KCD, v_KCD

    def read_blocks(self, blocks: Sequence[int], out: Sequence[Tensor] | Tensor) -> None:
        """Copy blocks to host memory; complete when it returns. May run beside steps that leave the blocks alone.

        Args:
            out: for each block a tensor of the cache's dtype in host memory, of ``block_shape``; or one tensor of all.

        Raises:
            InvalidValueError: a block is out of range, or ``out`` has another shape, dtype or device.
        """
        self._read(blocks, self._check_moved(blocks, "out", out), *self._everything)

    def write_blocks(self, blocks: Sequence[int], data: Sequence[Tensor] | Tensor) -> None:
        """The inverse of :meth:`read_blocks`, with the same ``data``, limits and errors; no block may come twice."""
        self._write(blocks, self._check_moved(blocks, "data", data), *self._everything)

    def read_range(self, blocks: Sequence[int], heads: Range, layers: Range, out: Buffer) -> None:
        """Copy some heads and layers of blocks to host memory, as :meth:`read_blocks` does.

        Args:
            heads, layers: half-open ranges of the cache's own.
            out: room for [blocks, layers, 2 (K, V), heads, block_size, head_dim] and nothing else, contiguous.

        Raises:
            InvalidValueError: a block or a range does not lie within the cache, or ``out`` has another size.
        """
        self._read(blocks, self._check_range(blocks, heads, layers, "out", out), heads, layers)

    def write_range(self, blocks: Sequence[int], heads: Range, layers: Range, data: Buffer) -> None:
        """The inverse of :meth:`read_range`, with the same ``data``, limits and errors; no block may come twice."""
        self._write(blocks, self._check_range(blocks, heads, layers, "data", data), heads, layers)

    def range_bytes(self, num_blocks: int, num_heads: int, num_layers: int) -> int:
        """Bytes of so many heads and layers of so many blocks."""
        return num_blocks * 2 * num_layers * num_heads * self.block_size * self.head_dim * self.dtype.itemsize

    @property
    def _everything(self) -> tuple[Range, Range]:
        return (0, self.num_kv_heads), (0, self.num_layers)

    def _read(self, blocks: Sequence[int], out: Sequence[Bits], heads: Range, layers: Range) -> None:
        if self.mover is not None:
            self.mover.read(blocks, heads, layers, out)
            return
        for into_L2KSD, block in zip(out, blocks, strict=True):
            for part, x_LKSD in enumerate(self._standard(block, slice(*heads), slice(*layers))):
                np.copyto(into_L2KSD[:, part], _bits(x_LKSD))

    def _write(self, blocks: Sequence[int], data: Sequence[Bits], heads: Range, layers: Range) -> None:
        if self.mover is not None:
            self.mover.write(blocks, heads, layers, data)
            return
        for held_L2KSD, block in zip(data, blocks, strict=True):
            for part, x_LKSD in enumerate(self._standard(block, slice(*heads), slice(*layers))):
                np.copyto(_bits(x_LKSD), held_L2KSD[:, part])

    def _standard(self, block: int, heads: slice, layers: slice) -> tuple[Tensor, Tensor]:
        """Views of a block, each [layers, heads, block_size, head_dim] in either layout."""
        k_LKSD = self.keys[layers, block, heads]
        return (k_LKSD.transpose(-1, -2) if self.transposed_keys else k_LKSD), self.values[layers, block, heads]

    def _check_moved(self, blocks: Sequence[int], name: str, x: Sequence[Tensor] | Tensor) -> list[Bits]:
        """The blocks of ``x`` as integers."""
        self._check_blocks(blocks)
        parts = list(x)
        fits = len(parts) == len(blocks)
        for part in parts:
            fits = fits and part.shape == self.block_shape and part.dtype == self.dtype and part.device.type == "cpu"
        if not fits:
            found = [(part.dtype, tuple(part.shape), str(part.device)) for part in parts[:1]]
            wanted = f"must be {self.dtype} of shape {(len(blocks), *self.block_shape)} in host memory"
            raise InvalidValueError(name, (len(parts), *found), wanted)
        return [_bits(part) for part in parts]

    def _check_range(self, blocks: Sequence[int], heads: Range, layers: Range, name: str, x: Buffer) -> list[Bits]:
        """The blocks of ``x``, each [layers, 2, heads, block_size, head_dim] integers."""
        self._check_blocks(blocks)
        for field, (start, stop), limit in (("heads", heads, self.num_kv_heads), ("layers", layers, self.num_layers)):
            if not 0 <= start < stop <= limit:
                raise InvalidValueError(field, (start, stop), f"must be a range within [0, {limit})")
        num_heads, num_layers = heads[1] - heads[0], layers[1] - layers[0]
        needed, size = self.range_bytes(len(blocks), num_heads, num_layers), memoryview(x).nbytes
        if size != needed:
            raise InvalidValueError(name, f"{size} bytes", f"must be {needed} bytes")
        bits = np.frombuffer(x, f"i{self.dtype.itemsize}")
        return list(bits.reshape(len(blocks), num_layers, 2, num_heads, self.block_size, self.head_dim))

    def _check_blocks(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            if not 0 <= block < self.num_blocks:
                raise InvalidValueError("block", block, f"must be at least 0 and less than {self.num_blocks}")


def bytes_per_block(num_layers: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one block, all layers together."""
    return 2 * num_layers * num_kv_heads * block_size * head_dim * dtype.itemsize


def parse_memory(text: str | int | float, total: int) -> int:
    """Bytes of a memory budget.

    Args:
        text: bytes (``1073741824``), a size (``"2GiB"``, ``"512 MB"``), or, where it is at most 1, a fraction of total.
        total: the bytes a fraction refers to.

    Raises:
        InvalidValueError: not one of these; the field is named kv_memory.
    """
    wanted = f'must be a size such as "2GiB" or a fraction in (0, 1] of the {total} bytes available'
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)(?:e([+-]?\d{1,2}))?\s*([KMG]?I?B)?\s*", str(text), re.IGNORECASE)
    if match is None or isinstance(text, bool) or (match[3] or "").upper() not in _UNITS:
        raise InvalidValueError("kv_memory", text, wanted)
    number = float(match[1]) * 10.0 ** int(match[2] or 0)
    budget = int(number * total) if number <= 1 and not match[3] else int(number * _UNITS[(match[3] or "").upper()])
    if budget < 1:
        raise InvalidValueError("kv_memory", text, wanted)
    return budget


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, so that memory that nobody has written yet cannot hold NaN."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # NumPy asks for huge pages and torch does not; blocks lie scattered, so with small ones each is a TLB miss.
    memory = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(memory).view(dtype).view(shape)


def _bits(x: Tensor) -> Bits:
    """``x`` in host memory as integers. NumPy copies them on the calling thread: torch may start a team of threads for
    a copy, one for each thread that copies, and libgomp lets the waiting threads of several teams sleep instead of
    spin, the steps' among them."""
    bits: Bits = x.view(INTEGERS[x.dtype.itemsize]).numpy()
    return bits
