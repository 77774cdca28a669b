"""A weight packed for the CPU's matrix products, and the products themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwise.workers.cpu.linear_simd import PANEL, TILE_ROWS, gate, tile
from headwise.workers.cpu.team import Team, join, launching, meet, take_job, team_bytes
from headwise.workers.jit.kernel_cache import kernel
from headwise.workers.jit.native import load_int

# A packed linear as the kernels see it: int64 words at its address.
_PANELS_AT, _BIAS_AT, _DEPTH, _PANELS, _GATED = range(5)

SCRATCH_BYTES = 4 * TILE_ROWS * PANEL
"""What a thread needs beside its outputs: a tile of a gated product before the gate."""

# Rows that go through a panel before the next one: as many rows of x as stay in the second-level cache.
_ROWS_AT_ONCE = 256
# How far before its use a weight is fetched where one tile takes the whole panel, in bytes.
_AHEAD_BYTES = 4096


class PackedLinear:
    """``y = x W^T + b``; or, gated, ``silu(x Wg^T + bg) * (x Wu^T + bu)``, with the rows of Wg above those of Wu.

    Attributes:
        address: what the kernels are given.
        depth: what a row of x must have, in_features rounded up to a multiple of PANEL; the rest of it zeros.
        width: how many floats of a row of y are written, out_features (half of them, gated) rounded up to whole
            panels; those beyond come out as zeros.
        nbytes: memory held.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None, gated: bool = False) -> None:
        in_features = weight_OI.shape[1]
        columns = PANEL // 2 if gated else PANEL
        self.depth = padded(in_features)
        parts = weight_OI.chunk(2) if gated else (weight_OI,)
        panels = -(-parts[0].shape[0] // columns)
        self.width = panels * columns
        self._weight_NIP = aligned_zeros(panels * self.depth * PANEL).reshape(panels, self.depth, PANEL)
        self._bias_NP = aligned_zeros(panels * PANEL).reshape(panels, PANEL)
        for i, part_OI in enumerate(parts):
            place = slice(i * columns, (i + 1) * columns)
            _pack(part_OI, self._weight_NIP[:, :in_features, place])
        if bias_O is not None:
            for i, part_O in enumerate(bias_O.chunk(len(parts))):
                _pack(part_O[:, None], self._bias_NP[:, None, i * columns : (i + 1) * columns])
        words = (self._weight_NIP.ctypes.data, self._bias_NP.ctypes.data, self.depth, panels, int(gated))
        self._words = np.array(words, np.int64)
        self.address: int = self._words.ctypes.data
        self.nbytes = self._weight_NIP.nbytes + self._bias_NP.nbytes

    def __call__(self, x_TI: Tensor, num_threads: int = 1) -> Tensor:
        """``[T, depth]`` contiguous to ``[T, width]``, float32; a step calls :func:`multiply` instead."""
        y_TO = torch.empty(len(x_TI), self.width)
        multiply_all([self], [x_TI], [y_TO], num_threads)
        return y_TO


def multiply_all(
    linears: Sequence[PackedLinear], inputs: Sequence[Tensor], outputs: Sequence[Tensor], num_threads: int
) -> None:
    """One product after the other as a step does them, in one call: ``[T, depth]`` each into ``[T, width]``."""
    scratch_bytes = num_threads * SCRATCH_BYTES
    memory = aligned_zeros((scratch_bytes + team_bytes(num_threads)) // 4)
    scratch: int = memory.ctypes.data
    triples = zip(linears, inputs, outputs, strict=True)
    calls = [(linear.address, x.data_ptr(), len(x), y.data_ptr(), linear.width) for linear, x, y in triples]
    run = _multiply_each_in_threads if num_threads > 1 else _multiply_each
    with launching(num_threads):
        run(np.array(calls, np.int64), scratch, scratch + scratch_bytes, num_threads)


def padded(count: int) -> int:
    """The next multiple of PANEL: what rows of activations are rounded up to."""
    return -(-count // PANEL) * PANEL


def aligned_zeros(count: int) -> NDArray[np.float32]:
    """Zeros that start on a cache line. NumPy asks for huge pages for large ones."""
    memory = np.zeros(4 * count + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + 4 * count].view(np.float32)


def _pack(rows_OI: Tensor, into_NIC: NDArray[np.float32]) -> None:
    """Turns rows of a weight into panels of ``C`` columns; columns beyond the last row stay as they are."""
    rows, columns = rows_OI.numpy(), into_NIC.shape[2]
    whole = len(rows) // columns
    into_NIC[:whole] = rows[: whole * columns].reshape(whole, columns, rows.shape[1]).transpose(0, 2, 1)
    if rest := len(rows) - whole * columns:
        into_NIC[whole, :, :rest] = rows[whole * columns :].T


@kernel(parallel=True)
def _multiply_each_in_threads(calls: Any, scratch: int, address: int, threads: int) -> None:
    for _ in numba.prange(threads):
        _multiply_each(calls, scratch, address, threads)


@kernel
def _multiply_each(calls: Any, scratch: int, address: int, threads: int) -> None:
    team = join(address, threads)
    if team.member >= 0:
        for i in range(len(calls)):
            linear, x, rows, out, out_stride = calls[i]
            multiply(linear, x, rows, out, out_stride, scratch, team)
            meet(team)


@kernel
def multiply(linear: int, x: int, rows: int, out: int, out_stride: int, scratch: int, team: Team) -> None:
    """One stage: out[rows, width] of x[rows, depth], with nothing between the rows of x; see PackedLinear.

    Args:
        scratch: the address of SCRATCH_BYTES for each thread of the team.
    """
    depth, panels = load_int(linear, _DEPTH), load_int(linear, _PANELS)
    groups = (rows + _ROWS_AT_ONCE - 1) // _ROWS_AT_ONCE
    scratch += team.member * SCRATCH_BYTES
    done = 0
    job = take_job(team, groups * panels, 0)
    while job >= 0:
        group = job // panels
        panel, first = job - group * panels, group * _ROWS_AT_ONCE
        count = min(_ROWS_AT_ONCE, rows - first)
        x_first, out_first = x + 4 * first * depth, out + 4 * first * out_stride
        _multiply_panel(linear, panel, x_first, count, out_first, out_stride, scratch)
        done += 1
        job = take_job(team, groups * panels, done)


@kernel
def _multiply_panel(linear: int, panel: int, x: int, rows: int, out: int, out_stride: int, scratch: int) -> None:
    """One panel's columns of out. While its later tiles compute, the next panel is on its way."""
    depth, gated = load_int(linear, _DEPTH), load_int(linear, _GATED)
    panel_bytes = 4 * PANEL * depth
    weights = load_int(linear, _PANELS_AT) + panel * panel_bytes
    bias = load_int(linear, _BIAS_AT) + panel * 4 * PANEL
    out += 4 * panel * (PANEL // 2 if gated else PANEL)
    tiles = (rows + TILE_ROWS - 1) // TILE_ROWS
    for i in range(tiles):
        first, last = rows * i // tiles, rows * (i + 1) // tiles
        ahead = weights + _AHEAD_BYTES if tiles == 1 else weights + panel_bytes + panel_bytes * i // tiles
        into, stride = (scratch, PANEL) if gated else (out + 4 * first * out_stride, out_stride)
        ahead_step = 4 * PANEL // tiles
        tile(last - first, x + 4 * first * depth, depth, depth, weights, bias, ahead, ahead_step, into, stride)
        if gated:
            gate(last - first, scratch, out + 4 * first * out_stride, out_stride)
