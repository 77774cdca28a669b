"""The shard's paged KV memory: the keys and values of its own KV heads, for every layer, in blocks of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from headwise.workers.errors import InvalidValueError
from headwise.workers.kv import quantise
from headwise.workers.kv.format import KvFormat, record_bytes
from headwise.workers.kv.handoff import Range
from headwise.workers.kv.pages import PageTaker, take_pages
from headwise.workers.kv.policy import DENSE, KvPolicy

Buffer = bytes | bytearray | memoryview
Bits = np.ndarray[tuple[int, ...], np.dtype[np.signedinteger[Any]]]

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By item size: NumPy has no bfloat16, and copies bits."""


class Mover(Protocol):
    """Moves blocks of one cache that is not in host memory. Complete when a call returns; any thread may call.

    Attributes:
        blocks_at_once: how many whole blocks a call should have.
    """

    blocks_at_once: int

    def read(self, blocks: Sequence[int], heads: Range, layers: Range, out: Sequence[Bits]) -> None:
        """Copy heads and layers, that lie within the cache, of blocks to host memory.

        Args:
            out: for each block, [layers, 2 (K, V), heads, block_size, head_dim] as integers; or of records [layers,
                bytes of the heads' keys, then of their values].
        """

    def write(self, blocks: Sequence[int], heads: Range, layers: Range, data: Sequence[Bits]) -> None:
        """The inverse of :meth:`read`; no block may come twice."""


class KvPart(NamedTuple):
    """The keys and values of some heads of one layer: those of one group of the policy.

    Attributes:
        heads: of the cache's KV heads, rising; the tensors' second dimension.
        keys, values: floats [blocks of the group, heads, block_size, D], or [.., D, block_size] of transposed keys; or
            records, uint8 [blocks of the group, heads, bytes].
    """

    group: int
    heads: tuple[int, ...]
    keys: Tensor
    values: Tensor


