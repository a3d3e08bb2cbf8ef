"""The noise of `torch_spe.functional.conv_filter`, made by nodes: any length, nothing stored.

The words are those of csrc/core/noise.h; logarithm, cosine and sine are those of the runtime, so
that values agree to rounding and not to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnxscript import opset18 as op

from torch_spe.onnx.counter import low_word, philox, philox_of_sources, shift_right, unsigned
from torch_spe.onnx.nodes import reshape, tensor

_SHIFT = 2  # the purpose of a shift, beside the kinds of noise
_BLOCKS = {"gaussian": (0, 4), "rademacher": (1, 128)}  # purpose, realizations of a block


def conv_noise(
    seed: int,
    code_shape: tuple[int, int],
    axes: Sequence[ir.Value],  # positions along each dimension, int64
    num_realizations: int,
    noise_kind: str,
    noise_stride: Sequence[int],
) -> ir.Value:  # [*L, H * D, R]
    """Make `torch_spe.functional.conv_noise` at some positions."""
    ndim = len(axes)
    purpose, per_block = _BLOCKS[noise_kind]
    heads, features = np.meshgrid(*map(np.arange, code_shape), indexing="ij")
    sources = (heads << 16 | features).reshape(-1, 1)  # [H D, 1]
    blocks = np.arange(-(-num_realizations // per_block))
    blocks = purpose << 28 | ndim << 24 | blocks
    # [..., L, ..., 1, 1], each along its dimension
    axes = [
        reshape(axis, *(-1 if i == j else 1 for j in range(ndim)), 1, 1)
        for i, axis in enumerate(axes)
    ]
    strides = list(noise_stride) or [1] * ndim
    present = None
    if max(strides) > 1:
        axes, present = _periods(axes, seed, sources, strides, num_realizations)
    counter = (*_position_words(axes), unsigned(sources), unsigned(blocks))
    words = philox(counter, seed)
    values = _normals(words) if noise_kind == "gaussian" else _signs(words)
    count = len(blocks) * per_block
    values = reshape(values, *[0] * ndim, len(sources), count)
    if count > num_realizations:
        values = op.Slice(values, tensor([0]), tensor([num_realizations]), tensor([-1]))
    if present is None:
        return values
    values = op.Mul(values, tensor(math.sqrt(math.prod(strides))))
    return op.Where(present, values, tensor(0.0))


def _position_words(axes: Sequence[ir.Value]) -> tuple[ir.Value, ir.Value]:
    """Return the first two words of a counter, from positions in two's complement."""
    axes = [op.Cast(axis, to=ir.DataType.UINT64) for axis in axes]
    if len(axes) == 1:
        return low_word(axes[0]), shift_right(axes[0], 32)
    if len(axes) == 2:
        return low_word(axes[1]), low_word(axes[0])
    low, position = 2**21 - 1, None
    for axis in axes:
        axis = op.BitwiseAnd(axis, unsigned(low))
        if position is not None:
            axis = op.BitwiseOr(op.Mul(position, unsigned(2**21)), axis)
        position = axis
    return low_word(position), shift_right(position, 32)


def _normals(words: Sequence[ir.Value]) -> ir.Value:  # [..., blocks, 4]
    """Make two normals of each pair of words, by the method of Box and Muller."""
    values = []
    for radius, angle in (words[:2], words[2:]):
        uniform = op.Cast(shift_right(radius, 1), to=ir.DataType.FLOAT)
        uniform = op.Mul(op.Add(uniform, tensor(0.5)), tensor(2.0**-31))
        length = op.Sqrt(op.Mul(op.Log(uniform), tensor(-2.0)))
        # Odd multiples of 2^-26 of a cycle.
        part = op.Mul(shift_right(angle, 7), unsigned(2))
        upper = op.Mul(op.BitwiseAnd(shift_right(angle, 29), unsigned(1)), unsigned(2**24))
        part = op.Sub(op.Cast(part, to=ir.DataType.INT64), op.Cast(upper, to=ir.DataType.INT64))
        part = op.Cast(op.Add(part, tensor(1)), to=ir.DataType.FLOAT)
        turn = op.Mul(part, tensor(2 * math.pi / 2**26))
        values += [op.Mul(length, op.Cos(turn)), op.Mul(length, op.Sin(turn))]
    return op.Concat(*(op.Unsqueeze(x, tensor([-1])) for x in values), axis=-1)


def _signs(words: Sequence[ir.Value]) -> ir.Value:  # [..., blocks, 128]
    """Make a sign of each bit, the lowest first."""
    bits = op.Concat(
        *(
            op.BitShift(op.Unsqueeze(x, tensor([-1])), unsigned(np.arange(32)), direction="RIGHT")
            for x in words
        ),
        axis=-1,
    )
    bits = op.Cast(op.BitwiseAnd(bits, unsigned(1)), to=ir.DataType.FLOAT)
    return op.Sub(tensor(1.0), op.Mul(bits, tensor(2.0)))


def _periods(
    axes: Sequence[ir.Value],
    seed: int,
    sources: np.ndarray,  # [H D, 1]
    strides: Sequence[int],
    num_realizations: int,
) -> tuple[list[ir.Value], ir.Value]:  # [..., L, ..., H D, 1] each, [*L, H D, R]
    """Return the periods of polyphase noise in place of positions, and which values there are."""
    ndim, periods, present = len(axes), [], None
    block = _SHIFT << 28 | ndim << 24
    words = philox_of_sources(sources[:, 0], block, seed)
    classes: list[np.ndarray] = []
    rest = np.arange(num_realizations)
    for stride in reversed(strides):
        classes.insert(0, rest % stride)
        rest = rest // stride
    for i, (axis, stride, kind) in enumerate(zip(axes, strides, classes, strict=True)):
        # Shifts are numbered from the first of three dimensions.
        shift = words[i + 3 - ndim] * stride >> 32
        moved = op.Add(axis, tensor(shift[:, None].astype(np.int64)))
        remainder = op.Mod(moved, tensor(stride))  # of the sign of the stride
        periods.append(op.Div(op.Sub(moved, remainder), tensor(stride)))
        fits = op.Equal(remainder, tensor(kind.astype(np.int64)))
        present = fits if present is None else op.And(present, fits)
    return periods, present
