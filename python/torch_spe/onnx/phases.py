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

import dataclasses
import functools
import math
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import opset18 as op

from torch_spe.onnx.nodes import reshape, sizes, tensor

BLOCK, DIGITS = 4096, 3
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, *_HALVES)


@dataclasses.dataclass(frozen=True)
class MadeFrequencies:
    """Frequencies that nodes make.

    Attributes:
        columns: float64, those of each dimension of positions.
        shape: of each.
    """

    columns: list[ir.Value]
    shape: tuple[int, ...]


def split_frequencies(freqs: np.ndarray | ir.Value) -> list[tuple[ir.Value, ir.Value]]:
    """Return what each digit is multiplied by, the lowest first: coarse multiples, and rests."""
    parts, multiple = [], freqs
    for _ in range(DIGITS):
        # Exact in float64: a power of 2 times what is left without whole cycles.
        multiple = _without_cycles(multiple)
        coarse = _scaled(_rounded(_scaled(multiple, BLOCK)), 1 / BLOCK)
        parts.append((_narrow(coarse), _narrow(_difference(multiple, coarse))))
        multiple = _scaled(multiple, BLOCK)
    return parts


# Of constants, which are computed at once, or of what nodes make, in float64.


def _rounded(x: np.ndarray | ir.Value) -> np.ndarray | ir.Value:
    return op.Round(x) if isinstance(x, ir.Value) else np.rint(x)


def _scaled(x: np.ndarray | ir.Value, factor: float) -> np.ndarray | ir.Value:
    return op.Mul(x, tensor(np.array(float(factor)))) if isinstance(x, ir.Value) else x * factor


def _difference(x: np.ndarray | ir.Value, y: np.ndarray | ir.Value) -> np.ndarray | ir.Value:
    return op.Sub(x, y) if isinstance(x, ir.Value) else x - y


def _without_cycles(x: np.ndarray | ir.Value) -> np.ndarray | ir.Value:
    return _difference(x, _rounded(x))


def _narrow(x: np.ndarray | ir.Value) -> ir.Value:
    if isinstance(x, ir.Value):
        return op.Cast(x, to=ir.DataType.FLOAT)
    return tensor(x.astype(np.float32))


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
    freqs: np.ndarray | MadeFrequencies,  # float64 [*sizes, ndim], or [*sizes] for each dimension
    shifts: np.ndarray | ir.Value,  # cycles, [*sizes] or what broadcasts with it
    x: ir.Value,  # [B, N, H, D]
    positions: ir.Value | None,  # [N] or [N, ndim]
    start: float | ir.Value,
) -> ir.Value:  # [N, *sizes]
    """Return ``2 pi (freqs position + shifts)``, but for whole cycles."""
    columns: list[Any]
    if isinstance(freqs, MadeFrequencies):
        columns, shape = freqs.columns, freqs.shape
    else:
        columns, shape = list(np.moveaxis(freqs, -1, 0)), freqs.shape[:-1]
    ndim, before = len(columns), []
    if positions is None:
        length = op.Squeeze(sizes(x, 1, 2), tensor([0]))
        positions = op.Range(tensor(0), length, tensor(1))
        positions.dtype = ir.DataType.INT64
        if isinstance(start, ir.Value):
            dtype = ir.DataType.DOUBLE if start.dtype in _FLOATS else ir.DataType.INT64
            positions = op.Add(op.Cast(positions, to=dtype), op.Cast(start, to=dtype))
            positions.dtype = dtype
        elif isinstance(columns[0], np.ndarray) and isinstance(shifts, np.ndarray):
            shifts = shifts + columns[0] * start
        elif start:
            before.append(_narrow(_without_cycles(_scaled(columns[0], start))))
    dtype, rows, cycles = positions.dtype, reshape(positions, -1, ndim), []
    for i, column in enumerate(columns):
        row = rows
        if ndim > 1:
            row = op.Slice(rows, tensor([i]), tensor([i + 1]), tensor([1]))
        flat = column.reshape(-1) if isinstance(column, np.ndarray) else reshape(column, -1)
        cycles.append(_cycles(row, dtype, flat))
    total = reshape(functools.reduce(op.Add, cycles), 0, *shape)
    if isinstance(shifts, ir.Value):
        before.append(shifts)
    elif (whole := _without_cycles(shifts).astype(np.float32)).any():
        before.append(tensor(whole))
    return op.Mul(functools.reduce(op.Add, before, total), tensor(2 * math.pi))


def _cycles(
    positions: ir.Value,  # [N, 1]
    dtype: ir.DataType,
    freqs: np.ndarray | ir.Value,  # [S]
) -> ir.Value:  # [N, S]
    """Return ``freqs position``, but for whole cycles."""
    products = []
    if dtype in _FLOATS:
        if dtype in _HALVES:
            positions = op.Cast(positions, to=ir.DataType.FLOAT)
        whole = op.Floor(positions)
        rest = op.Cast(op.Sub(positions, whole), to=ir.DataType.FLOAT)
        products.append(op.Mul(rest, _narrow(freqs)))
        positions = whole
    digits, parts = split_positions(positions), split_frequencies(freqs)
    coarse = [op.Mul(x, f) for x, (f, _) in zip(digits, parts, strict=True)]
    coarse = functools.reduce(op.Add, coarse)
    products += [op.Mul(x, f) for x, (_, f) in zip(digits, parts, strict=True)]
    return op.Add(op.Sub(coarse, op.Round(coarse)), functools.reduce(op.Add, products))
