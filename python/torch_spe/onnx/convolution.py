"""Translation of codes of filtered noise."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnxscript import opset18 as op

from torch_spe.onnx.nodes import UnsupportedError, apply_code, reshape, sizes, tensor
from torch_spe.onnx.noise import conv_noise


def filter_noise(
    x: ir.Value,  # [B, *size, H, D]
    kernel: np.ndarray,  # [H, D, *P]
    constant: ir.Value | None,  # [H, D, R]
    seed: int | None,
    num_realizations: int,
    noise_kind: str,
    noise_stride: list[int],
    start: list[int | ir.Value],
    feature_map: str,
) -> ir.Value:  # [B, *size, H, R]
    """Translate `torch_spe.functional.conv_filter`, with noise and codes in memory."""
    if seed is None:
        raise UnsupportedError(
            "conv_filter: noise must be None in an ONNX model, which makes it from a seed"
        )
    heads, features, *taps = kernel.shape
    ndim, rows = len(taps), heads * features
    axes = []
    for i, count in enumerate(taps):
        first = start[i] if start else 0
        if isinstance(first, ir.Value):
            first = reshape(op.Cast(first, to=ir.DataType.INT64), 1)
        else:
            first = tensor([first])
        length = op.Squeeze(sizes(x, 1 + i, 2 + i), tensor([0]))
        index = op.Range(tensor(0), op.Add(length, tensor(count - 1)), tensor(1))
        axes.append(op.Add(index, first))
    noise = conv_noise(
        seed, (heads, features), axes, num_realizations, noise_kind, noise_stride
    )  # [*L, H D, R]
    images = op.Transpose(noise, perm=[ndim + 1, ndim, *range(ndim)])
    weight = tensor(kernel.reshape(rows, 1, *taps).astype(np.float32))
    code = op.Conv(images, weight, group=rows)  # [R, H D, *size]
    code = op.Transpose(code, perm=[*range(2, 2 + ndim), 1, 0])
    code = reshape(code, -1, heads, features, num_realizations)
    if constant is not None:
        code = op.Add(code, constant)
    if ndim == 1:
        return apply_code(x, code, feature_map)
    flat = op.Reshape(x, op.Concat(sizes(x, 0, 1), tensor([-1, heads, features]), axis=0))
    flat.dtype = x.dtype
    out = apply_code(flat, code, feature_map)
    size = op.Concat(sizes(x, 0, 1 + ndim), tensor([heads, num_realizations]), axis=0)
    return op.Reshape(out, size)
