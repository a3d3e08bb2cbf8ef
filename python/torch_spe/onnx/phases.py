"""Phases of positions, exact in float32.

A frequency f, in cycles per position, and a position ``n = 4096 h + l`` have the phase
``f n = f l + g h`` with ``g = 4096 f``, of which whole cycles are left out. Each of f and g is
split into a multiple of 2^-12 and a rest of at most 2^-13: products of the former with l and h have
at most 24 bits, so float32 has them exactly and nothing is lost where their whole cycles are
removed; products with the rests are at most half a cycle, and lose its 2^-25th. Positions up to
2^24 are as good as the first ones.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from onnxscript import opset18 as op

from torch_spe.onnx.nodes import reshape, sizes, tensor, to_float32

BLOCK = 4096
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def split_frequencies(freqs: np.ndarray, whole: bool) -> np.ndarray:  # [..., ndim] -> [C, ...]
    """Return what the columns of `split_positions` are multiplied by, as float32."""
    parts = []
    for freq in np.moveaxis(freqs, -1, 0):
        f = freq - np.rint(freq)
        g = BLOCK * f - np.rint(BLOCK * f)
        f_high, g_high = (np.rint(BLOCK * x) / BLOCK for x in (f, g))
        parts += [f_high, f - f_high, g_high, g - g_high] + [freq] * (not whole)
    return np.stack(parts).astype(np.float32)


def split_positions(positions: ir.Value, ndim: int, whole: bool) -> ir.Value:  # [N, C, 1]
    """Return the parts of positions ``[N, ndim]``: l and h, twice each, and what is not whole."""
    rows, dtype = reshape(positions, -1, ndim, 1), positions.dtype
    floor = rows if whole else op.Floor(rows)
    rests = [] if whole else [to_float32(op.Sub(rows, floor), dtype)]
    floor = to_float32(floor, dtype)
    high = op.Floor(op.Mul(floor, tensor(1 / BLOCK)))
    low = op.Sub(floor, op.Mul(high, tensor(float(BLOCK))))
    parts = op.Concat(low, low, high, high, *rests, axis=-1)
    return reshape(parts, -1, (4 + len(rests)) * ndim, 1)


def phases(
    freqs: np.ndarray,  # float64 [*sizes, ndim]
    shifts: np.ndarray,  # cycles, [*sizes] or what broadcasts with it
    x: ir.Value,  # [B, N, H, D]
    positions: ir.Value | None,  # [N] or [N, ndim]
    start: float | ir.Value,
) -> ir.Value:  # [N, *sizes]
    """Return ``2 pi (freqs position + shifts)``, but for whole cycles."""
    *shape, ndim = freqs.shape
    if positions is None:
        length = op.Squeeze(sizes(x, 1, 2), tensor([0]))
        positions = op.Range(tensor(0), length, tensor(1))
        positions.dtype = ir.DataType.INT64
        if isinstance(start, ir.Value):
            positions = op.Add(positions, op.Cast(start, to=ir.DataType.INT64))
            positions.dtype = ir.DataType.INT64
        else:
            shifts = shifts + freqs[..., 0] * start
    whole = positions.dtype not in _FLOATS
    table = split_frequencies(freqs, whole)
    products = op.Mul(
        split_positions(positions, ndim, whole), tensor(table.reshape(len(table), -1))
    )
    products = op.Sub(products, op.Round(products))
    cycles = reshape(op.ReduceSum(products, tensor([1]), keepdims=0), 0, *shape)
    shifts = (shifts - np.rint(shifts)).astype(np.float32)
    if shifts.any():
        cycles = op.Add(cycles, tensor(shifts))
    return op.Mul(cycles, tensor(2 * math.pi))
