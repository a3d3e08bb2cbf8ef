"""Phases of positions, exact in float32.

A position n, split in int64, has three digits to the base 4096, ``n = 4096^2 j + 4096 h + l``, of
which l and h are from -2048 to 2047. A frequency f, in cycles per position, has three multiples f,
4096 f and 4096^2 f, of which whole cycles are left out, and the phase is the sum of their products
with the digits. Each multiple is split into a multiple of 2^-12 and a rest of at most 2^-13. The
sum of the three products with the former is a multiple of 2^-12 below 2^12: float32 has it exactly,
in any order, and nothing is lost where its whole cycles are removed. The products with the rests
are at most a quarter of a cycle, and lose its 2^-24th. Positions up to 2^35 are as good as the
first ones; beyond, precision is lost as j grows. Of real-valued positions what follows the point is
multiplied by f itself.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import onnx_ir as ir
from onnxscript import opset18 as op

from torch_spe.onnx.nodes import reshape, sizes, tensor

BLOCK, DIGITS = 4096, 3
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, *_HALVES)


def split_frequencies(freqs: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return what each digit is multiplied by, the lowest first: coarse multiples, and rests."""
    parts, multiple = [], freqs
    for _ in range(DIGITS):
        # Exact in float64: a power of 2 times what is left without whole cycles.
        multiple = multiple - np.rint(multiple)
        coarse = np.rint(BLOCK * multiple) / BLOCK
        parts.append((coarse.astype(np.float32), (multiple - coarse).astype(np.float32)))
        multiple = BLOCK * multiple
    return parts


def split_positions(positions: ir.Value) -> list[ir.Value]:
    """Return the digits of whole positions in float32, the lowest first."""
    digits, rows = [], op.Cast(positions, to=ir.DataType.INT64)
    half = tensor(BLOCK // 2)
    for _ in range(DIGITS - 1):
        low = op.Sub(op.Mod(op.Add(rows, half), tensor(BLOCK)), half)  # the remainder is not < 0
        rows = op.Div(op.Sub(rows, low), tensor(BLOCK))
        digits.append(low)
    return [op.Cast(digit, to=ir.DataType.FLOAT) for digit in (*digits, rows)]


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
            dtype = ir.DataType.DOUBLE if start.dtype in _FLOATS else ir.DataType.INT64
            positions = op.Add(op.Cast(positions, to=dtype), op.Cast(start, to=dtype))
            positions.dtype = dtype
        else:
            shifts = shifts + freqs[..., 0] * start
    dtype, columns = positions.dtype, reshape(positions, -1, ndim)
    cycles = []
    for i in range(ndim):
        column = columns
        if ndim > 1:
            column = op.Slice(columns, tensor([i]), tensor([i + 1]), tensor([1]))
        cycles.append(_cycles(column, dtype, freqs[..., i].reshape(-1)))
    cycles = reshape(functools.reduce(op.Add, cycles), 0, *shape)
    shifts = (shifts - np.rint(shifts)).astype(np.float32)
    if shifts.any():
        cycles = op.Add(cycles, tensor(shifts))
    return op.Mul(cycles, tensor(2 * math.pi))


def _cycles(
    positions: ir.Value,  # [N, 1]
    dtype: ir.DataType,
    freqs: np.ndarray,  # [S]
) -> ir.Value:  # [N, S]
    """Return ``freqs position``, but for whole cycles."""
    products = []
    if dtype in _FLOATS:
        if dtype in _HALVES:
            positions = op.Cast(positions, to=ir.DataType.FLOAT)
        whole = op.Floor(positions)
        rest = op.Cast(op.Sub(positions, whole), to=ir.DataType.FLOAT)
        products.append(op.Mul(rest, tensor(freqs.astype(np.float32))))
        positions = whole
    digits, parts = split_positions(positions), split_frequencies(freqs)
    coarse = [op.Mul(x, tensor(f)) for x, (f, _) in zip(digits, parts, strict=True)]
    coarse = functools.reduce(op.Add, coarse)
    products += [op.Mul(x, tensor(f)) for x, (_, f) in zip(digits, parts, strict=True)]
    return op.Add(op.Sub(coarse, op.Round(coarse)), functools.reduce(op.Add, products))