class KVCache:
    """Keys and values of every layer, in blocks; each group of the policy has blocks of its own.

    With ``transposed_keys`` the keys of a block are kept as [head_dim, block_size], so that one load holds the same
    element of several keys and a query times a block of keys needs no horizontal sums. Only this class and the
    backends that ask for it know: ``gather`` and what moves blocks in and out speak [block_size, head_dim]. Records of
    quantised keys and values (see :mod:`~headwise.workers.kv.format`) move as they are.

    Attributes:
        format: of what is kept.
        policy: of this cache's heads.
        dtype: of the floats that are kept; uint8 if records are.
        group_blocks: how many blocks each group has; ``num_blocks`` is that of group 0.
        parts: of each layer, by group; a group without heads in a layer has none there.
        mover: what moves blocks in and out; None on a CPU, where this class does.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int | Sequence[int],
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        transposed_keys: bool = False,
        in_haste: bool = False,
        *,
        format: KvFormat | None = None,
        policy: KvPolicy | None = None,
    ) -> None:
        """
        Args:
            num_blocks: of each group, or of all alike.
            dtype: of the floats that are kept, if ``format`` is None.
            in_haste: on a CPU, pages are taken beside the steps, and not here.
            policy: None is dense.
        """
        self.policy = policy or KvPolicy((DENSE,), ((0,) * num_kv_heads,) * num_layers)
        groups = self.policy.num_groups
        self.group_blocks = (num_blocks,) * groups if isinstance(num_blocks, int) else tuple(num_blocks)
        sizes = (num_layers, min(self.group_blocks), num_kv_heads, block_size, head_dim)
        for name, size in zip(
            ("num_layers", "num_blocks", "num_kv_heads", "block_size", "head_dim"), sizes, strict=True
        ):
            if size < 1:
                raise InvalidValueError(name, size, "must be at least 1")
        if (
            len(self.group_blocks) != groups
            or [len(row) for row in self.policy.groups_LK] != [num_kv_heads] * num_layers
        ):
            limit = f"must be of {num_layers} layers with {num_kv_heads} KV heads, and {len(self.group_blocks)} groups"
            raise InvalidValueError("kv_policy", self.policy.text, limit)
        self.num_layers, self.num_blocks = num_layers, self.group_blocks[0]
        self.num_kv_heads, self.block_size, self.head_dim = sizes[2:]
        self.device, self.transposed_keys = torch.device(device), transposed_keys
        self.format = format or KvFormat(dtype_name(dtype), dtype_name(dtype))
        self.dtype = torch.uint8 if self.format.quantised else _float(self.format.keys)
        self.mover: Mover | None = None
        self._pages: PageTaker | None = None
        memory = self._make_parts()
        if self.device.type == "cpu":
            arrays = [x.view(-1).view(torch.uint8).numpy() for x in memory]
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
    def keys(self) -> Tensor:
        """Of all layers, where the policy has one group: [L, N, K, ...], see :class:`KvPart`."""
        return self._whole("keys")[0]

    @property
    def values(self) -> Tensor:
        """As :attr:`keys`."""
        return self._whole("values")[1]

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Of one block outside the cache: (num_layers, 2 for K and V, kv heads, block_size, head_dim), or of records
        (num_layers, bytes of all heads' keys, then of all heads' values)."""
        if self.format.quantised:
            return self.num_layers, self.range_bytes(1, self.num_kv_heads, 1)
        return self.num_layers, 2, self.num_kv_heads, self.block_size, self.head_dim

    @property
    def blocks_at_once(self) -> int:
        """How many blocks move best in one call."""
        return self.mover.blocks_at_once if self.mover is not None else 1

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values together."""
        return sum(part.keys.nbytes + part.values.nbytes for parts in self.parts for part in parts)

    def write(self, layer: int, k_TKD: Tensor, v_TKD: Tensor, slots_T: Tensor) -> None:
        """Put the K and V of T tokens at their slots (block * block_size + offset, int64), quantised if records are
        kept. The slot of token t in group g is at g * T + t."""
        for part in self.parts[layer]:
            slots = slots_T[part.group * len(k_TKD) : (part.group + 1) * len(k_TKD)]
            blocks_T = torch.div(slots, self.block_size, rounding_mode="floor")
            self._write_part(part, k_TKD, v_TKD, blocks_T, slots - blocks_T * self.block_size)

    def gather(self, layer: int, blocks_N: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """:meth:`gather_part` of all heads, where the policy has one group."""
        self._whole("gather")
        return self.gather_part(self.parts[layer][0], blocks_N, length)

    def gather_part(self, part: KvPart, blocks_N: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The first ``length`` tokens held by a list of the group's blocks: k_KCD and v_KCD, C = length, K those of the
        part. Floats as they are kept; of records, float32."""
        used_N = blocks_N[: -(-length // self.block_size)].long()
        k_NKX, v_NKX = part.keys[used_N], part.values[used_N]
        if self.format.quantised:
            k_NKSD = quantise.read_keys(k_NKX, self.format.keys, self.head_dim)
            v_NKSD = quantise.read_values(v_NKX, self.format.values, self.head_dim)
        else:
            k_NKSD, v_NKSD = k_NKX.transpose(2, 3) if self.transposed_keys else k_NKX, v_NKX
        k_KCD, v_KCD = (x_NKSD.transpose(0, 1).flatten(1, 2)[:, :length] for x_NKSD in (k_NKSD, v_NKSD))
        return k_KCD, v_KCD

    def read_blocks(self, blocks: Sequence[int], out: Sequence[Tensor] | Tensor) -> None:
        """Copy blocks to host memory; complete when it returns. May run beside steps that leave the blocks alone.

        Args:
            out: for each block a tensor of the cache's dtype in host memory, of ``block_shape``; or one tensor of all.

        Raises:
            InvalidValueError: a block is out of range, or ``out`` has another shape, dtype or device; or the policy has
                several groups.
        """
        self._read(blocks, self._check_moved(blocks, "out", out), *self._everything)

    def write_blocks(self, blocks: Sequence[int], data: Sequence[Tensor] | Tensor) -> None:
        """The inverse of :meth:`read_blocks`, with the same ``data``, limits and errors; no block may come twice."""
        self._write(blocks, self._check_moved(blocks, "data", data), *self._everything)

    def read_range(self, blocks: Sequence[int], heads: Range, layers: Range, out: Buffer) -> None:
        """Copy some heads and layers of blocks to host memory, as :meth:`read_blocks` does.

        Args:
            heads, layers: half-open ranges of the cache's own.
            out: room for [blocks, layers, 2 (K, V), heads, block_size, head_dim] and nothing else, contiguous; or of
                records for [blocks, layers, bytes of the heads' keys, then of their values].

        Raises:
            InvalidValueError: a block or a range does not lie within the cache, or ``out`` has another size; or the
                policy has several groups.
        """
        self._read(blocks, self._check_range(blocks, heads, layers, "out", out), heads, layers)

    def write_range(self, blocks: Sequence[int], heads: Range, layers: Range, data: Buffer) -> None:
        """The inverse of :meth:`read_range`, with the same ``data``, limits and errors; no block may come twice."""
        self._write(blocks, self._check_range(blocks, heads, layers, "data", data), heads, layers)

    def range_bytes(self, num_blocks: int, num_heads: int, num_layers: int) -> int:
        """Bytes of so many heads and layers of so many blocks."""
        if self.format.quantised:
            one = self.format.block_bytes(self.block_size, self.head_dim)
        else:
            one = 2 * self.block_size * self.head_dim * self.dtype.itemsize
        return num_blocks * num_layers * num_heads * one

    @property
    def _everything(self) -> tuple[Range, Range]:
        return (0, self.num_kv_heads), (0, self.num_layers)

    def _read(self, blocks: Sequence[int], out: Sequence[Bits], heads: Range, layers: Range) -> None:
        if self.mover is not None:
            self.mover.read(blocks, heads, layers, out)
            return
        for into, block in zip(out, blocks, strict=True):
            held = self._standard(block, slice(*heads), slice(*layers))
            for into_LK, x_LK in zip(self._halves(into, heads), held, strict=True):
                np.copyto(into_LK, _bits(x_LK))

    def _write(self, blocks: Sequence[int], data: Sequence[Bits], heads: Range, layers: Range) -> None:
        if self.mover is not None:
            self.mover.write(blocks, heads, layers, data)
            return
        for held, block in zip(data, blocks, strict=True):
            into = self._standard(block, slice(*heads), slice(*layers))
            for held_LK, x_LK in zip(self._halves(held, heads), into, strict=True):
                np.copyto(_bits(x_LK), held_LK)

    def _standard(self, block: int, heads: slice, layers: slice) -> tuple[Tensor, Tensor]:
        """Views of a block, each [layers, heads, block_size, head_dim] in either layout; or [layers, heads, bytes]."""
        k_LKX, v_LKX = (x[layers, block, heads] for x in self._whole("blocks"))
        transposed = self.transposed_keys and not self.format.quantised
        return (k_LKX.transpose(-1, -2) if transposed else k_LKX), v_LKX

    def _halves(self, bits: Bits, heads: Range) -> tuple[Bits, Bits]:
        """Views of the keys and of the values of a block outside the cache."""
        if not self.format.quantised:
            return bits[:, 0], bits[:, 1]
        num_layers, num_heads = len(bits), heads[1] - heads[0]
        middle = num_heads * record_bytes(self.format.keys, self.block_size, self.head_dim)
        return bits[:, :middle].reshape(num_layers, num_heads, -1), bits[:, middle:].reshape(num_layers, num_heads, -1)

    def _write_part(self, part: KvPart, k_TKD: Tensor, v_TKD: Tensor, blocks_T: Tensor, offsets_T: Tensor) -> None:
        if len(part.heads) < self.num_kv_heads:
            k_TKD, v_TKD = k_TKD[:, list(part.heads)], v_TKD[:, list(part.heads)]
        if self.format.quantised:
            quantise.write_keys(part.keys, self.format.keys, k_TKD, blocks_T, offsets_T)
            quantise.write_values(part.values, self.format.values, v_TKD, blocks_T, offsets_T)
            return
        k_TKD, v_TKD = k_TKD.to(self.dtype), v_TKD.to(self.dtype)
        if self.transposed_keys:
            part.keys[blocks_T, :, :, offsets_T] = k_TKD
        else:
            part.keys[blocks_T, :, offsets_T] = k_TKD
        part.values[blocks_T, :, offsets_T] = v_TKD

    def _make_parts(self) -> list[Tensor]:
        """Makes ``parts``; returns the memory of all keys, and that of all values."""
        places: list[list[tuple[int, tuple[int, ...]]]] = []
        for row in self.policy.groups_LK:
            places.append([(g, tuple(head for head, of in enumerate(row) if of == g)) for g in sorted(set(row))])
        shapes = [(self.group_blocks[group], len(heads)) for layer in places for group, heads in layer]
        memory, carved = [], []
        for block in self._block_shapes():
            flat, tensors = _carve([(*shape, *block) for shape in shapes], self.dtype, self.device)
            memory.append(flat)
            carved.append(tensors)
        pairs = iter(zip(*carved, strict=True))
        self.parts = [tuple(KvPart(*place, *next(pairs)) for place in layer) for layer in places]
        self._one: tuple[Tensor, Tensor] | None = None
        if self.policy.num_groups == 1:
            shape = (self.num_layers, self.num_blocks, self.num_kv_heads)
            keys, values = (x.view(*shape, *block) for x, block in zip(memory, self._block_shapes(), strict=True))
            self._one = keys, values
        return memory

    def _block_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of one head's keys, and values, of a block."""
        if self.format.quantised:
            keys, values = (record_bytes(kind, self.block_size, self.head_dim) for kind in self.format)
            return (keys,), (values,)
        standard = self.block_size, self.head_dim
        return (standard[::-1] if self.transposed_keys else standard), standard

    def _whole(self, what: str) -> tuple[Tensor, Tensor]:
        if self._one is None:
            limit = f"has several groups, and {what} of all heads of a layer at once are those of one"
            raise InvalidValueError("kv_policy", self.policy.text, limit)
        return self._one

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
        if self.format.quantised:
            return list(bits.reshape(len(blocks), num_layers, -1))
        return list(bits.reshape(len(blocks), num_layers, 2, num_heads, self.block_size, self.head_dim))

    def _check_blocks(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            if not 0 <= block < self.num_blocks:
                raise InvalidValueError("block", block, f"must be at least 0 and less than {self.num_blocks}")


def dtype_name(dtype: torch.dtype) -> str:
    """Such as ``float32``."""
    return str(dtype).removeprefix("torch.")


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, so that memory that nobody has written yet cannot hold NaN."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # NumPy asks for huge pages and torch does not; blocks lie scattered, so with small ones each is a TLB miss.
    memory = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(memory).view(dtype).view(shape)


def _carve(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Zeros, and tensors that lie in them one after the other."""
    sizes = [math.prod(shape) for shape in shapes]
    flat = _zeros((sum(sizes),), dtype, device)
    return flat, [x.view(shape) for x, shape in zip(torch.split(flat, sizes), shapes, strict=True)]


def _float(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _bits(x: Tensor) -> Bits:
    """``x`` in host memory as integers. NumPy copies them on the calling thread: torch may start a team of threads for
    a copy, one for each thread that copies, and libgomp lets the waiting threads of several teams sleep instead of
    spin, the steps' among them."""
    bits: Bits = x.view(INTEGERS[x.dtype.itemsize]).numpy()
    return bits
